"""HiCache: forecasts in Hermite polynomials instead of powers, which grow less over long distances."""

from __future__ import annotations

from dicompile.plan import Cadence, Forecast, Policy, Rule


def HiCache(interval: int = 5, order: int = 2, scale: float = 0.5, warmup: int = 3) -> Policy:
    """Forecast the output of every branch as `TaylorSeer` does, with ``c**k H_k(c x)`` in the place of ``x**k``.

    Args:
        interval: steps from one full step to the next.
        order: highest derivative.
        scale: c, unitless; published are 0.5 to 0.7. Less leans more on the latest value.
        warmup: full steps at the start. All but the last two of them are left out of the differences.

    Reference:
        HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion Acceleration,
        arXiv 2508.16984.
    """
    return Policy(
        name=f"hicache-{interval}-{order}",
        cadence=Cadence(interval=interval, anchor="last", warmup=warmup),
        rules=(Rule(do=Forecast(order=order, hermite=scale, since=max(warmup - 2, 0))),),
    )
