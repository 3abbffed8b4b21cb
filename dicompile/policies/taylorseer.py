"""TaylorSeer: between full steps, values are forecast instead of reused."""

from __future__ import annotations

from typing import Literal

from dicompile.plan import Cadence, Forecast, Policy, Rule

Differences = Literal["backward", "divided"]


def TaylorSeer(interval: int = 4, order: int = 4, warmup: int = 2, differences: Differences = "backward") -> Policy:
    """Forecast the output of every branch, before its gate, as a Taylor series in the number of steps.

    Args:
        interval: steps from one full step to the next.
        order: highest derivative; 0 reuses. It builds up, one order per full step.
        warmup: full steps at the start.
        differences: "backward" as published, "divided" for the polynomial through the stored values; see `Forecast`.

    Reference:
        Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.
    """
    return Policy(
        name=f"taylorseer-{interval}-{order}",
        cadence=Cadence(interval=interval, anchor="last", warmup=warmup),
        rules=(Rule(do=Forecast(order=order, differences=differences)),),
    )


def TaylorSeerLite(
    interval: int = 4,
    order: int = 2,
    warmup: int = 3,
    what: Literal["stream", "update"] = "update",
    differences: Differences = "backward",
) -> Policy:
    """Forecast what all blocks together add to the stream: no block runs between full steps.

    It remembers order + 1 tensors where `TaylorSeer` remembers as many for every branch.

    Args:
        interval: steps from one full step to the next.
        order: highest derivative; 0 reuses.
        warmup: full steps at the start.
        what: "update", what the blocks add, on top of the embedding of the current latent, or "stream", the last hidden
            state.
        differences: see `TaylorSeer`.

    Reference:
        The "lite" form of TaylorSeer, arXiv 2503.06923, section 3; here on the stack of blocks.
    """
    return Policy(
        name=f"taylorseer-lite-{interval}-{order}",
        cadence=Cadence(interval=interval, anchor="last", warmup=warmup),
        rules=(Rule(sites=("stack",), do=Forecast(order=order, differences=differences, what=what)),),
    )
