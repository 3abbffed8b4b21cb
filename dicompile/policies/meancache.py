"""MeanCache: the velocity is forecast from the average one of the last steps, at published steps."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from dicompile.errors import InvalidPolicy
from dicompile.plan import Cadence, Policy, Rule, Velocity

STEPS = 50


class Published(NamedTuple):
    """A schedule of 50 steps that the authors searched for one model.

    Attributes:
        full: numbers of the steps that compute, counted from 0.
        back: over how many steps the average is taken, for every gap between them, in order.
    """

    full: tuple[int, ...]
    back: tuple[int, ...]


SCHEDULES = {
    "qwen-image": (
        Published((*range(17), 24, 32, 40, 43, 45, 47, 48, 49), (1, 1, 1, 5, 5, 5)),
        Published((*range(9), 10, 17, 24, 31, 38, 45, 48, 49), (2, 1, 1, 1, 1, 1, 4)),
        Published((0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (2, 1, 1, 1, 1, 1, 1, 4)),
    ),
    "qwen-image-2512": (
        Published((*range(16), 23, 31, 37, 44, 45, 46, 47, 48, 49), (2, 2, 2, 1)),
        Published((*range(10), 11, 19, 27, 35, 43, 47, 49), (2, 1, 1, 1, 1, 5, 5)),
        Published((0, 2, 4, 7, 14, 21, 28, 35, 42, 49), (1, 3, 1, 1, 1, 1, 1, 1, 4)),
    ),
    "z-image": (
        Published(
            (*range(7), 8, 10, 11, 12, 13, 15, 16, 17, 18, 20, 22, 29, 37, 42, 45, 47, 48, 49),
            (2, 2, 2, 5, 5, 1, 1, 1, 5, 5),
        ),
        Published(
            (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49),
            (2, 2, 2, 2, 2, 5, 4, 5, 5, 1, 1, 1, 5, 2),
        ),
        Published((0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 19, 27, 35, 43, 46, 48, 49), (2, 2, 2, 2, 2, 1, 1, 1, 1, 5, 2)),
        Published((0, 1, 2, 3, 5, 7, 10, 12, 17, 25, 33, 41, 45, 48, 49), (2, 2, 2, 2, 1, 1, 1, 1, 5, 4)),
        Published((0, 1, 2, 3, 5, 9, 15, 22, 29, 36, 43, 47, 49), (2, 1, 1, 1, 1, 1, 1, 5, 2)),
    ),
}
"""By model, as in the code of the authors."""


def MeanCache(model: str = "qwen-image", budget: int = 17) -> Policy:
    """Forecast what the model returns, a velocity, from the average one by which the latent has moved.

    For flow matching with Euler's method in 50 steps; nothing of the model runs at the other steps. Weights follow from
    the timesteps (`Velocity`). The authors forecast the velocity after guidance, here each guidance partner has its own
    forecast; where guidance is linear that is the same, and where it is scaled to the conditional half's norm, as for
    Qwen-Image, the norms are those of forecasts. Z-Image is called with a list of latents, and fits where that has one
    entry, so without guidance.

    Args:
        model: for which a schedule was published: "qwen-image", "qwen-image-2512", "z-image".
        budget: steps that compute: 25, 17 or 10 for Qwen-Image; 25, 20, 17, 15 or 13 for Z-Image.

    Raises:
        InvalidPolicy: no such schedule was published.

    Reference:
        Gao et al., MeanCache: From Instantaneous to Average Velocity for Accelerating Flow Matching Inference,
        arXiv 2601.19961, and its code.
    """
    known = {len(schedule.full): schedule for schedule in SCHEDULES.get(model, ())}
    if budget not in known:
        published = "; ".join(
            f"{name}: {', '.join(str(len(each.full)) for each in own)}" for name, own in SCHEDULES.items()
        )
        raise InvalidPolicy(
            f"no schedule of {budget} steps is known for {model!r}",
            where="MeanCache",
            why="schedules are searched for one model and one number of steps",
            fix=f"use one of these ({published}), or write one: Cadence(at=...) and Velocity(back=...)",
        )
    return Policy(
        name=f"meancache-{model}-{budget}",
        cadence=Cadence(at=known[budget].full),
        rules=(Rule(sites=("model",), do=Velocity(back=_per_step(known[budget]))),),
    )


def _per_step(schedule: Published) -> tuple[int, ...]:
    """How far every step looks back; those that compute say 1."""
    back, gaps = [1] * STEPS, iter(schedule.back)
    for start, end in itertools.pairwise(schedule.full):
        if end - start > 1:
            back[start + 1 : end] = [next(gaps)] * (end - start - 1)
    return tuple(back)
