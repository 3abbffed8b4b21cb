"""The clock: which step a call is, from timesteps, a live scheduler, or a count, and when a new generation begins."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from torch import Tensor

from dicompile.errors import CallOutsideSchedule
from dicompile.plan import TimestepSchedule
from dicompile.runtime import SchedulerLink
from dicompile.runtime.clock import OutsideSchedule, find_step
from dicompile.runtime.contexts import ContextState
from dicompile.runtime.session import ModelState
from tests.models import timesteps
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, latent, same, uncached

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


class Clock:
    """Follows calls as the executor does, and tells what the clock made of them."""

    def __init__(self, source: Any) -> None:
        self.link, self.state = SchedulerLink(source), ModelState()

    def __call__(self, timestep: Any, context: str = "", latent: Tensor | None = None) -> int:
        value = timestep if timestep is None or isinstance(timestep, Tensor) else torch.tensor([timestep])
        step = find_step(self.state, self.link, value, context, latent)
        if step != self.state.step:
            self.state.calls.clear()
        self.state.step = step
        self.state.calls.add(context)
        self.state.contexts[context] = ContextState(context, None, self.link.schedule, step=step, latent=latent)
        return step

    def steps(self, values: Any) -> list[int]:
        return [self(value) for value in values]

    @property
    def generation(self) -> int:
        return self.state.generation


def stepped(scheduler: Any, clock: Clock, scale: float = 1.0, calls: int = 1, begin: int = 0) -> list[int]:
    """Steps that the clock saw while `scheduler` sampled with so many calls of the model at each of its steps."""
    sample, steps = torch.ones(1, 4), []
    for timestep in scheduler.timesteps[begin:]:
        steps += [clock(timestep.expand(2) / scale) for _ in range(calls)]
        sample = scheduler.step(torch.ones(1, 4), timestep, sample).prev_sample
    return steps


SECOND_ORDER = [HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler, KDPM2DiscreteScheduler]
SCHEDULERS = [DDIMScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, *SECOND_ORDER]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_a_live_scheduler_is_followed_evaluation_by_evaluation(make: Any) -> None:
    scheduler = make()
    scheduler.set_timesteps(6)
    clock = Clock(scheduler)
    assert stepped(scheduler, clock) == list(range(len(scheduler.timesteps)))


@pytest.mark.parametrize("make", SCHEDULERS)
def test_two_calls_at_one_evaluation_are_guidance_partners(make: Any) -> None:
    scheduler = make()
    scheduler.set_timesteps(5)
    clock = Clock(scheduler)
    steps = range(len(scheduler.timesteps))
    assert stepped(scheduler, clock, calls=2) == [step for step in steps for _ in range(2)]


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_timesteps_divided_by_a_thousand_are_recognised(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)  # ends at timestep 1, which is also the first one divided
    clock = Clock(scheduler)
    for _ in range(2):
        assert stepped(scheduler, clock, scale=1000.0) == list(range(steps))
        scheduler.set_timesteps(steps)


@pytest.mark.parametrize("made", [1, 3, 6])
def test_a_run_that_was_left_begins_anew_where_its_first_timestep_is_also_the_last_one_divided(made: int) -> None:
    times = [1000.0, 800.0, 600.0, 400.0, 200.0, 1.0]
    clock = Clock(times)
    assert clock.steps([t / 1000 for t in times[:made]]) == list(range(made))
    assert clock.steps([t / 1000 for t in times]) == list(range(6))


def test_bfloat16_timesteps_are_recognised() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    clock = Clock(scheduler)
    assert clock.steps((scheduler.timesteps / 1000).to(torch.bfloat16).unbind()) == list(range(28))


def test_setting_the_timesteps_anew_begins_a_generation_with_the_new_schedule() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    clock = Clock(scheduler)
    assert stepped(scheduler, clock) == [0, 1, 2, 3]
    before = clock.generation
    scheduler.set_timesteps(4)
    assert stepped(scheduler, clock) == [0, 1, 2, 3]
    assert clock.generation == before + 1
    scheduler.set_timesteps(10)
    assert stepped(scheduler, clock) == list(range(10))
    assert clock.link.schedule.steps == 10


def test_a_schedule_set_anew_in_the_middle_of_a_run_begins_a_generation() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    clock = Clock(scheduler)
    clock.steps(scheduler.timesteps[:2])
    before = clock.generation
    scheduler.set_timesteps(4)
    assert clock(scheduler.timesteps[2]) == 2  # image to image starts in the middle
    assert clock.generation > before


def test_a_live_schedule_that_changed_is_planned_anew() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(6)
    runner = Runner("fora", scheduler)
    runner.run(steps=range(6))
    assert (len(runner.plan.steps), runner.state.report.kinds.total()) == (6, 6)
    scheduler.set_timesteps(9)
    outputs = runner.run(steps=range(9))
    assert (len(runner.plan.steps), runner.state.report.kinds.total()) == (9, 9)
    assert runner.state.report.cold_starts == []
    assert same(outputs, Runner("fora", tuple(scheduler.timesteps.tolist())).run(steps=range(9)))


def test_a_second_order_sampler_is_cached_like_any_other() -> None:
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    runner = Runner("fora", scheduler)
    sample = latent(0)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(runner(timestep, sample), timestep, sample).prev_sample
    assert runner.state.report.kinds == {"full": 5, "reuse": 6}
    assert list(runner.state.contexts) == [""]


def test_a_timestep_that_jumps_back_begins_a_generation() -> None:
    clock = Clock(timesteps(6))
    assert clock.steps(timesteps(6)[:4]) == [0, 1, 2, 3]
    before = clock.generation
    assert clock(timesteps(6)[0]) == 0
    assert clock.generation > before


def test_a_repeated_timestep_stays_in_its_step_and_generation() -> None:
    clock = Clock(timesteps(6))
    assert clock.steps([999, 999]) == [0, 0]
    before = clock.generation
    assert clock.steps([timesteps(6)[1]] * 2) == [1, 1]
    assert clock.generation == before


def test_a_timestep_off_the_schedule_is_refused() -> None:
    with pytest.raises(CallOutsideSchedule) as caught:
        Clock([900.0, 600.0, 300.0])(450.0)
    assert str(caught.value) == (
        "the model was called at timestep 450, which is not on the schedule\n"
        "  where: 3 steps from 900 to 300\n"
        "  why:   the policy's plan has no step for it\n"
        "  fix:   optimize with the scheduler that drives the sampling, after its set_timesteps"
    )


def test_more_steps_than_were_announced_are_refused() -> None:
    clock = Clock(2)
    assert clock.steps([900, 600]) == [0, 1]
    with pytest.raises(CallOutsideSchedule) as caught:
        clock(300)
    assert str(caught.value) == (
        "this is step 3 of a schedule of 2 steps\n"
        "  where: timestep 300 after 600\n"
        "  why:   the policy's plan ends here\n"
        "  fix:   give the number of steps that the sampler makes, or its scheduler"
    )


@pytest.mark.parametrize("direction", [1, -1])
def test_with_a_step_count_changes_of_the_timestep_are_counted(direction: int) -> None:
    values = timesteps(4)[::direction]
    clock = Clock(4)
    for _ in range(3):
        assert clock.steps([value for value in values for _ in range(2)]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_with_a_step_count_a_run_that_ended_early_is_noticed() -> None:
    clock = Clock(4)
    assert clock.steps(timesteps(4)[:3]) == [0, 1, 2]
    assert clock.steps(timesteps(4)) == [0, 1, 2, 3]


def test_without_any_timestep_every_call_is_a_step() -> None:
    assert Clock(3).steps([None] * 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_single_step_never_ends() -> None:
    assert Clock(1).steps([999, 500, 1, 700, 700]) == [0] * 5


def test_a_view_of_the_timesteps_tells_the_step_without_being_read() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    link = SchedulerLink(scheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        assert link.place(timestep.expand(8)) == step
    assert link.place(scheduler.timesteps.clone()[2]) is None
    assert link.place(scheduler.timesteps[1:3]) is None  # a time per sample
    assert link.place(scheduler.timesteps[2].float()) is None
    assert SchedulerLink(timesteps(3)).place(torch.tensor(999)) is None


def test_a_scheduler_that_counts_tells_its_position_until_its_end() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    link = SchedulerLink(scheduler)
    assert link.position is None
    scheduler.set_begin_index(1)
    for step, timestep in enumerate(scheduler.timesteps[1:], 1):
        assert link.position == step
        scheduler.step(torch.ones(1), timestep, torch.ones(1))
    assert link.position is None
    assert SchedulerLink(timesteps(3)).position is None


def test_timesteps_that_run_backwards_are_followed_by_the_position_of_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    for begin in (None, 0, 2):
        scheduler.set_timesteps(4)  # evenly spaced: 1 - t / 1000 is another step's t / 1000
        clock = Clock(scheduler)
        if begin is not None:
            scheduler.set_begin_index(begin)
        steps, sample = [], torch.ones(1, 4)
        for timestep in scheduler.timesteps[begin or 0 :]:
            steps += [clock((1 - timestep / 1000).expand(2)) for _ in range(2)]
            sample = scheduler.step(torch.ones(1, 4), timestep, sample).prev_sample
        assert steps == [step for step in range(begin or 0, 4) for _ in range(2)]
        assert clock.generation == clock.state.generation > 0


def test_a_loop_that_does_not_step_the_scheduler_is_followed_by_its_timesteps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    clock = Clock(scheduler)
    assert clock.steps([t.clone() for t in scheduler.timesteps for _ in range(2)]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_run_that_was_left_and_begins_again_without_setting_the_timesteps_is_noticed() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    clock = Clock(scheduler)
    for timestep in scheduler.timesteps[:3]:
        clock(timestep.clone())
        scheduler.step(torch.ones(1, 4), timestep, torch.ones(1, 4))
    generation = clock.generation
    assert clock(scheduler.timesteps[0].clone()) == 0
    assert clock.generation > generation


@pytest.mark.parametrize("make", SECOND_ORDER)
@pytest.mark.parametrize("begin", [0, 2, 4])
def test_a_sampler_of_second_order_may_begin_in_the_middle(make: Any, begin: int) -> None:
    scheduler = make()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(begin)
    clock = Clock(scheduler)
    assert stepped(scheduler, clock, begin=begin) == list(range(begin, len(scheduler.timesteps)))


@pytest.mark.parametrize("make", SECOND_ORDER)
def test_evaluations_at_one_timestep_of_a_list_are_told_apart_by_their_latents(make: Any) -> None:
    scheduler = make()
    scheduler.set_timesteps(5)
    times = scheduler.timesteps.tolist()
    runner = Runner("fora", times)
    for step in range(len(times)):
        for labels in (LABELS, OTHER_LABELS):
            runner(times[step], latent(step), labels)
    kinds = Counter(step.kind for step in runner.plan.steps)
    assert runner.state.report.kinds == {kind: 2 * count for kind, count in kinds.items()}
    assert runner.state.report.cold_starts == []


# Several timesteps in one call ---------------------------------------------------------------------------------------

TWO = torch.zeros(2, 4, 8, 8)
"""A latent of two samples."""


def test_samples_of_one_batch_at_one_timestep_are_at_its_step() -> None:
    clock = Clock(timesteps(4))
    for step, time in enumerate(timesteps(4)):
        assert clock(torch.tensor([time, time]), latent=TWO) == step
        assert clock(torch.tensor([[time, time, 0], [time, 0, 0]]), latent=TWO) == step  # frames; some are given


def test_samples_of_one_batch_at_different_timesteps_belong_to_no_step() -> None:
    clock = Clock(timesteps(4))
    for times in ([999, 749], [[999, 0], [749, 0]], [[999, 999], [0, 0]]):
        with pytest.raises(OutsideSchedule, match="samples of one batch are at different timesteps: 999, "):
            clock(torch.tensor(times), latent=TWO)
    assert clock.state.step is None


def test_frames_of_which_all_go_on_are_at_the_step_of_the_largest_timestep() -> None:
    clock, times = Clock(timesteps(4)), timesteps(4)
    for step, time in enumerate(times):
        given = torch.tensor([[0, time, time]])
        assert [clock(given), clock(given.clone())] == [step, step]  # and its guidance partner


@pytest.mark.parametrize("source", [tuple(timesteps(4)), 4])
def test_a_part_of_the_frames_that_goes_on_alone_belongs_to_no_step(source: Any) -> None:
    clock, (first, second, third, _) = Clock(source), timesteps(4)
    assert clock(torch.tensor([[first, first, first]])) == 0
    for frames in ([second, first, first], [third, second, first]):
        with pytest.raises(OutsideSchedule, match="part of the latent went on to another timestep"):
            clock(torch.tensor([frames]))
    assert clock(torch.tensor([[third, third, second]])) == 1
    with pytest.raises(OutsideSchedule):
        clock(torch.tensor([[0, third, second]]))


@pytest.mark.parametrize("policy", ["fora", "taylorseer"])
def test_samples_at_different_steps_are_computed_whole_and_the_run_is_planned_anew_after_them(policy: str) -> None:
    runner, times = Runner(policy), torch.tensor([SCHEDULE[3], SCHEDULE[3], SCHEDULE[3], SCHEDULE[2]])
    runner.run(steps=range(3))
    output = runner(times, latent(3))
    assert (runner.state.report.outside, runner.state.contexts, runner.state.cache_bytes) == (1, {}, 0)
    for row, time in enumerate(times.tolist()):
        expected = uncached(time, latent(3))[row]
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-4)
    assert same(runner.run(steps=range(3, STEPS)), Runner(policy).run(steps=range(3, STEPS)))
    assert runner.state.report.cold_starts == [3]
    assert runner.state.report.kinds == runner.kinds_from(0, 3) + runner.kinds_from(3) + Counter(["full"])
    assert "1 calls outside of the schedule computed whole" in str(runner.state.report)
    assert same(runner.run(), Runner(policy).run())
    assert runner.state.report.outside == 0


def test_every_sample_at_a_step_of_its_own_is_computed_whole_however_long() -> None:
    runner = Runner("fora")
    for step in range(STEPS - 3):
        times = torch.tensor(SCHEDULE[step : step + 4])
        output = runner(times, latent(step))
        expected = torch.stack([uncached(float(time), latent(step))[row] for row, time in enumerate(times)])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert runner.state.report.outside == STEPS - 3
    assert runner.state.report.peak_cache_bytes == 0
    assert same(runner.run(), Runner("fora").run())


def test_a_fixed_schedule_is_read_once() -> None:
    link = SchedulerLink(STEPS)
    assert link.schedule == TimestepSchedule(STEPS)
    assert link.token is link.token is link.schedule


# Rounded timesteps ----------------------------------------------------------------------------------------------------


def rounded(scheduler: Any, times: int = 1) -> list[Tensor]:
    """Timesteps of a scheduler as pipelines in bfloat16 hand them on."""
    values = scheduler.timesteps.to(torch.bfloat16)
    return list((values if times == 1 else (values / 1000).to(torch.bfloat16)).unbind())


def flow(steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("steps", "shift"), [(28, 12.0), (50, 3.0), (100, 5.0)])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("source", ["scheduler", "list"])
def test_timesteps_that_are_one_number_in_bfloat16_are_told_apart(
    steps: int, shift: float, times: int, source: str
) -> None:
    scheduler = flow(steps, shift)
    clock = Clock(scheduler if source == "scheduler" else scheduler.timesteps.tolist())
    for _ in range(2):
        seen = []
        for step, timestep in enumerate(rounded(scheduler, times)):
            seen += [clock(timestep.expand(2), name, latent(0) + 0.01 * step) for name in ("cond", "uncond")]
        assert seen == [step for step in range(steps) for _ in range(2)]


def test_a_rounded_run_that_was_left_early_begins_anew() -> None:
    scheduler = flow(100, 5.0)
    clock, values = Clock(scheduler.timesteps.tolist()), rounded(scheduler)
    for made in (3, 7, 40):
        seen = [clock(t.expand(2), latent=latent(0) + 0.01 * i) for i, t in enumerate(values[:made])]
        assert seen == list(range(made))


@pytest.mark.parametrize("received", [lambda t: t - 1, lambda t: 1 - t / 1000, lambda t: 2 * t + 3])
def test_another_function_of_the_timestep_is_followed_by_the_position_of_the_scheduler(received: Any) -> None:
    """GlmImage gives ``t - 1``: near the timestep itself at first, and far from it in the end."""
    scheduler = flow(28, 3.0)
    clock, sample, seen = Clock(scheduler), torch.ones(1, 4), []
    for timestep in scheduler.timesteps:
        seen += [clock(received(timestep).expand(2)) for _ in range(2)]
        sample = scheduler.step(torch.ones(1, 4), timestep, sample).prev_sample
    assert seen == [step for step in range(28) for _ in range(2)]
