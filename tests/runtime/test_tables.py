"""Any table of actions: the run agrees with a plain implementation, and nothing is read that was not written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dicompile
from dicompile.config import DebugFolder, Settings
from dicompile.errors import StaleRead
from dicompile.lower import Backend, Pieces, ProgramBuilder, VariantCache
from dicompile.plan import (
    COMPUTE,
    REUSE,
    Action,
    Plan,
    Score,
    ScoreBase,
    Selection,
    TimestepSchedule,
    What,
    plan_actions,
)
from dicompile.runtime import Step
from dicompile.runtime.contexts import ContextState
from tests.models import timesteps
from tests.runtime.reference import Reference
from tests.runtime.runner import LABELS, LAYERS, Runner, held, latent, model

SITES, TOKENS = 2 * LAYERS, 64
ROUNDING = 1e-4
"""Fewer rows and columns are summed in another order, and forecasts multiply what that leaves."""

Row = tuple[Action, ...]
BLEND, LINE, PARABOLA = (0.25, 0.75), (0.0, 2.0, -1.0), (0.0, 3.0, -3.0, 1.0)


@pytest.fixture(scope="module")
def builder() -> ProgramBuilder:
    """One builder for all tables, so that every variant is made once."""
    variants = VariantCache(Backend("eager"), Settings(), DebugFolder(None))
    return ProgramBuilder(Pieces(model().capture, model().structure), variants)


@dataclass
class Table:
    """Plans and steps of explicit actions, as the executor asks for them: by the step at which a context begins."""

    rows: Mapping[int, tuple[Row, ...]]
    builder: ProgramBuilder

    def plan(self, schedule: TimestepSchedule) -> Plan:
        return plan_actions(model().structure, self.rows[schedule.before], schedule, "table")

    def step(self, schedule: TimestepSchedule, index: int) -> Step:
        plan = self.plan(schedule)
        return Step.of(plan, index, self.builder.program(plan.steps[index]))


AGE_WEIGHT = 1e-3
"""About a fifth of what distinguishes the attention that two tokens receive: ages decide some places and not others."""


def refresh(base: ScoreBase, count: int, what: What = What.CORE) -> Action:
    return Action.refresh(Selection(Score(base, age_weight=AGE_WEIGHT), count), what)


@st.composite
def site_columns(draw: st.DrawFn, steps: int, is_mlp: bool) -> list[Action]:
    """Actions of one site: the first step computes, and nothing reads further back than was stored."""
    what = draw(st.sampled_from([What.CORE, What.UPDATE] if is_mlp else [What.CORE, What.UPDATE, What.ATTENTION]))
    kinds = ["compute", "reuse", "blend", "line", "parabola"]
    if is_mlp:
        kinds += ["attention", "random", "tokens of a line"]
    column, stored = [Action(what=what)], 1
    for _ in range(steps - 1):
        kind = draw(st.sampled_from(kinds))
        if kind in ("attention", "random"):
            base = ScoreBase.ATTENTION if kind == "attention" else ScoreBase.RANDOM
            column.append(refresh(base, draw(st.integers(1, TOKENS)), what))
        elif kind == "tokens of a line" and stored > 1:
            tokens = refresh(ScoreBase.ATTENTION, draw(st.integers(1, TOKENS))).tokens
            column.append(Action((1.0, *LINE[1:]), what, tokens))
        elif kind == "compute":
            column.append(Action(what=what))
        else:
            weights = {"blend": BLEND, "line": LINE, "parabola": PARABOLA}.get(kind, REUSE.weights)
            column.append(Action(weights if len(weights) <= stored + 1 else REUSE.weights, what))
        stored += column[-1].computes and column[-1].tokens is None
    return column


@st.composite
def tables(draw: st.DrawFn, steps: int | None = None) -> tuple[Row, ...]:
    steps = steps or draw(st.integers(2, 6))
    columns = [draw(site_columns(steps, is_mlp=bool(site % 2))) for site in range(SITES)]
    return tuple(zip(*columns, strict=True))


@dataclass
class Beside:
    """A context of a run, with the reference for its table beside it."""

    runner: Runner
    name: str
    start: int
    reference: Reference

    def step(self, step: int) -> None:
        """One call, which must give what the reference gives, and hold what the plan says."""
        runner, x = self.runner, latent(step)
        time = runner.link.schedule.timesteps[step]
        with dicompile.cache_context(self.name):
            output = runner(time, x)
        context, index = runner.state.contexts[self.name], step - self.start
        expected = self.reference.step(index, x, torch.full((len(x),), time), LABELS, context.chosen)
        torch.testing.assert_close(output, expected, rtol=ROUNDING, atol=ROUNDING)
        plan = runner.plan_from(self.start)
        live = plan.steps[index].live
        if index + 1 < len(plan.steps):
            assert {plan.slots[i] for i, tensor in enumerate(context.store) if tensor is not None} == live
        assert context.held == held_bytes(context) == sum(plan.slot_bytes[slot] for slot in live) <= plan.cache_bytes


def check(rows: tuple[Row, ...], builder: ProgramBuilder, late: tuple[Row, ...] = ()) -> Runner:
    """Run a table from its first step to its end, and one of fewer rows beside it for a partner that joins late."""
    start = len(rows) - len(late)
    runner = Runner(Table({0: rows, start: late} if late else {0: rows}, builder), tuple(timesteps(len(rows))))
    network = model().sample.model
    first, second = (
        Beside(runner, "", 0, Reference(network, rows)),
        Beside(runner, "late", start, Reference(network, late or rows)),
    )
    for step in range(len(rows)):
        if step >= start:
            second.step(step)
        first.step(step)
    assert runner.state.report.cold_starts == ([start] if late else [])
    assert runner.state.cache_bytes == 0
    return runner


def held_bytes(context: ContextState) -> int:
    """Bytes of all storage that the slots of a context keep alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(context)}.values())


EXAMPLES = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(rows=tables())
def test_a_run_from_the_first_step_reads_only_what_was_written(rows: tuple[Row, ...], builder: ProgramBuilder) -> None:
    check(rows, builder)


@EXAMPLES
@given(rows=tables(), data=st.data())
def test_a_partner_that_joins_anywhere_has_a_plan_of_its_own(
    rows: tuple[Row, ...], data: st.DataObject, builder: ProgramBuilder
) -> None:
    check(rows, builder, data.draw(tables(data.draw(st.integers(1, len(rows) - 1)))))


def column(*actions: Action) -> tuple[Row, ...]:
    """A table in which every site does the same."""
    return tuple((action,) * SITES for action in actions)


def test_a_partner_that_joins_late_may_store_other_values(builder: ProgramBuilder) -> None:
    whole, reuse = Action(what=What.UPDATE), Action(REUSE.weights, What.UPDATE)
    check(column(COMPUTE, REUSE, REUSE, REUSE), builder, column(whole, reuse, reuse))


def test_ages_count_the_steps_since_a_token_was_refreshed_or_its_site_computed(builder: ProgramBuilder) -> None:
    row = (REUSE, refresh(ScoreBase.ATTENTION, 12)) * LAYERS
    full = (COMPUTE,) * SITES
    check((full, row, row, row, row, full, row, row, row), builder)


def test_tokens_beside_a_forecast_serve_their_own_step_only(builder: ProgramBuilder) -> None:
    tokens = refresh(ScoreBase.ATTENTION, 20).tokens
    row = (Action(LINE), Action((1.0, *LINE[1:]), tokens=tokens)) * LAYERS
    check((*column(COMPUTE, COMPUTE), row, row, row, *column(COMPUTE), row), builder)


def test_stored_attention_is_projected_and_gated_anew(builder: ProgramBuilder) -> None:
    full, reuse, line = (Action(weights, What.ATTENTION) for weights in (COMPUTE.weights, REUSE.weights, LINE))
    rows = tuple((action, COMPUTE) * LAYERS for action in (full, reuse, full, line, reuse))
    check(rows, builder)


def test_older_values_move_up_one_age_when_a_new_one_is_stored(builder: ProgramBuilder) -> None:
    check(column(COMPUTE, COMPUTE, Action(BLEND), Action(PARABOLA), COMPUTE, Action(PARABOLA)), builder)


def test_a_partner_that_joins_late_forecasts_from_values_of_its_own(builder: ProgramBuilder) -> None:
    forecast = Action(LINE)
    rows = column(COMPUTE, COMPUTE, forecast, forecast, COMPUTE, forecast, COMPUTE, forecast)
    check(rows, builder, column(COMPUTE, REUSE, COMPUTE, forecast, COMPUTE, forecast))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("first", [REUSE, Action(PARABOLA), Action(BLEND), refresh(ScoreBase.RANDOM, 9)])
def test_a_plan_that_reads_before_it_writes_is_refused(first: Action, checked: bool, builder: ProgramBuilder) -> None:
    rows = tuple(
        tuple(action if site % 2 or action.tokens is None else REUSE for site in range(SITES))
        for action in (first, REUSE, COMPUTE)
    )
    runner = Runner(Table({0: rows}, builder), tuple(timesteps(3)))
    runner.executor.check = checked
    with pytest.raises(StaleRead):
        runner.run(steps=[0])
    assert runner.state.contexts == {}


def test_a_slot_is_dropped_at_its_last_reader(builder: ProgramBuilder) -> None:
    rows = column(COMPUTE, REUSE, COMPUTE, REUSE, REUSE)
    runner = Runner(Table({0: rows}, builder), tuple(timesteps(5)))
    sizes = []
    for step in range(5):
        runner.run(steps=[step])
        sizes.append(held_bytes(runner.context))
    core = 4 * TOKENS * 32 * 4
    assert sizes == [SITES * core, 0, SITES * core, SITES * core, 0]
    assert runner.plan.cache_bytes == SITES * core


def test_a_value_that_is_stored_is_the_tensor_that_was_computed(builder: ProgramBuilder) -> None:
    runner = Runner(Table({0: column(COMPUTE, REUSE, REUSE)}, builder), tuple(timesteps(3)))
    runner.run(steps=[0])
    before = [tensor.data_ptr() for tensor in held(runner.context)]
    runner.run(steps=[1])
    assert [tensor.data_ptr() for tensor in held(runner.context)] == before
    assert len(before) == SITES
