"""Cadences: which steps of a run compute everything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from dicompile.plan.frozen import Frozen
from dicompile.plan.gate import Gate

ROUNDING = 1e-9
"""What sums of fractions may lack to a whole number."""


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


class Magnitudes(Frozen):
    """Full steps where what is recalled has grown too much: a table says by how much it grows from step to step.

    ``ratio *= ratios[step]; error += |1 - ratio|``, from 1 and 0 after every full step; the next step is full where the
    error is above `threshold`, or `longest` steps were recalled.

    Attributes:
        ratios: per step, mean over tokens of the norm of what the blocks add over that at the step before; for other
            numbers of steps than it has entries, the nearest one is taken.
        threshold: of the error, unitless.
        longest: most steps in a row that are recalled.
        retention: share of the steps at the start that are full.
        always: numbers of entries at which a step is full, whatever they say.

    Reference:
        Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045, section 3.
    """

    ratios: Annotated[tuple[float, ...], Field(min_length=1)]
    threshold: Annotated[float, Field(ge=0)]
    longest: NonNegativeInt
    retention: Annotated[float, Field(ge=0, le=1)] = 0.2
    always: tuple[NonNegativeInt, ...] = ()

    def full(self, steps: int, begin: int = 0) -> frozenset[int]:
        """Numbers of the full steps of a run that begins at one of the schedule's; see `Cadence.moments`."""
        retained = int(self.retention * steps + 0.5)
        ratio, error, run, full = 1.0, 0.0, 0, {begin}
        for step in range(begin + 1, steps):
            entry = self._entry(step, steps)
            ratio *= self.ratios[entry]
            error, run = error + abs(1.0 - ratio), run + 1
            if step < retained or error > self.threshold or run > self.longest or entry in self.always:
                full.add(step)
                ratio, error, run = 1.0, 0.0, 0
        return frozenset(full)

    def _entry(self, step: int, steps: int) -> int:
        return round(step * (len(self.ratios) - 1) / (steps - 1))


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
        growth: by how much the interval grows with every full step after the warmup; it is rounded down.
        dense: part of the run with an interval of its own.
        at: numbers of the full steps, counted from 0; then no other rule holds.
        magnitudes: a table that says which steps are full; then no other rule holds.
        timesteps: between these two timesteps, as the scheduler counts them, the rules hold; all other steps are full.
        gate: decides while sampling about all steps but those of `warmup`, or of `at`; then no interval holds. One that
            waits for a partner decides about those that are not full anyway.
        decide: "step": once for all blocks. "block": again in every block, as the reference code of ToCa does; where
            the interval changes, the first block is then full and the others are not.
    """

    interval: PositiveInt = 1
    counting: Literal["down", "up"] = "down"
    anchor: Literal["index", "last"] = "index"
    warmup: PositiveInt = 1
    stretch: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    growth: Annotated[float, Field(ge=0)] = 0.0
    dense: Window | None = None
    at: tuple[NonNegativeInt, ...] = ()
    magnitudes: Magnitudes | None = None
    timesteps: tuple[float, float] | None = None
    gate: Gate | None = None
    decide: Literal["step", "block"] = "step"

    def index(self, step: int, steps: int) -> int:
        """Step index s of the step-th call."""
        return steps - 1 - step if self.counting == "down" else step

    def moments(self, steps: int, begin: int = 0, timesteps: Sequence[float] = ()) -> tuple[Moment, ...]:
        """What every step of a run is.

        Args:
            steps: number of steps of the schedule.
            begin: step at which the run begins; the warmup follows it, everything else keeps its place.
            timesteps: of the run, as the scheduler counts them, if they are known.
        """
        current, latest, grown, result = self.interval, begin, 0.0, []
        listed = self._listed(steps, begin)
        for step in range(begin, steps):
            index = self.index(step, steps)
            warm = step - begin < self.warmup or self._is_outside(timesteps, step - begin)
            if listed is not None:
                first = step == begin or step in listed
            elif self.gate is not None and self.gate.probe != "partner":
                first = warm or step >= steps - self.gate.last
            else:
                ends = self.gate is not None and step >= steps - self.gate.last
                first = warm or ends or self._residue(index, step - latest, current) == 0
            if first:
                grown += 0.0 if warm else self.growth
                current, latest = self._interval_at(index, steps) + int(grown + ROUNDING), step
            residue = self._residue(index, step - latest, current)
            again = self.decide == "step" or warm or residue == 0
            gated = self.gate is not None and not first
            result.append(Moment(step, steps, index / steps, first, first and again, residue, gated))
        return tuple(result)

    def _listed(self, steps: int, begin: int) -> Collection[int] | None:
        """Numbers of the full steps, where no other rule holds."""
        return self.magnitudes.full(steps, begin) if self.magnitudes is not None else self.at or None

    def _is_outside(self, timesteps: Sequence[float], step: int) -> bool:
        if self.timesteps is None or step >= len(timesteps):
            return False
        return not min(self.timesteps) < timesteps[step] < max(self.timesteps)

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
        gated: whether a gate may make it full all the same.
    """

    step: int
    steps: int
    q: float
    first: bool
    others: bool
    residue: int
    gated: bool = False

    def is_full(self, block: int) -> bool:
        """Whether a block computes everything."""
        return self.first if block == 0 else self.others
