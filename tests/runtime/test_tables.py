"""Any table of actions: the run agrees with a plain implementation, and nothing is read that was not written."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dicompile
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Program, ProgramBuilder, VariantCache
from dicompile.plan import (
    COMPUTE,
    REUSE,
    Action,
    Plan,
    Score,
    ScoreBase,
    Selection,
    StepPlan,
    TimestepSchedule,
    What,
    cold_step,
    plan_actions,
)
from tests.models import timesteps
from tests.runtime.reference import Reference
from tests.runtime.runner import LABELS, LAYERS, Runner, latent, model

SITES, TOKENS = 2 * LAYERS, 64
ROUNDING = 1e-4
"""Fewer rows and columns are summed in another order, and forecasts multiply what that leaves."""

Row = tuple[Action, ...]
BLEND, LINE, PARABOLA = (0.25, 0.75), (0.0, 2.0, -1.0), (0.0, 3.0, -3.0, 1.0)


@pytest.fixture(scope="module")
def builder() -> ProgramBuilder:
    """One builder for all tables, so that every variant is made once."""
    variants = VariantCache("eager", Settings(), DebugFolder(None))
    return ProgramBuilder(model().capture, model().structure, variants)


@dataclass
class Table:
    """Plans and programs of explicit actions, as the executor asks for them."""

    rows: tuple[Row, ...]
    builder: ProgramBuilder
    made: dict[tuple[int, bool], tuple[StepPlan, Program]] = field(default_factory=dict)

    def plan(self, schedule: TimestepSchedule) -> Plan:
        return plan_actions(model().structure, self.rows, schedule, "table")

    def step(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        step = self.plan(schedule).steps[index]
        return step, self.builder.program(step)

    def cold(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        step = cold_step(model().structure, self.plan(schedule), index)
        return step, self.builder.program(step)


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
def tables(draw: st.DrawFn) -> tuple[Row, ...]:
    steps = draw(st.integers(2, 6))
    columns = [draw(site_columns(steps, is_mlp=bool(site % 2))) for site in range(SITES)]
    return tuple(zip(*columns, strict=True))


def check(rows: tuple[Row, ...], builder: ProgramBuilder, start: int = 0) -> Runner:
    """Run a table from `start` to its end beside the reference; a guidance partner has begun the generation before."""
    times = timesteps(len(rows))
    runner = Runner(Table(rows, builder), tuple(times))
    if start:
        with dicompile.cache_context("partner"):
            runner(times[0], latent(0))
    network = model().sample.model
    reference = Reference(network, rows, start)
    for step in range(start, len(rows)):
        x = latent(step)
        output = runner(times[step], x)
        chosen = runner.state.contexts[""].chosen
        expected = reference.step(step, x, torch.full((len(x),), times[step]), LABELS, chosen)
        torch.testing.assert_close(output, expected, rtol=ROUNDING, atol=ROUNDING)
        assert held_bytes(runner) <= runner.plan.cache_bytes
        held, live = set(runner.state.contexts[""].store), runner.plan.steps[step].live
        assert held <= live if reference.cold_starts else held == live
    assert runner.state.report.cold_starts == reference.cold_starts
    assert runner.state.contexts[""].cache_bytes == 0
    return runner


def held_bytes(runner: Runner) -> int:
    """Bytes of all storage that the slots of the unnamed context keep alive."""
    tensors = runner.state.contexts[""].store.values()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


EXAMPLES = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(rows=tables())
def test_a_run_from_the_first_step_reads_only_what_was_written(rows: tuple[Row, ...], builder: ProgramBuilder) -> None:
    assert check(rows, builder).state.report.cold_starts == []


@EXAMPLES
@given(rows=tables(), data=st.data())
def test_a_partner_that_joins_anywhere_computes_what_it_lacks(
    rows: tuple[Row, ...], data: st.DataObject, builder: ProgramBuilder
) -> None:
    check(rows, builder, start=data.draw(st.integers(1, len(rows) - 1)))


def column(*actions: Action) -> tuple[Row, ...]:
    """A table in which every site does the same."""
    return tuple((action,) * SITES for action in actions)


def test_a_stored_update_survives_a_cold_start(builder: ProgramBuilder) -> None:
    update = What.UPDATE
    rows = column(Action(what=update), Action(REUSE.weights, update), Action(REUSE.weights, update))
    assert check(rows, builder, start=1).state.report.cold_starts == [1]


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


def test_a_forecast_after_a_cold_start_waits_for_two_stored_values(builder: ProgramBuilder) -> None:
    forecast = Action(LINE)
    rows = column(COMPUTE, COMPUTE, forecast, forecast, COMPUTE, forecast, COMPUTE, forecast)
    assert check(rows, builder, start=2).state.report.cold_starts == [2, 3]


@pytest.mark.parametrize("first", [REUSE, Action(PARABOLA), Action(BLEND), refresh(ScoreBase.RANDOM, 9)])
def test_a_plan_that_reads_before_it_writes_computes_instead(first: Action, builder: ProgramBuilder) -> None:
    rows = tuple(
        tuple(action if site % 2 or action.tokens is None else REUSE for site in range(SITES))
        for action in (first, REUSE, COMPUTE)
    )
    assert check(rows, builder).state.report.cold_starts == [0]


def test_a_slot_is_dropped_at_its_last_reader(builder: ProgramBuilder) -> None:
    rows = column(COMPUTE, REUSE, COMPUTE, REUSE, REUSE)
    runner = Runner(Table(rows, builder), tuple(timesteps(5)))
    sizes = []
    for step in range(5):
        runner.run(steps=[step])
        sizes.append(held_bytes(runner))
    core = 4 * TOKENS * 32 * 4
    assert sizes == [SITES * core, 0, SITES * core, SITES * core, 0]
    assert runner.plan.cache_bytes == SITES * core


def test_a_value_that_is_stored_is_the_tensor_that_was_computed(builder: ProgramBuilder) -> None:
    runner = Runner(Table(column(COMPUTE, REUSE, REUSE), builder), tuple(timesteps(3)))
    runner.run(steps=[0])
    before = {slot: tensor.data_ptr() for slot, tensor in runner.state.contexts[""].store.items()}
    runner.run(steps=[1])
    assert {slot: tensor.data_ptr() for slot, tensor in runner.state.contexts[""].store.items()} == before
