"""FORA: everything every few steps, everything reused between."""

from __future__ import annotations

from dicompile.plan import Cadence, Policy, Reuse, Rule


def FORA(interval: int = 3) -> Policy:
    """Fast-forward caching: a fixed period, branch outputs stored before their gates and gated anew.

    A step is full if it is the first one or if its index, counted down to 0 at the last step, is a multiple of
    `interval`.

    Args:
        interval: steps from one full step to the next.

    Reference:
        Selvaraju et al., FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425, section 3.
    """
    return Policy(name=f"fora-{interval}", cadence=Cadence(interval=interval), rules=(Rule(do=Reuse()),))
