"""Stamps: a slot that is not what the plan says is found when it is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import dicompile
from dicompile.config import Settings
from dicompile.errors import StaleRead
from dicompile.runtime.session import ContextState
from dicompile.runtime.stamps import Stamps
from tests.models import optimized, plain_dit
from tests.runtime.runner import STEPS, Runner

POLICIES = ["fora", "toca", "duca", "taylorseer"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_read_of_a_run_is_checked(policy: str) -> None:
    runner = Runner(policy)
    before = Stamps.reads
    runner.run()
    programs = [runner.source.step(runner.link.schedule, step)[1] for step in range(STEPS)]
    assert Stamps.reads - before == sum(len(program.reads) for program in programs) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_runs_that_begin_anywhere_read_what_they_wrote(policy: str) -> None:
    for start in range(STEPS):
        for left_out in range(start + 1, STEPS):
            runner = Runner(policy)
            runner.run(steps=[*range(start, left_out), *range(left_out + 1, STEPS)])


def another_tensor(context: ContextState) -> None:
    slot = next(iter(context.store))
    context.store[slot] = context.store[slot][:1].clone()


def another_dtype(context: ContextState) -> None:
    slot = next(iter(context.store))
    context.store[slot] = context.store[slot].double()


def written_to(context: ContextState) -> None:
    for tensor in context.store.values():
        tensor.add_(1)


def of_another_step(context: ContextState) -> None:
    context.stamps.planned = {slot: step - 1 for slot, step in context.stamps.planned.items()}


def unknown(context: ContextState) -> None:
    context.stamps.found.clear()


@pytest.mark.parametrize("spoil", [another_tensor, another_dtype, written_to, of_another_step, unknown])
def test_a_slot_that_is_not_what_the_plan_says_is_refused(spoil: Callable[[ContextState], None]) -> None:
    runner = Runner("fora")
    step = next(i for i in range(1, STEPS) if runner.plan.steps[i].kind == "reuse")
    runner.run(steps=range(step))
    spoil(runner.state.contexts[""])
    with pytest.raises(StaleRead) as error:
        runner.run(steps=[step])
    assert "is not what the plan says\n  where: runtime, context ''\n  why:   found " in str(error.value)
    assert f"step={step - 1}" in str(error.value)


def test_slots_of_another_generation_or_context_are_refused() -> None:
    runner = Runner("fora")
    step = next(i for i in range(1, STEPS) if runner.plan.steps[i].kind == "reuse")
    runner.run(steps=range(step))
    runner.state.generation += 1
    with pytest.raises(StaleRead):
        runner.run(steps=[step])
    runner.run(steps=range(step))
    runner.state.contexts = {"cond": runner.state.contexts[""]}
    runner.state.contexts["cond"].name = "cond"
    with pytest.raises(StaleRead), dicompile.cache_context("cond"):
        runner.run(steps=[step])


def test_without_the_check_no_stamp_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMPILE_CHECK")
    assert not Settings.from_environment().check
    sample = plain_dit(1)
    model = optimized(sample, "fora", 4)
    before = Stamps.reads
    states = []
    for time in (999, 749):
        model(sample.inputs["x"], torch.full((4,), time), sample.inputs["y"])
        states.append(dicompile.runtime.current_session().state_of(model.frames[0].run))
    assert Stamps.reads == before
    assert states[0].contexts[""].stamps == Stamps()
