"""Stamps: a slot that is not what the plan says is found when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dicompile.analysis import SiteId
from dicompile.config import Settings
from dicompile.errors import StaleRead
from dicompile.plan import (
    COMPUTE,
    Action,
    Score,
    ScoreBase,
    Selection,
    Slot,
    SlotKind,
    TimestepSchedule,
    What,
    plan_actions,
)
from dicompile.runtime.contexts import ContextState
from dicompile.runtime.stamps import Stamps, written_at
from tests.models import optimized, plain_dit, state_of
from tests.runtime.runner import LAYERS, STEPS, Runner, held, model

POLICIES = ["fora", "toca", "duca", "taylorseer"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_read_of_a_run_is_checked(policy: str) -> None:
    runner = Runner(policy)
    before = Stamps.reads
    runner.run()
    steps = [runner.source.step(runner.link.schedule, step) for step in range(STEPS)]
    assert Stamps.reads - before == sum(len(step.program.reads) for step in steps) > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.sampled
def test_runs_that_begin_anywhere_read_what_they_wrote(policy: str) -> None:
    for start in range(STEPS):
        for left_out in range(start + 1, STEPS):
            runner = Runner(policy)
            runner.run(steps=[*range(start, left_out), *range(left_out + 1, STEPS)])


def another_tensor(context: ContextState) -> None:
    context.store = [tensor if tensor is None else tensor[:1].clone() for tensor in context.store]


def another_dtype(context: ContextState) -> None:
    context.store = [tensor if tensor is None else tensor.double() for tensor in context.store]


def written_to(context: ContextState) -> None:
    for tensor in held(context):
        tensor.add_(1)


def of_another_step(context: ContextState) -> None:
    context.stamps.found = [stamp and replace(stamp, step=stamp.step - 1) for stamp in context.stamps.found]


def another_value(context: ContextState) -> None:
    context.stamps.found = [stamp and replace(stamp, what=What.UPDATE) for stamp in context.stamps.found]


def unknown(context: ContextState) -> None:
    context.stamps.found.clear()


def lost(context: ContextState) -> None:
    context.store = [None] * len(context.store)


SPOILED = [another_tensor, another_dtype, written_to, of_another_step, another_value, unknown, lost]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_slot_that_is_not_what_the_plan_says_is_refused(spoil: Callable[[ContextState], None]) -> None:
    runner = Runner("fora")
    step = first_reuse(runner)
    runner.run(steps=range(step))
    spoil(runner.context)
    with pytest.raises(StaleRead) as error:
        runner.run(steps=[step])
    assert "is not what the plan says\n  where: runtime\n  why:   found " in str(error.value)
    expected = f"a value of step {step - 1}" if spoil in (unknown, lost) else f"step={step - 1}, what=<What.CORE"
    assert expected in str(error.value).partition("; expected ")[2]


def first_reuse(runner: Runner) -> int:
    return next(i for i in range(1, STEPS) if runner.plan.steps[i].kind == "reuse")


def test_slots_of_another_generation_are_refused() -> None:
    runner = Runner("fora")
    step = first_reuse(runner)
    runner.run(steps=range(step))
    runner.state.generation += 1
    with pytest.raises(StaleRead):
        runner.run(steps=[step])


def test_slots_of_a_context_with_another_plan_are_refused() -> None:
    runner = Runner("fora")
    step = next(i for i in range(2, STEPS) if runner.plan_from(1).steps[i - 1].kind == "reuse")
    assert runner.plan.steps[step].kind == "reuse"
    runner.run(steps=range(step))
    runner.context.schedule = runner.link.schedule.rest(1)
    with pytest.raises(StaleRead):
        runner.run(steps=[step])


def test_values_are_as_old_as_the_steps_that_computed_them() -> None:
    line, whole = (0.0, 2.0, -1.0), COMPUTE
    token = Action.refresh(Selection(Score(ScoreBase.RANDOM), 3))
    column = [whole, whole, Action(line), whole, Action((0.25, 0.75)), Action(line), token, Action(line)]
    rows = [(action, whole if action.tokens is None else action) * LAYERS for action in column]
    plan = plan_actions(model().structure, rows, TimestepSchedule(len(rows)), "table")

    def steps(site: int, step: int) -> list[int | None]:
        return [written_at(plan, step, Slot.of(SiteId(site), SlotKind.VALUE, age)) for age in (0, 1)]

    assert steps(0, 0) == [None, None]
    assert steps(0, 1) == [0, None]
    assert steps(0, 2) == steps(0, 3) == [1, 0]
    assert steps(0, 4) == [3, 1]
    assert steps(0, 5) == [4, 3]  # a blend is a value of its step
    assert steps(0, 7) == [6, 3]  # refreshed tokens are in the newest value, and make no other one older


def test_without_the_check_no_stamp_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMPILE_CHECK")
    assert not Settings.from_environment().check
    sample = plain_dit(1)
    cached = optimized(sample, "fora", 4)
    before = Stamps.reads
    for time in (999, 749):
        cached(sample.inputs["x"], torch.full((4,), time), sample.inputs["y"])
    assert Stamps.reads == before
    assert state_of(cached).contexts[""].stamps == Stamps()
