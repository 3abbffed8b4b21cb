"""Calls of one step that no name tells apart: windows of a film, tiles, equal calls, and settings that are toggled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.runtime import Executor
from dicompile.runtime.contexts import MOST_TWINS
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, held, latent, model, same, uncached

POLICIES = ["fora", "toca", "taylorseer"]


def windows(runner: Runner, labels: Sequence[Tensor], *, rotate: bool) -> list[list[Tensor]]:
    """Outputs of a window for every item of `labels`, at every step in another order if they rotate."""
    outputs: list[list[Tensor]] = [[] for _ in labels]
    for step in range(STEPS):
        order = [(number + rotate * step) % len(labels) for number in range(len(labels))]
        for number in order:
            outputs[number] += runner.run(seed=number, steps=[step], labels=labels[number])
    return outputs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rotate", [False, True])
def test_windows_of_one_prompt_give_what_each_gives_alone(policy: str, rotate: bool) -> None:
    runner = Runner(policy)
    for _ in range(2):
        for number, outputs in enumerate(windows(runner, [LABELS] * 3, rotate=rotate)):
            assert same(outputs, Runner(policy).run(seed=number))
        assert runner.state.report.kinds == Counter({k: 3 * n for k, n in runner.kinds_from(0).items()})
        assert runner.state.report.cold_starts == []
        assert runner.state.cache_bytes == 0


def test_windows_of_two_prompts_give_what_each_gives_alone() -> None:
    labels = [LABELS, OTHER_LABELS, LABELS, OTHER_LABELS]
    runner = Runner("toca")
    for number, outputs in enumerate(windows(runner, labels, rotate=True)):
        assert same(outputs, Runner("toca").run(seed=number, labels=labels[number]))
    assert runner.state.report.cold_starts == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_that_comes_late_is_planned_from_its_own_first_step(policy: str) -> None:
    runner, late = Runner(policy), 3
    outputs: list[list[Tensor]] = [[], [], []]
    for step in range(STEPS):
        for number in range(3 if step >= late else 2):
            outputs[number] += runner.run(seed=number, steps=[step])
    for number in range(2):
        assert same(outputs[number], Runner(policy).run(seed=number))
    assert same(outputs[2], Runner(policy).run(seed=2, steps=range(late, STEPS)))
    assert runner.state.report.cold_starts == [late]
    assert runner.state.report.cold_reasons[late].startswith("another context begins here")


def test_a_late_context_weighs_its_own_values_by_their_distance_in_its_own_steps() -> None:
    runner = Runner("taylorseer")
    late = next(s for s in range(1, STEPS - 2) if weights_of(runner, 0, s) != weights_of(runner, s, s) != {})
    runner.run(steps=range(late))
    for step in range(late, STEPS):
        runner.run(steps=[step])
        with dicompile.cache_context("late"):
            output = runner.run(steps=[step], labels=OTHER_LABELS)
        alone = Runner("taylorseer")
        assert same(output, alone.run(steps=range(late, step + 1), labels=OTHER_LABELS)[-1:])
    assert runner.state.report.kinds == runner.kinds_from(0) + runner.kinds_from(late)


def weights_of(runner: Runner, start: int, end: int) -> dict[int, tuple[float, ...]]:
    """Weights of the first site at the steps from `end` on, in a context that begins at a step."""
    plan = runner.plan_from(start)
    return {step: plan.steps[step - start].sites[0].action.weights for step in range(end, STEPS)}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("calls", [2, MOST_TWINS])
def test_equal_calls_give_what_one_gives_alone(policy: str, calls: int) -> None:
    runner, wanted = Runner(policy), Runner(policy).run()
    for step in range(STEPS):
        outputs = [runner.run(steps=[step])[0] for _ in range(calls)]
        assert all(torch.equal(output, wanted[step]) for output in outputs)
    assert runner.state.report.cold_starts == []
    assert runner.state.report.kinds.total() == calls * STEPS


def test_a_hundred_and_fifty_equal_calls_hold_no_more_than_a_few() -> None:
    runner, wanted = Runner("fora"), Runner("fora").run()
    most = MOST_TWINS * max(runner.plan_from(start).cache_bytes for start in range(STEPS))
    for step in range(3):
        for _ in range(150):
            runner.run(steps=[step])
            assert len(runner.state.contexts) <= MOST_TWINS
            assert runner.state.cache_bytes <= most
    assert 0 < runner.state.report.peak_cache_bytes <= most
    assert same(runner.run(), wanted)


def test_a_call_of_one_step_over_and_over_reads_nothing_of_the_others() -> None:
    """Somebody who only asks what the model says, at one timestep."""
    runner = Runner("toca")
    for seed in range(6):
        for _ in range(2):
            output = runner.run(seed=seed, steps=[2])[0]
            torch.testing.assert_close(output, uncached(SCHEDULE[2], latent(2, seed)), rtol=1e-5, atol=1e-5)


def test_partners_that_toggle_a_setting_give_what_each_gives_alone() -> None:
    """Both have the same prompt and latent; another way through the forward is other code of the same model."""
    runner = Runner("toca", way="all layers")
    other = Runner("toca", way="some layers")
    other.executor, other.owner = Executor(other.source, other.signature, check=True), runner.owner
    outputs: list[list[Tensor]] = [[], []]
    for step in range(STEPS):
        order = (0, 1) if step % 2 else (1, 0)
        for number in order:
            outputs[number] += (runner, other)[number].run(steps=[step])
        ways = {context.way for context in runner.state.contexts.values() if context.step == step}
        assert ways == {"all layers", "some layers"}
        assert len(runner.state.contexts) == 2
    assert all(same(output, Runner("toca").run()) for output in outputs)
    assert runner.state.report.cold_starts == []


def test_a_setting_that_changes_in_the_middle_of_a_run_changes_no_plan() -> None:
    first, second = (Runner("fora", way=way) for way in ("slow", "fast"))
    second.owner = first.owner
    outputs = [*first.run(steps=range(3)), *second.run(steps=range(3, STEPS))]
    assert same(outputs, Runner("fora").run())
    assert first.state.report.cold_starts == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_caller_may_write_to_what_it_gave_and_got(policy: str) -> None:
    """Nothing that is stored shares memory with an input or a result."""
    runner, wanted = Runner(policy), Runner(policy).run()
    for step in range(STEPS):
        x, labels = latent(step), LABELS.clone()
        output = runner(SCHEDULE[step], x, labels)
        assert torch.equal(output, wanted[step])
        stored = {tensor.untyped_storage().data_ptr() for tensor in held(runner.context)}
        assert not stored & {tensor.untyped_storage().data_ptr() for tensor in (x, output)}
        x.fill_(torch.nan)
        output.fill_(torch.nan)


class Branches(torch.nn.Module):
    """Also returns what its branches gave, views of them, and its input: stored values, for whoever watches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.first(x)
        y = x + a
        b = self.second(y)
        return y + b, a, b, a.transpose(1, 2), b[:, :2], x


def test_results_that_are_stored_values_are_copies() -> None:
    cached = dicompile.optimize(Branches(), dicompile.FORA(interval=3), schedule=6, mode="eager")
    inputs = [torch.randn(2, 4, 8) for _ in range(6)]

    def run(*, spoil: bool) -> list[tuple[Tensor, ...]]:
        outputs = []
        with dicompile.session():
            for x in inputs:
                given = x.clone()
                results = cached(given)
                outputs.append(tuple(result.clone() for result in results))
                for result in (*results, given) if spoil else ():
                    result.fill_(torch.nan)
            assert dicompile.report(cached).kinds["reuse"] > 0
        return outputs

    for plain, spoiled in zip(run(spoil=False), run(spoil=True), strict=True):
        assert same(plain, spoiled)


def test_a_model_that_was_optimized_for_no_policy_remembers_nothing() -> None:
    runner = Runner(model().programs("none"), remembers=False)
    for step in range(STEPS):
        for labels in (LABELS, OTHER_LABELS):
            torch.testing.assert_close(
                runner(SCHEDULE[step], latent(step), labels), uncached(SCHEDULE[step], latent(step), labels)
            )
            assert runner.state.contexts == {}
    assert runner.state.report.kinds == {"full": 2 * STEPS}
    assert (runner.state.report.cold_starts, runner.state.report.outside) == ([], 0)
