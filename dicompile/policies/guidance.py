"""Guidance reuse: late in the run, what tells the unconditional half from the conditional one hardly changes."""

from __future__ import annotations

from typing import Literal

from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule, WeightedBands


def GuidanceReuse(
    interval: int = 5,
    timesteps: tuple[float, float] = (-1, 641),
    leads: str = "cond",
    halves: Literal["", "uncond-cond", "cond-uncond"] = "",
    low: float = 1.0,
    high: float = 1.0,
) -> Policy:
    """Add to the output of the conditional half the difference that the other half had to it at the last full step.

    The half that leads always runs. Where a pipeline calls both one by one, under names (`dicompile.cache_context`;
    those of diffusers do), it comes first, and a half that joins late, or was not paired at its last full step, runs
    as well. Where both are in one batch, say with `halves` in which order: steps between two full ones then run half of
    the batch, as long as both halves have the same latents. The last step is full.

    FasterCache gives low frequencies of the difference a little more weight in the middle of the run, and high ones at
    its end; so do `low` and `high`, for models that return pictures. It reuses attention, too; here that is computed.

    Args:
        interval: steps from one full step of the other half to the next.
        timesteps: where it is reused, as the scheduler counts them: the second half of the run.
        leads: name of the half that is computed at every step; modular pipelines of diffusers, where they give names at
            all (LTX-Video does, Wan does not), call it "pred_cond".
        halves: "uncond-cond" or "cond-uncond" where one call has both halves, in this order; pipelines of diffusers
            have "uncond-cond". Empty where every half has a call of its own.
        low: weight of the low frequencies between the timesteps 99 and 901; published is 1.1. See `WeightedBands`.
        high: weight of the high ones below timestep 301; published is 1.1.

    Reference:
        Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355,
        section on CFG-Cache; interval and timesteps are those of diffusers.
    """
    name = f"guidance-reuse-{interval}"
    do: Reuse | WeightedBands = Reuse(what="difference")
    if (low, high) != (1, 1):
        name, do = f"{name}-{low:g}-{high:g}", WeightedBands(low=low, high=high)
    gate = Gate(probe="partner", leads=leads, halves=halves, last=1)
    return Policy(
        name=name,
        cadence=Cadence(interval=interval, counting="up", timesteps=timesteps, gate=gate),
        rules=(Rule(sites=("model",), do=do),),
    )
