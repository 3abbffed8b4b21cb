"""MagCache: the whole stack is reused until what it adds has grown too much, as a table says ahead."""

from __future__ import annotations

from collections.abc import Sequence

from dicompile.errors import InvalidPolicy
from dicompile.plan import Cadence, Magnitudes, Policy, Reuse, Rule

RATIOS = {
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
        1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
        0.89062,
    ),
}  # fmt: skip
"""Published tables by model: "flux" is FLUX.1-dev in 28 steps."""

ALWAYS = {"flux": (11,)}
"""Entries of these tables at which the reference code computes everything, whatever they say."""


def MagCache(
    ratios: str | Sequence[float] = "flux", threshold: float = 0.24, longest: int = 5, retention: float = 0.1
) -> Policy:
    """Add what all blocks together added at the last full step, until a table of magnitudes says that it has changed.

    The table does not depend on the picture, so the plan is fixed before the run.

    Args:
        ratios: per step, by how much what the blocks add grows from the step before (`Magnitudes`), or the name of a
            model for which a table was published: "flux". By name, the 12th of 28 steps is full in any case, as in the
            reference code for FLUX.
        threshold: of the accumulated error, unitless; published are 0.24, and 0.12 for less speed.
        longest: most steps in a row that are reused.
        retention: share of the steps at the start that are full.

    Raises:
        InvalidPolicy: no table of this name was published.

    Reference:
        Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045, section 3.
    """
    always: tuple[int, ...] = ()
    if isinstance(ratios, str):
        if ratios not in RATIOS:
            raise InvalidPolicy(
                f"no magnitudes of {ratios!r} are known",
                where="MagCache",
                why="they are measured for one model",
                fix=f"use one of: {', '.join(RATIOS)}; or give the ratios themselves",
            )
        always, ratios = ALWAYS[ratios], RATIOS[ratios]
    table = Magnitudes(ratios=tuple(ratios), threshold=threshold, longest=longest, retention=retention, always=always)
    return Policy(
        name=f"magcache-{threshold:g}",
        cadence=Cadence(magnitudes=table),
        rules=(Rule(sites=("stack",), do=Reuse(what="update")),),
    )
