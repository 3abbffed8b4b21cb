from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.errors import InvalidSchedule
from dicompile.plan import Stint, TimestepSchedule

# diffusers 0.42 calls np.array on torch arithmetic, which numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def prepared(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


SCHEDULERS = {
    "ddim": lambda: prepared(DDIMScheduler(), 50),
    "dpm": lambda: prepared(DPMSolverMultistepScheduler(), 20),
    "flow": lambda: prepared(FlowMatchEulerDiscreteScheduler(shift=3.0), 28),
    "heun": lambda: prepared(HeunDiscreteScheduler(), 10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_gives_one_step_per_timestep_it_will_ask_for(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    schedule = TimestepSchedule.of(scheduler)
    assert schedule.timesteps == tuple(scheduler.timesteps.double().tolist())
    assert schedule.steps == len(scheduler.timesteps)
    assert schedule.scales == (1.0, 1000.0)


def test_a_second_order_scheduler_evaluates_more_often_than_it_steps() -> None:
    schedule = TimestepSchedule.of(SCHEDULERS["heun"]())
    assert schedule.steps == 19
    assert schedule.timesteps[1::2] == schedule.timesteps[2::2]


def test_the_scale_is_the_number_of_training_steps() -> None:
    assert TimestepSchedule.of(prepared(DDIMScheduler(num_train_timesteps=4000), 8)).scales == (1.0, 4000.0)


def test_a_number_of_steps_has_no_timesteps() -> None:
    assert TimestepSchedule.of(50) == TimestepSchedule(50, ())


@pytest.mark.parametrize(
    "source", [[999, 500, 1], (999.0, 500.0, 1.0), torch.tensor([999, 500, 1]), np.array([999.0, 500.0, 1.0])]
)
def test_timesteps_come_from_any_sequence_of_numbers(source: Any) -> None:
    schedule = TimestepSchedule.of(source)
    assert schedule == TimestepSchedule(3, (999.0, 500.0, 1.0))
    assert TimestepSchedule.of(schedule) is schedule
    assert hash(schedule) == hash(TimestepSchedule.of([999, 500, 1]))


@pytest.mark.parametrize(
    "source", ["50", None, True, 3.5, object(), ["a", "b"], [[1, 2], [3, 4]], torch.tensor(7), {"steps": 3}]
)
def test_what_is_no_schedule_is_refused(source: Any) -> None:
    with pytest.raises(InvalidSchedule) as error:
        TimestepSchedule.of(source)
    assert str(error.value) == (
        f"cannot read a schedule from {type(source).__name__}\n"
        "  where: TimestepSchedule.of\n"
        "  fix:   give a number of steps, a list of timesteps, or a diffusers scheduler"
    )


@pytest.mark.parametrize("source", [0, -3, []])
def test_a_schedule_without_steps_is_refused(source: Any) -> None:
    with pytest.raises(InvalidSchedule, match=r"a schedule of -?\d steps with 0 timesteps"):
        TimestepSchedule.of(source)


def test_a_schedule_whose_timesteps_do_not_match_its_steps_is_refused() -> None:
    with pytest.raises(InvalidSchedule, match="a schedule of 3 steps with 2 timesteps"):
        TimestepSchedule(3, (2.0, 1.0))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_a_scheduler_without_timesteps_is_refused_with_what_to_call(scheduler: type) -> None:
    with pytest.raises(InvalidSchedule) as error:
        TimestepSchedule.of(scheduler())
    assert str(error.value) == (
        f"{scheduler.__name__} has no inference timesteps yet\n"
        "  where: TimestepSchedule.of\n"
        "  why:   set_timesteps was not called\n"
        "  fix:   call scheduler.set_timesteps(steps) before the first call of the model"
    )


# Looking up -----------------------------------------------------------------------------------------------------------


def visited(schedule: TimestepSchedule, received: list[float]) -> list[int | None]:
    """Steps found for a run; a call is looked for after the one before it, as the runtime does."""
    steps: list[int | None] = []
    for value in received:
        steps.append(schedule.step_of(value, steps[-1] + 1 if steps and steps[-1] is not None else None))
    return steps


def as_received(timesteps: tuple[float, ...], divisor: float, dtype: torch.dtype) -> list[float]:
    return [float(torch.tensor(t / divisor, dtype=dtype)) for t in timesteps]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("divisor", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_found_though_timesteps_were_divided_and_rounded(
    name: str, divisor: float, dtype: torch.dtype
) -> None:
    schedule = TimestepSchedule.of(SCHEDULERS[name]())
    received = as_received(schedule.timesteps, divisor, dtype)
    assert visited(schedule, received) == list(range(schedule.steps))


def test_repeated_timesteps_are_told_apart_by_the_step_before() -> None:
    schedule = TimestepSchedule.of([900, 600, 600, 300, 300])
    assert [schedule.step_of(600, after) for after in (None, 0, 1, 2)] == [1, 1, 1, 2]
    assert schedule.step_of(600, 3) == 1, "a new run begins where the timestep jumps back"
    assert visited(schedule, [900, 600, 600, 300, 300]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [985.0, 520.0, 0.7, -3.0, 5000.0])
def test_a_timestep_off_the_schedule_is_not_found(value: float) -> None:
    assert TimestepSchedule.of([999, 500, 1]).step_of(value, None) is None


def test_a_small_timestep_is_not_taken_for_a_divided_one_of_an_earlier_step() -> None:
    """A flow ends at timestep 1, and its first timestep, 1000, may arrive as 1.0 too."""
    schedule = TimestepSchedule.of([1000.0, 500.0, 1.0])
    assert visited(schedule, [1.0, 0.5, 0.001]) == [0, 1, 2]
    assert visited(schedule, [1000.0, 500.0, 1.0]) == [0, 1, 2]


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True), st.sampled_from([1.0, 1000.0]))
def test_every_timestep_of_a_schedule_is_found_exactly(timesteps: list[int], divisor: float) -> None:
    schedule = TimestepSchedule.of(sorted(timesteps, reverse=True))
    assert visited(schedule, [t / divisor for t in schedule.timesteps]) == list(range(schedule.steps))


def test_one_of_several_denoisers_has_its_own_part() -> None:
    whole = TimestepSchedule(6, (6, 5, 4, 3, 2, 1))
    part = whole.served(Stint(component="second", first=2, end=5))
    assert (part.steps, part.timesteps, part.before, part.after) == (3, (4, 3, 2), 2, 1)
    assert part.numbers == range(2, 5)
    assert part.whole == whole.whole == 6
    later = part.rest(1)
    assert (later.numbers, later.timesteps, later.whole) == (range(3, 5), (3, 2), 6)
    short = TimestepSchedule(3).served(Stint(component="second", first=4, end=6))
    assert (short.numbers, short.whole) == (range(2, 3), 3), "what there is; its policy refuses the number of steps"
