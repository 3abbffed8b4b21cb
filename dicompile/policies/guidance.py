"""Guidance reuse: late in the run, what tells the unconditional half from the conditional one hardly changes."""

from __future__ import annotations

from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule


def GuidanceReuse(interval: int = 5, timesteps: tuple[float, float] = (-1, 641), leads: str = "cond") -> Policy:
    """Add to the output of the conditional half the difference that the other half had to it at the last full step.

    For pipelines that call both halves one by one, under names (`dicompile.cache_context`; those of diffusers do):
    "cond", then "uncond". The first one always runs, and a half that joins late, or was not paired at its last full
    step, does. The last step is full. Pipelines with both halves in one batch get nothing from it.

    In FasterCache the low and high frequencies of the difference have weights of their own, and attention is reused,
    too; here both weights are 1, and attention is computed.

    Args:
        interval: steps from one full step of the other half to the next.
        timesteps: where it is reused, as the scheduler counts them: the second half of the run.
        leads: name of the half that is computed at every step.

    Reference:
        Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355,
        section on CFG-Cache; defaults are those of diffusers.
    """
    gate = Gate(probe="partner", leads=leads, last=1)
    return Policy(
        name=f"guidance-reuse-{interval}",
        cadence=Cadence(interval=interval, counting="up", timesteps=timesteps, gate=gate),
        rules=(Rule(sites=("model",), do=Reuse(what="difference")),),
    )
