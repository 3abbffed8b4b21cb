"""Generations: every run starts from nothing, whatever happened to the one before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dicompile
from dicompile.errors import CallOutsideSchedule
from dicompile.lower.inductor import compile_segment
from dicompile.passes import Segment
from tests.models import call, optimized, plain_dit, run, timesteps
from tests.passes.segments import BATCH, TOKENS, WIDTH, Mlp, chain
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, latent, model, same, uncached

ROUNDING = 1e-5
"""Reduced products (modulation that is only partly needed) sum in another order."""

CACHING = ["fora", "toca"]
NINE_STEPS = tuple(timesteps(9))
"""FORA reuses at the second of them already."""


@pytest.fixture(scope="module", params=CACHING)
def policy(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def fresh(policy: str) -> list[torch.Tensor]:
    """Outputs of a run of an executor that never ran before."""
    return Runner(policy).run()


def test_a_run_that_is_repeated_gives_the_same_bits(policy: str, fresh: list[torch.Tensor]) -> None:
    runner = Runner(policy)
    assert all(same(runner.run(), fresh) for _ in range(3))


def test_caching_changes_outputs_and_full_steps_do_not_differ(policy: str, fresh: list[torch.Tensor]) -> None:
    plan = Runner(policy).plan
    for step, (planned, output) in enumerate(zip(plan.steps, fresh, strict=True)):
        expected = uncached(SCHEDULE[step], latent(step))
        assert torch.allclose(output, expected, rtol=ROUNDING, atol=ROUNDING) == (planned.kind == "full")


def test_another_run_in_between_leaves_no_trace(policy: str, fresh: list[torch.Tensor]) -> None:
    runner = Runner(policy)
    runner.run(seed=1, labels=OTHER_LABELS)
    assert same(runner.run(), fresh)


@pytest.mark.parametrize("steps", [1, 2, 4, STEPS - 1])
def test_a_run_that_was_left_at_any_step_leaves_no_trace(policy: str, fresh: list[torch.Tensor], steps: int) -> None:
    runner = Runner(policy)
    runner.run(seed=1, steps=range(steps))
    assert same(runner.run(), fresh)
    left_as_a_partner = steps == 1  # nothing tells the two at the first step
    assert runner.state.report.kinds.total() == STEPS + left_as_a_partner
    assert runner.state.report.cold_starts == []


def test_a_run_left_at_its_first_step_is_a_context_that_nobody_continues(policy: str) -> None:
    runner = Runner(policy)
    runner(SCHEDULE[0], latent(0, seed=1))
    runner(SCHEDULE[0], latent(0, seed=2))
    runner(SCHEDULE[0], latent(0, seed=2), OTHER_LABELS)
    assert list(runner.state.contexts) == ["", "#1", "#2"]
    left, *others = runner.state.contexts.values()
    for labels in (LABELS, OTHER_LABELS):
        runner(SCHEDULE[1], latent(1, seed=2), labels)
    assert left.step == 0
    assert [context.step for context in others] == [1, 1]
    for labels in (LABELS, OTHER_LABELS):
        runner(SCHEDULE[2], latent(2, seed=2), labels)
    assert list(runner.state.contexts) == ["#1", "#2"]
    assert left.store == []
    assert runner.state.report.cold_starts == []


def test_a_run_left_at_its_first_step_is_noticed_when_the_same_buffer_gets_new_noise() -> None:
    runner, expected = (Runner("fora", NINE_STEPS) for _ in range(2))
    buffer = latent(0, seed=1)
    runner(NINE_STEPS[0], buffer)
    buffer.copy_(latent(0))
    outputs = [runner(NINE_STEPS[0], buffer), *runner.run(steps=range(1, 9))]
    assert same(outputs, expected.run(steps=range(9)))


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_call_that_fails_leaves_no_trace(policy: str, fresh: list[torch.Tensor], step: int) -> None:
    runner = Runner(policy)
    runner.run(seed=1, steps=range(step))
    no_such_class = torch.tensor([1, 2, 3, 99])
    with pytest.raises(IndexError):
        runner(SCHEDULE[step], latent(step, seed=1), no_such_class)
    assert runner.state.contexts == {}
    assert runner.state.cache_bytes == 0
    assert same(runner.run(), fresh)


class Interrupts:
    """A compiler of variants that stop in the middle of a call when asked to."""

    def __init__(self) -> None:
        self.countdown = -1

    def compile_segment(self, segment: Segment, mode: str) -> Any:
        compiled = compile_segment(segment, mode)

        def call(*arguments: Any) -> Any:
            self.countdown -= 1
            if self.countdown == 0:
                raise KeyboardInterrupt
            return compiled(*arguments)

        return call


def test_an_interrupt_between_two_blocks_leaves_no_trace(
    fresh: list[torch.Tensor], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicompile.reset()  # what made `fresh` is compiled
    interrupts = Interrupts()
    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", interrupts.compile_segment)
    runner = Runner(model().programs(policy))
    for calls in (1, 2, 3, 6):
        runner.run(seed=1, steps=range(3))
        interrupts.countdown = calls
        with pytest.raises(KeyboardInterrupt):
            runner.run(seed=1, steps=range(3, STEPS))
        assert runner.state.contexts == {}
        assert same(runner.run(), fresh)


def test_the_rest_of_a_run_that_failed_is_a_run_of_its_own(policy: str) -> None:
    runner = Runner(policy)
    runner.run(steps=range(4))
    with pytest.raises(CallOutsideSchedule):
        runner(SCHEDULE[4] + 40, latent(4))
    outputs = runner.run(steps=range(4, STEPS))
    assert same(outputs, Runner(policy).run(steps=range(4, STEPS)))


def cached_step(runner: Runner) -> int:
    """A step that reads stored values."""
    return next(i for i, step in enumerate(runner.plan.steps) if step.kind in ("reuse", "partial"))


def test_a_run_that_enters_in_the_middle_is_planned_from_there(policy: str) -> None:
    runner = Runner(policy)
    step = cached_step(runner)
    outputs = runner.run(steps=range(step, STEPS))
    torch.testing.assert_close(outputs[0], uncached(SCHEDULE[step], latent(step)), rtol=ROUNDING, atol=ROUNDING)
    assert runner.context.schedule == runner.link.schedule.rest(step)
    assert runner.plan_from(step).steps[0].kind == "full"
    assert runner.state.report.kinds == runner.kinds_from(step)
    assert runner.state.report.cold_starts == []
    assert str(runner.state.report).startswith(f"{STEPS - step} calls: ")
    assert f"; began at step {step}" in str(runner.state.report)
    assert len(runner.run()) == STEPS
    assert runner.context.schedule == runner.link.schedule


def test_a_partner_that_joins_in_the_middle_is_planned_from_there_and_the_report_says_so(policy: str) -> None:
    runner = Runner(policy)
    step = cached_step(runner)
    runner.run(steps=range(step))
    with dicompile.cache_context("uncond"):
        outputs = runner.run(steps=range(step, STEPS))
    torch.testing.assert_close(outputs[0], uncached(SCHEDULE[step], latent(step)), rtol=ROUNDING, atol=ROUNDING)
    assert same(outputs, Runner(policy).run(steps=range(step, STEPS)))
    assert runner.state.report.kinds == runner.kinds_from(0, step) + runner.kinds_from(step)
    assert runner.state.report.cold_starts == [step]
    assert f"; computed for want of stored values at steps [{step}]" in str(runner.state.report)


def test_after_steps_that_are_left_out_a_run_is_planned_anew(policy: str) -> None:
    runner = Runner(policy)
    step = next(i for i in range(2, STEPS) if runner.plan.steps[i].kind in ("reuse", "partial"))
    runner.run(steps=range(step - 1))
    outputs = runner.run(steps=range(step, STEPS))
    torch.testing.assert_close(outputs[0], uncached(SCHEDULE[step], latent(step)), rtol=ROUNDING, atol=ROUNDING)
    assert same(outputs, Runner(policy).run(steps=range(step, STEPS)))
    assert runner.state.report.kinds == runner.kinds_from(0, step - 1) + runner.kinds_from(step)
    assert runner.state.report.cold_starts == [step]


def test_the_report_counts_the_calls_of_the_last_run_by_kind(policy: str) -> None:
    runner = Runner(policy)
    kinds = [step.kind for step in runner.plan.steps]
    for _ in range(2):
        runner.run()
        assert runner.state.report.kinds == {kind: kinds.count(kind) for kind in kinds}
        assert runner.state.report.cold_starts == []
    assert str(runner.state.report).startswith(f"{STEPS} calls: ")


def test_a_batch_of_another_size_is_a_run_of_its_own() -> None:
    sample = plain_dit(1)
    small = {name: value[:2] for name, value in sample.inputs.items()}
    cached = optimized(sample, "toca", STEPS)
    first, second = run(cached, sample.inputs, timesteps(STEPS)), run(cached, small, timesteps(STEPS))
    assert [tuple(output.shape) for output in (first[0], second[0])] == [(4, 4, 16, 16), (2, 4, 16, 16)]
    assert len(cached.frames) == 2
    assert dicompile.report(cached).kinds.total() == STEPS
    assert same(run(cached, sample.inputs, timesteps(STEPS)), first)
    assert same(run(cached, small, timesteps(STEPS)), second)
    assert dicompile.report(cached).cold_starts == []


def test_the_ninth_model_of_a_class_and_the_ninth_shape_are_cached_like_the_first() -> None:
    for _ in range(9):  # Dynamo gives up on a forward after eight compilations
        cached = dicompile.optimize(chain(Mlp()).model, "fora", schedule=STEPS, mode="eager")
        cached(torch.randn(BATCH, TOKENS, WIDTH))
        assert dicompile.report(cached).kinds == {"full": 1}
    for batch in range(1, 10):
        with dicompile.session():  # without a timestep every call of a session is a step
            x = torch.randn(BATCH + batch, TOKENS, WIDTH)
            for _ in range(3):
                cached(x)
            assert dicompile.report(cached).kinds == {"full": 2, "reuse": 1}
    assert len(cached.frames) == 10


def test_an_optimized_model_that_failed_can_run_again() -> None:
    sample = plain_dit(1)
    cached = optimized(sample, "fora", STEPS)
    first = run(cached, sample.inputs, timesteps(STEPS))
    call(cached, sample.inputs, timesteps(STEPS)[0], seed=7)
    with pytest.raises(IndexError):
        call(cached, {**sample.inputs, "y": torch.tensor([1, 2, 3, 99])}, timesteps(STEPS)[1], seed=8)
    assert same(run(cached, sample.inputs, timesteps(STEPS)), first)


def test_nothing_is_remembered_after_the_last_step(policy: str) -> None:
    runner = Runner(policy)
    runner.run()
    assert runner.state.cache_bytes == 0
