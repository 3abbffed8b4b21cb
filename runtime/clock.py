"""Which step is this call?

With a scheduler (or timesteps) the step is looked up; with a step count only, changes of the timestep are counted. A
timestep on the CPU is simply read. On an accelerator reading waits for the device, so the step comes from the scheduler
where possible: from the place of the timestep tensor inside ``scheduler.timesteps``, or, after the first call of a run,
from its step index.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from dicompile.errors import CallOutsideSchedule, InvalidSchedule
from dicompile.plan import Stint, TimestepSchedule
from dicompile.runtime.contexts import is_near, is_same_latent
from dicompile.runtime.session import Count, ModelState

log = logging.getLogger("dicompile")


class SchedulerLink:
    """Where the schedule comes from: a diffusers scheduler, the one that a pipeline has just now, or fixed data.

    Args:
        source: any of these.
        stint: the steps that the model has, where it shares the schedule with other denoisers that its policy knows.
    """

    def __init__(self, source: Any, stint: Stint | None = None) -> None:
        self._source, self._stint = source, stint
        self.is_pipeline = hasattr(source, "scheduler")
        self.is_live = hasattr(self.source, "timesteps") and hasattr(self.source, "config")
        self._token: object = None
        self._schedule: TimestepSchedule | None = None if self.is_live else TimestepSchedule.of(source)

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerLink:
        """A copy of a model follows the same scheduler, or, where its pipeline is copied with it, the copy's."""
        link = copy.copy(self)
        link._source, link._token = memo.get(id(self._source), self._source), None
        return link

    @property
    def source(self) -> Any:
        """The scheduler or the data; users replace the scheduler of a pipeline after it was optimized."""
        return self._source.scheduler if self.is_pipeline else self._source

    @property
    def counts(self) -> bool:
        """True if the scheduler counts its evaluations."""
        return self.is_live and hasattr(self.source, "step_index")

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
            try:
                self._schedule = TimestepSchedule.of(self.source)
            except InvalidSchedule as error:
                if self.is_pipeline:
                    raise InvalidSchedule(error.what, where=error.where, why=error.why, fix=self.remedy) from None
                raise
            self._token = self.source.timesteps
        assert self._schedule is not None
        return self._schedule

    @property
    def whole(self) -> SchedulerLink:
        """The same for a model that may have any step."""
        link = copy.copy(self)
        link._stint = None
        return link

    @property
    def planned(self) -> TimestepSchedule:
        """What of the schedule is planned: all of it, or the steps that the model has."""
        return self.schedule if self._stint is None else self.schedule.served(self._stint)

    def rest(self, step: int) -> TimestepSchedule:
        """What is planned for a run that begins at a step of the whole schedule."""
        planned = self.planned
        return planned.rest(step - planned.before)

    def check_served(self, step: int) -> None:
        """Raise if a step of the whole schedule is another denoiser's.

        Raises:
            CallOutsideSchedule: it is.
        """
        if self._stint is None or step in self._stint.steps:
            return
        raise CallOutsideSchedule(
            f"{self._stint.component} was called at step {step + 1}, and its policy is for {self._stint}",
            where=f"{self.schedule.steps} steps",
            why="the denoisers took over from each other at another step when they were calibrated",
            fix="sample as in the calibration (boundary_ratio), or calibrate as you sample",
        )

    @property
    def remedy(self) -> str:
        """What to do where calls do not follow the scheduler."""
        if not self.is_pipeline:
            return "optimize with the scheduler that drives the sampling, after its set_timesteps"
        return (
            f"sample with the {type(self._source).__name__} that was optimized, or its scheduler; another pipeline "
            "around the same model with a scheduler of its own is optimized, too: dicompile.optimize(other, policy)"
        )

    def follows(self, pipeline: Any) -> bool:
        """True unless this is the scheduler of another pipeline, and `pipeline` has one of its own."""
        return not self.is_pipeline or self.source is pipeline.scheduler

    @property
    def position(self) -> int | None:
        """Evaluation that a live scheduler stands at, as far as it counts them and is not past its end."""
        if not self.is_live:
            return None
        position = getattr(self.source, "step_index", None)
        if position is None:
            position = getattr(self.source, "begin_index", None)
        return None if position is None or position >= self.schedule.steps else int(position)

    def place(self, timestep: torch.Tensor) -> int | None:
        """Evaluation whose entry of the scheduler's timesteps this tensor is a view of, if it is one."""
        table = self.source.timesteps if self.is_live else None
        if not isinstance(table, torch.Tensor) or not table.is_contiguous() or _differs(table, timestep):
            return None
        start = timestep.data_ptr() - table.data_ptr()
        return start // table.element_size() if 0 <= start < table.numel() * table.element_size() else None


class OutsideSchedule(Exception):
    """A call that belongs to no step: it computes everything and remembers nothing.

    Args:
        why: for the log.
    """


def find_step(
    state: ModelState,
    link: SchedulerLink,
    timestep: torch.Tensor | float | None,
    context: str,
    latent: torch.Tensor | None = None,
    ahead: Count | None = None,
) -> int:
    """Step of this call. Begins a new generation in `state` where one starts.

    Args:
        state: what is known of the calls before.
        link: where the schedule comes from.
        timestep: what the model receives, or None if it takes none.
        context: name of the guidance context.
        latent: what the model denoises; tells two evaluations at one timestep from two guidance partners.
        ahead: where steps are counted: how far another model has come on the same schedule.

    Raises:
        CallOutsideSchedule: the timestep is not on the schedule, or there are more steps than it has.
        OutsideSchedule: samples of the batch are at different steps, or only part of the latent went on.
    """
    if state.schedule_token is not link.token:
        state.begin(link.token)
    call = _Call(state, link, context, latent, ahead)
    step, value, times = call.step_and_timestep(timestep)
    is_foreign = state.is_foreign
    if state.step is not None and step < state.step:
        state.begin(link.token)
    elif times is not None and call.went_on_in_part(step, value, times):
        state.times, state.is_in_part = times.clone(), True
        raise OutsideSchedule("part of the latent went on to another timestep, and the largest one stayed")
    if times is not None and times.numel() > 1:
        state.times = times.clone()
    state.timestep, state.position, state.is_foreign, state.is_in_part = value, call.position, is_foreign, False
    return step


class _Call:
    """One call of the model, and what is known about its step."""

    def __init__(
        self, state: ModelState, link: SchedulerLink, context: str, latent: torch.Tensor | None, ahead: Count | None
    ) -> None:
        self.state, self.link, self.context, self.latent, self.ahead = state, link, context, latent, ahead
        self.schedule, self.position = link.schedule, link.position
        self.is_rounded = False

    def step_and_timestep(self, timestep: torch.Tensor | float | None) -> tuple[int, float | None, torch.Tensor | None]:
        """Step of the call, and the timestep if it had to be read: the largest one, and all of it."""
        state = self.state
        if timestep is None:
            return _count_call(state, self.schedule), None, None
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        place = self.link.place(timestep)
        if timestep.device.type != "cpu":
            index = place if place is not None or state.step is None else self.position
            if index is not None and not (index == state.step and self.context in state.calls):
                return index, None, None
        self.is_rounded = timestep.is_floating_point() and timestep.dtype.itemsize < 4
        value = _largest(timestep, self.latent)
        if place is not None:
            return place, value, timestep
        if self.schedule.timesteps:
            return self.by_position(value), value, timestep
        return _count_change(state, self.link, self.schedule, value, self.ahead), value, timestep

    def went_on_in_part(self, step: int, value: float | None, times: torch.Tensor) -> bool:
        """True if the timestep is another one than at a call before, but its largest value, which counts, is not."""
        before = self.state.times
        if before is None or step != self.state.step or value != self.state.timestep or before.shape != times.shape:
            return False
        return self.state.is_in_part or (before.device == times.device and not torch.equal(before, times))

    def by_position(self, value: float) -> int:
        """Step by the scheduler's position where it has moved since the last call, or else by the timestep.

        What a model receives is often not the scheduler's timestep: it was rounded, so that neighbours are one number,
        or is another function of it (``1 - t / 1000``, ``t - 1``). Only a timestep that is exactly another step's
        overrules the position: then the scheduler is stepped more often than the model is called.
        """
        state, position, schedule = self.state, self.position, self.schedule
        if state.step is not None and (position is None or position == state.position):
            is_partner = state.timestep in (None, value) and (position is not None or state.is_foreign)
            return state.step if is_partner else self.by_timestep(value)
        if position is None:
            return self.by_timestep(value)
        if state.is_foreign or schedule.is_at(value, position, is_rounded=self.is_rounded):
            return position
        if state.step is None:
            state.is_foreign = True
            return position
        return self.by_timestep(value) if schedule.is_exact(value) and not self.is_rounded else position

    def by_timestep(self, value: float) -> int:
        """Step by the place of the timestep on the schedule."""
        state, schedule = self.state, self.schedule
        after = state.step
        if after is not None and (value != state.timestep or self.is_another_evaluation(after, value)):
            after += 1
        if self.is_rounded and state.timestep is not None and schedule.goes_back(state.timestep, value):
            after = None
        step = schedule.step_of(value, after, is_rounded=self.is_rounded)
        if step is None and state.step is None and self.link.counts:
            state.is_foreign = True
            return 0
        if step is None:
            first, last = schedule.timesteps[0], schedule.timesteps[-1]
            raise CallOutsideSchedule(
                f"the model was called at timestep {value:g}, which is not on the schedule",
                where=f"{schedule.steps} steps from {first:g} to {last:g}",
                why="the policy's plan has no step for it",
                fix=self.link.remedy,
            )
        return step

    def is_another_evaluation(self, step: int, value: float) -> bool:
        """True if a sampler of second order comes back to the timestep of a step, with another latent.

        The same where a timestep and the next one are rounded to one number; then the latent has to be near, since
        windows of a film have other ones at the same step.
        """
        if self.context not in self.state.calls:
            return False
        kept = [c.latent for c in self.state.contexts.values() if c.name == self.context and c.step == step]
        if not kept or any(is_same_latent(self.latent, latent) for latent in kept):
            return False
        if self.schedule.is_repeated(step):
            return True
        is_rounded_alike = self.is_rounded and self.schedule.is_at(value, step + 1, is_rounded=True)
        return is_rounded_alike and any(is_near(self.latent, latent) for latent in kept)


def _largest(timestep: torch.Tensor, latent: torch.Tensor | None) -> float:
    """The timestep of a call: of frames or tokens at several, as in films that go on from given ones, the largest.

    Raises:
        OutsideSchedule: samples of the batch are at different steps.
    """
    if timestep.ndim == 0 or latent is None or timestep.shape[0] != latent.shape[0] or timestep.shape[0] == 1:
        return float(timestep.max())
    rows = timestep.flatten(1).amax(1).tolist() if timestep.ndim > 1 else timestep.tolist()
    if any(row != rows[0] for row in rows):
        raise OutsideSchedule(f"samples of one batch are at different timesteps: {', '.join(f'{r:g}' for r in rows)}")
    return float(rows[0])


def _differs(table: torch.Tensor, timestep: torch.Tensor) -> bool:
    """True if a timestep cannot be a single entry of the table, seen once per sample."""
    same_kind = table.device == timestep.device and table.dtype == timestep.dtype
    return not same_kind or any(n > 1 and stride for n, stride in zip(timestep.shape, timestep.stride(), strict=True))


def _count_call(state: ModelState, schedule: TimestepSchedule) -> int:
    """Without any timestep every call is a step."""
    following = 0 if state.step is None else state.step + 1
    return following if following < schedule.steps else 0


def _count_change(
    state: ModelState, link: SchedulerLink, schedule: TimestepSchedule, value: float, ahead: Count | None
) -> int:
    if state.step is None:
        return _joined(schedule, value, ahead)
    if value == state.timestep:
        return state.step
    if state.timestep is None:  # Dynamo made a constant of the timestep before
        return min(state.step + 1, schedule.steps - 1)
    direction = 1 if value > state.timestep else -1
    if schedule.steps == 1 or (state.direction and direction != state.direction):
        if state.step + 1 < schedule.steps and ahead is None:
            log.warning("the last run made %d of %d planned steps", state.step + 1, schedule.steps)
        state.begin(link.token)
        return _joined(schedule, value, ahead)
    state.direction = direction
    if state.step + 1 >= schedule.steps:
        raise CallOutsideSchedule(
            f"this is step {state.step + 2} of a schedule of {schedule.steps} steps",
            where=f"timestep {value:g} after {state.timestep:g}",
            why="the policy's plan ends here",
            fix="give the number of steps that the sampler makes, or its scheduler",
        )
    return state.step + 1


def _joined(schedule: TimestepSchedule, value: float, ahead: Count | None) -> int:
    """Step at which a model begins: the first one, or where another expert for the same schedule has come to."""
    if ahead is None or (value - ahead.timestep) * (ahead.direction or -1) < 0:
        return 0
    step = ahead.step + (value != ahead.timestep)
    return step if step < schedule.steps else 0
