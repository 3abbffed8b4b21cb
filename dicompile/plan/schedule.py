"""The timesteps at which a sampler calls the model, and which of them one of several denoisers serves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt

from dicompile.errors import InvalidSchedule
from dicompile.plan.frozen import Frozen

SAME = 1e-3
ROUNDING = 2.0**-7
"""Relative error of a number that was rounded to bfloat16 twice, as FLUX does it before and after a division."""


class Stint(Frozen):
    """The steps of a run that one denoiser of a pipeline serves, where several take over from each other.

    Attributes:
        component: its name in the pipeline, "transformer_2".
        first: number of its first step in the whole schedule, counted from 0.
        end: number of the first step after it.
    """

    component: str
    first: NonNegativeInt
    end: PositiveInt

    @property
    def steps(self) -> range:
        """Their numbers."""
        return range(self.first, self.end)

    def __str__(self) -> str:
        return f"{self.component} at steps {self.first + 1} to {self.end}"


def follow_each_other(stints: Sequence[Stint]) -> bool:
    """True if each begins where the one before ends, and none is another one's again."""
    in_order = all(stint.first < stint.end for stint in stints)
    meet = all(before.end == after.first for before, after in itertools.pairwise(stints))
    return in_order and meet and len({stint.component for stint in stints}) == len(stints)


@dataclass(frozen=True, slots=True)
class TimestepSchedule:
    """One entry per evaluation of the model, in calling order.

    Attributes:
        steps: number of evaluations.
        timesteps: their timesteps as the scheduler counts them; empty when only the number is known.
        scales: factors by which pipelines are known to divide timesteps before they reach the model.
        before: evaluations of the same schedule that the run leaves out at its start, as image to image does.
        after: evaluations of the same schedule that another denoiser has, after this one.
    """

    steps: int
    timesteps: tuple[float, ...] = ()
    scales: tuple[float, ...] = (1.0, 1000.0)
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.timesteps and len(self.timesteps) != self.steps):
            raise InvalidSchedule(
                f"a schedule of {self.steps} steps with {len(self.timesteps)} timesteps",
                where="TimestepSchedule",
                fix="give at least one step and one timestep per step",
            )

    @classmethod
    def of(cls, source: Any) -> TimestepSchedule:
        """Schedule from a step count, a sequence of timesteps, a diffusers scheduler, or a schedule.

        Raises:
            InvalidSchedule: the scheduler has no timesteps yet, or the source is something else.
        """
        if isinstance(source, TimestepSchedule):
            return source
        if isinstance(source, int) and not isinstance(source, bool):
            return cls(source)
        timesteps = getattr(source, "timesteps", source)
        # Until set_timesteps, most schedulers have None there, the flow-matching ones nothing at all.
        if hasattr(source, "config") and getattr(source, "num_inference_steps", None) is None:
            raise InvalidSchedule(
                f"{type(source).__name__} has no inference timesteps yet",
                where="TimestepSchedule.of",
                why="set_timesteps was not called",
                fix="call scheduler.set_timesteps(steps) before the first call of the model",
            )
        values = _numbers(timesteps)
        if values is None:
            raise InvalidSchedule(
                f"cannot read a schedule from {type(source).__name__}",
                where="TimestepSchedule.of",
                fix="give a number of steps, a list of timesteps, or a diffusers scheduler",
            )
        scale = float(getattr(getattr(source, "config", None), "num_train_timesteps", 1000) or 1000)
        return _shared(values, (1.0, scale))

    @property
    def numbers(self) -> range:
        """Numbers of its evaluations in the whole schedule."""
        return range(self.before, self.before + self.steps)

    @property
    def whole(self) -> int:
        """Number of evaluations of the whole schedule."""
        return self.before + self.steps + self.after

    def rest(self, first: int) -> TimestepSchedule:
        """The schedule of a run that begins at evaluation `first` of this one."""
        return _between(self, first, self.steps) if first else self

    def served(self, stint: Stint) -> TimestepSchedule:
        """What a denoiser has of this whole schedule; of a shorter one than its stint is for, what there is."""
        first = min(stint.first, self.steps - 1)
        return _between(self, first, max(first + 1, min(stint.end, self.steps)))

    def is_at(self, timestep: float, step: int, *, is_rounded: bool = False) -> bool:
        """True if the model receives `timestep` at evaluation `step`; see `step_of`."""
        return any(step in matches for matches in self._matches(timestep, is_rounded))

    def is_exact(self, timestep: float) -> bool:
        """True if a timestep is one of the schedule's without any rounding."""
        return any(abs(timestep * scale - entry) <= SAME for scale in self.scales for entry in self.timesteps)

    def is_repeated(self, step: int) -> bool:
        """True if the evaluation after `step` has the same timestep, as in samplers of second order."""
        return self.timesteps[step : step + 1] == self.timesteps[step + 1 : step + 2] != ()

    def goes_back(self, earlier: float, later: float) -> bool:
        """True if two timesteps follow each other the other way round than those of the schedule."""
        return bool(self.timesteps) and (later - earlier) * (self.timesteps[-1] - self.timesteps[0]) < 0

    def step_of(self, timestep: float, after: int | None, *, is_rounded: bool = False) -> int | None:
        """Index of the evaluation at `timestep`, or None if it is not on the schedule.

        Args:
            timestep: what the model received; may have been divided by one of `scales`, and rounded.
            after: first index that continues the run; of several evaluations at a timestep it is preferred, or else
                the nearest one, and the first of those, at which a run begins.
            is_rounded: it came in half precision, where neighbouring timesteps may be one number.
        """
        matches = self._matches(timestep, is_rounded)
        if any(after in steps for steps in matches):
            return after
        return min((steps[0] for steps in matches if steps), default=None)

    def _matches(self, timestep: float, is_rounded: bool) -> list[list[int]]:
        """Evaluations at a timestep that may have been divided by each of the scales, the nearest first."""
        if not is_rounded:
            found = [self._steps_at(timestep * scale, SAME * scale * 1e-3) for scale in self.scales]
            if any(found) or float(torch.tensor(timestep, dtype=torch.bfloat16)) != timestep:
                return found
        return [self._steps_near(timestep * scale) for scale in self.scales]

    def _steps_at(self, value: float, same: float) -> list[int]:
        distances = [abs(value - t) for t in self.timesteps]
        nearest = min(distances)
        if nearest > self._tolerance(distances.index(nearest)):
            return []
        return [i for i, distance in enumerate(distances) if distance <= nearest + same]

    def _steps_near(self, value: float) -> list[int]:
        distances = [abs(value - t) for t in self.timesteps]
        near = [i for i, t in enumerate(self.timesteps) if distances[i] <= max(abs(t) * ROUNDING, SAME)]
        return sorted(near, key=distances.__getitem__)

    def _tolerance(self, index: int) -> float:
        """A quarter of the distance to the next different timestep, at most the rounding of bfloat16."""
        here = self.timesteps[index]
        gaps = [abs(t - here) for t in self.timesteps if t != here]
        return min(0.25 * min(gaps, default=1.0), max(abs(here) * ROUNDING, SAME))


def _numbers(timesteps: Any) -> tuple[float, ...] | None:
    if hasattr(timesteps, "tolist"):
        timesteps = timesteps.tolist()
    if not isinstance(timesteps, Sequence) or isinstance(timesteps, str):
        return None
    try:
        return tuple(float(timestep) for timestep in timesteps)
    except (TypeError, ValueError):
        return None


@functools.lru_cache(maxsize=64)
def _shared(timesteps: tuple[float, ...], scales: tuple[float, ...]) -> TimestepSchedule:
    return TimestepSchedule(len(timesteps), timesteps, scales)


@functools.lru_cache(maxsize=64)
def _between(whole: TimestepSchedule, first: int, end: int) -> TimestepSchedule:
    return TimestepSchedule(
        end - first,
        whole.timesteps[first:end],
        whole.scales,
        whole.before + first,
        whole.after + whole.steps - end,
    )
