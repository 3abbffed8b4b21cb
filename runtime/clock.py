"""Which step is this call?

With a scheduler (or timesteps) the step is looked up; with a step count only, changes of the timestep are counted. A
timestep on the CPU is simply read. On an accelerator reading waits for the device, so the step comes from the scheduler
where possible: from its step index, or from the place of the timestep tensor inside ``scheduler.timesteps``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from dicompile.errors import CallOutsideSchedule
from dicompile.plan import TimestepSchedule
from dicompile.runtime.session import ModelState

log = logging.getLogger("dicompile")


class SchedulerLink:
    """Where the schedule comes from: a diffusers scheduler, the one that a pipeline has just now, or fixed data."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._is_pipeline = hasattr(source, "scheduler")
        self.is_live = hasattr(self.source, "timesteps") and hasattr(self.source, "config")
        self._token: object = None
        self._schedule: TimestepSchedule | None = None if self.is_live else TimestepSchedule.of(source)

    @property
    def source(self) -> Any:
        """The scheduler or the data; users replace the scheduler of a pipeline after it was optimized."""
        return self._source.scheduler if self._is_pipeline else self._source

    @property
    def token(self) -> object:
        """Changes identity whenever the scheduler's timesteps are set anew."""
        return self.source.timesteps if self.is_live else self._schedule

    @property
    def schedule(self) -> TimestepSchedule:
        """The schedule as it is now.

        Raises:
            InvalidSchedule: the scheduler has no timesteps yet.
        """
        if self.is_live and self._token is not self.source.timesteps:
            self._schedule = TimestepSchedule.of(self.source)
            self._token = self.source.timesteps
        assert self._schedule is not None
        return self._schedule

    def among_equals(self, step: int) -> int:
        """The evaluation that a live scheduler stands at, if it has the timestep of `step`.

        Samplers of second order evaluate a timestep twice, which looks like a guidance partner otherwise.
        """
        index = getattr(self.source, "step_index", None) if self.is_live else None
        timesteps = self.schedule.timesteps
        if index is None or index >= len(timesteps) or timesteps[index] != timesteps[step]:
            return step
        return int(index)

    def index_without_reading(self, timestep: torch.Tensor) -> int | None:
        """Step of a timestep on an accelerator, from host-side facts only; None if there are none."""
        if not self.is_live:
            return None
        table = self.source.timesteps
        if isinstance(table, torch.Tensor) and table.device == timestep.device and table.dtype == timestep.dtype:
            start = timestep.data_ptr() - table.data_ptr()
            if 0 <= start < table.numel() * table.element_size():
                return start // table.element_size()
        if hasattr(self.source, "step_index"):
            begin = getattr(self.source, "begin_index", None) or 0
            return begin if self.source.step_index is None else int(self.source.step_index)
        return None


def find_step(state: ModelState, link: SchedulerLink, timestep: torch.Tensor | None, context: str) -> int:
    """Step of this call. Begins a new generation in `state` where one starts.

    Raises:
        CallOutsideSchedule: the timestep is not on the schedule, or there are more steps than it has.
    """
    if state.schedule_token is not link.token:
        state.begin(link.token)
    schedule = link.schedule
    step, value = _look_up(state, link, schedule, timestep, context)
    if state.step is not None and step < state.step:
        state.begin(link.token)
    state.timestep = value
    return step


def _look_up(
    state: ModelState, link: SchedulerLink, schedule: TimestepSchedule, timestep: torch.Tensor | None, context: str
) -> tuple[int, float | None]:
    if timestep is None:
        return _count_call(state, schedule), None
    if timestep.device.type != "cpu":
        index = link.index_without_reading(timestep)
        if index is not None and not (index == state.step and context in state.calls):
            return index, None
    value = float(timestep.max().item())
    if schedule.timesteps:
        return link.among_equals(_find_value(state, schedule, value)), value
    return _count_change(state, link, schedule, value), value


def _count_call(state: ModelState, schedule: TimestepSchedule) -> int:
    """Without any timestep every call is a step."""
    following = 0 if state.step is None else state.step + 1
    return following if following < schedule.steps else 0


def _find_value(state: ModelState, schedule: TimestepSchedule, value: float) -> int:
    after = state.step
    if after is not None and value != state.timestep:
        after += 1
    step = schedule.step_of(value, after)
    if step is None:
        first, last = schedule.timesteps[0], schedule.timesteps[-1]
        raise CallOutsideSchedule(
            f"the model was called at timestep {value:g}, which is not on the schedule",
            where=f"{schedule.steps} steps from {first:g} to {last:g}",
            why="the policy's plan has no step for it",
            fix="optimize with the scheduler that drives the sampling, after its set_timesteps",
        )
    return step


def _count_change(state: ModelState, link: SchedulerLink, schedule: TimestepSchedule, value: float) -> int:
    if state.step is None or state.timestep is None or value == state.timestep:
        return state.step or 0
    direction = 1 if value > state.timestep else -1
    if schedule.steps == 1 or (state.direction and direction != state.direction):
        if state.step + 1 < schedule.steps:
            log.warning("the last run made %d of %d planned steps", state.step + 1, schedule.steps)
        state.begin(link.token)
        return 0
    state.direction = direction
    if state.step + 1 >= schedule.steps:
        raise CallOutsideSchedule(
            f"this is step {state.step + 2} of a schedule of {schedule.steps} steps",
            where=f"timestep {value:g} after {state.timestep:g}",
            why="the policy's plan ends here",
            fix="give the number of steps that the sampler makes, or its scheduler",
        )
    return state.step + 1
