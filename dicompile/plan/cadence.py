"""Cadences: which steps of a run compute everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from dicompile.plan.frozen import Frozen


class Window(Frozen):
    """A stretch of the schedule with an interval of its own.

    Attributes:
        start: first step index as a fraction of the number of steps.
        end: first step index after it, as a fraction.
        interval: steps from one full step to the next inside it.
    """

    start: Annotated[float, Field(ge=0, le=1)]
    end: Annotated[float, Field(ge=0, le=1)]
    interval: PositiveInt


class Cadence(Frozen):
    """Which steps compute everything.

    With ``s`` the step index (counted as `counting` says), ``S`` the number of steps and ``q = s / S``, a step is full
    if it is among the first `warmup` ones or if ``s`` is a multiple of the interval set by the latest full step,
    ``round(interval / (1 + stretch * (1 - 2 q)))`` or that of `dense`.

    Attributes:
        interval: steps from one full step to the next; 1 computes always.
        counting: "down": s = S-1 .. 0, as DDIM code counts; "up": s = 0 .. S-1.
        anchor: "index": multiples of the interval are full; "last": every interval-th step after the latest full one.
        warmup: number of steps at the start that are always full.
        stretch: how much the interval changes over the run, unitless.
        dense: part of the run with an interval of its own.
        at: numbers of the full steps, counted from 0; then no other rule holds.
        decide: "step": once for all blocks. "block": again in every block, as the reference code of ToCa does; where
            the interval changes, the first block is then full and the others are not.
    """

    interval: PositiveInt = 1
    counting: Literal["down", "up"] = "down"
    anchor: Literal["index", "last"] = "index"
    warmup: PositiveInt = 1
    stretch: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    dense: Window | None = None
    at: tuple[NonNegativeInt, ...] = ()
    decide: Literal["step", "block"] = "step"

    def index(self, step: int, steps: int) -> int:
        """Step index s of the step-th call."""
        return steps - 1 - step if self.counting == "down" else step

    def moments(self, steps: int, begin: int = 0) -> tuple[Moment, ...]:
        """What every step of a run is.

        Args:
            steps: number of steps of the schedule.
            begin: step at which the run begins; the warmup follows it, everything else keeps its place.
        """
        current, latest, result = self.interval, begin, []
        for step in range(begin, steps):
            index = self.index(step, steps)
            warm = step - begin < self.warmup
            first = warm or self._residue(index, step - latest, current) == 0
            if self.at:
                first = step == begin or step in self.at
            if first:
                current, latest = self._interval_at(index, steps), step
            residue = self._residue(index, step - latest, current)
            again = self.decide == "step" or warm or residue == 0
            result.append(Moment(step, steps, index / steps, first, first and again, residue))
        return tuple(result)

    def _residue(self, index: int, since: int, interval: int) -> int:
        return (index if self.anchor == "index" else since) % interval

    def _interval_at(self, index: int, steps: int) -> int:
        window = self.dense
        if window is not None and int(window.start * steps) <= index < int(window.end * steps):
            return window.interval
        factor = 1 + self.stretch - 2 * self.stretch * index / steps
        return max(1, int(np.rint(np.float32(self.interval / factor))))


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a run, as a cadence sees it.

    Attributes:
        step: number, counted from 0.
        steps: number of steps of the run.
        q: step index over number of steps, counted as the cadence counts.
        first: whether the first block is full.
        others: whether the other blocks are.
        residue: step index modulo the current interval.
    """

    step: int
    steps: int
    q: float
    first: bool
    others: bool
    residue: int

    def is_full(self, block: int) -> bool:
        """Whether a block computes everything."""
        return self.first if block == 0 else self.others
