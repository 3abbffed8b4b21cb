"""What a run did, step by step: held against the plan and the report, whatever the machine's speed."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import dicompile
from dicompile.compiler import Stopwatch
from dicompile.errors import NotOptimized, NotYetRun
from dicompile.runtime import CallReport
from dicompile.summary import DONE, ModelSummary, Summary
from tests.models import call, optimized, plain_dit, run, timesteps

STEPS = 6
SITES = 4


@pytest.fixture(scope="module")
def summary() -> Summary:
    torch.manual_seed(0)
    sample = plain_dit(2)
    model = optimized(sample, dicompile.ToCa(interval=3, ratio=0.2), STEPS)
    run(model, sample.inputs, timesteps(STEPS))
    return dicompile.summary(model)


@pytest.fixture
def model(summary: Summary) -> ModelSummary:
    return summary.models[0]


def test_every_step_is_there_and_does_what_was_planned(model: ModelSummary) -> None:
    assert [step.step for step in model.steps] == list(range(STEPS))
    for step, planned in zip(model.steps, model.plan.steps, strict=True):
        assert step.calls == {planned.kind: 1}
        assert step.sites.total() == SITES
        assert step.sites["F"] == sum(site.action.symbol == "F" for site in planned.sites[:SITES])
        assert step.cache_bytes == model.plan.held(step.step) * (step.step < STEPS - 1)


def test_compiling_is_told_from_running(model: ModelSummary) -> None:
    assert all(step.compile_seconds > 0 and step.seconds > 0 for step in model.steps)
    assert model.compile_seconds == pytest.approx(sum(step.compile_seconds for step in model.steps))
    assert model.seconds == pytest.approx(sum(step.seconds for step in model.steps))


def test_a_model_without_a_schedule_is_called_on_and_on_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicompile.runtime.report.MOST_CALLS", 3)
    sample = plain_dit(1)
    model = dicompile.optimize(sample.model, "none", backend="eager")
    for _ in range(5):
        call(model, sample.inputs, 500, seed=0)
    report = dicompile.report(model)
    assert (len(report.calls), report.kinds) == (3, {"full": 5})


def test_a_second_generation_compiles_nothing() -> None:
    sample = plain_dit(2)
    cached = optimized(sample, "fora", STEPS)
    for _ in range(2):
        run(cached, sample.inputs, timesteps(STEPS))
    (model,) = dicompile.summary(cached).models
    assert len(model.report.calls) == STEPS
    assert model.compile_seconds == 0
    assert "compile\ns" not in model.columns()[0]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_it_fits_the_terminal_and_nothing_is_cut(
    summary: Summary, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(summary)
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "…" not in text
    assert text.startswith("PlainDiT, policy toca-3\n  6 calls: ")
    head = text.splitlines()
    words = {word for line in head for word in line.split()}
    assert {"computed", "tokens", "reused", "held", "run"} <= words
    assert DONE["f"] not in text  # nothing was forecast, so there is no column for it


def test_a_notebook_gets_a_table_with_a_row_for_every_step(summary: Summary) -> None:
    html = summary._repr_html_()
    rows = html.partition("<tbody>")[2].partition("</tbody>")[0]
    assert rows.count("<tr>") == STEPS
    assert "src=" not in html


def test_spans_that_are_forecast_have_a_column_of_their_own() -> None:
    sample = plain_dit(2)
    cached = optimized(sample, "taylorseer-lite", 8)
    run(cached, sample.inputs, timesteps(8))
    (model,) = dicompile.summary(cached).models
    forecast = next(step for step in model.steps if step.spans)
    assert (forecast.sites, forecast.spans) == ({"-": SITES}, {"f": 1})
    assert "spans\nforecast" in model.columns()[0]


@pytest.mark.parametrize(("threshold", "said"), [(1e9, "always"), (0.0, "never")])
def test_what_a_gate_decided_is_what_a_step_did(threshold: float, said: str) -> None:
    sample = plain_dit(2)
    cached = optimized(sample, dicompile.FirstBlockCache(threshold), STEPS)
    run(cached, sample.inputs, timesteps(STEPS))
    (model,) = dicompile.summary(cached).models
    recalled = [step.spans.total() > 0 for step in model.steps]
    assert recalled == [step.calls == {"recalled": 1} for step in model.steps]
    assert sum(recalled) == (STEPS - 1 if said == "always" else 0)
    assert any(said in line for line in model.events())


def test_a_cold_start_says_why() -> None:
    sample = plain_dit(2)
    late = 4
    cached = optimized(sample, dicompile.FORA(interval=3), STEPS)
    for step, timestep in enumerate(timesteps(STEPS)):
        with dicompile.cache_context("cond"):
            call(cached, sample.inputs, timestep, step)
        if step >= late:
            with dicompile.cache_context("uncond"):
                call(cached, sample.inputs, timestep, step)
    report = dicompile.report(cached)
    assert report.cold_starts == [late]
    why = "context 'uncond' begins here, or was not called at the step before"
    assert report.cold_reasons == {late: why}
    (model,) = dicompile.summary(cached).models
    assert list(model.events()) == [f"cold start at step {late}: {why}"]
    assert model.steps[late].calls == {"reuse": 1, "full": 1}


def of_calls(model: ModelSummary, *calls: CallReport) -> ModelSummary:
    report = replace(model.report, calls=list(calls))
    return replace(model, report=report)


def test_what_takes_longer_than_planned_is_said(model: ModelSummary) -> None:
    def timed(kind: str, seconds: float) -> list[CallReport]:
        return [CallReport(0, kind, seconds, 0.0, 0)] * 3

    fast = of_calls(model, *timed("full", 1.0), *timed("partial", 0.01))
    assert not [line for line in fast.suggestions() if "of a full one" in line]
    slow = of_calls(model, *timed("full", 1.0), *timed("partial", 2.0))
    (line,) = (line for line in slow.suggestions() if "of a full one" in line)
    assert line.startswith("a partial call takes 200% of a full one")
    (on_gpu,) = (line for line in replace(slow, on_host=False).suggestions() if "of a full one" in line)
    assert 'compile_mode="reduce-overhead"' in on_gpu


def test_time_spent_compiling_leads_to_prepare(model: ModelSummary) -> None:
    compiling = replace(of_calls(model, CallReport(0, "full", 1.0, 5.0, 0)), keeps=True)
    assert any("dicompile.prepare(model)" in line for line in compiling.suggestions())
    assert not any("DICOMPILE_CACHE_DIR" in line for line in compiling.suggestions())
    assert any("DICOMPILE_CACHE_DIR is off" in line for line in replace(compiling, keeps=False).suggestions())
    running = of_calls(model, CallReport(0, "full", 5.0, 1.0, 0))
    assert not any("dicompile.prepare(model)" in line for line in running.suggestions())


def test_a_cache_larger_than_the_weights_is_said(model: ModelSummary) -> None:
    assert not any("larger than the weights" in line for line in model.suggestions())
    small = replace(model, weight_bytes=1)
    assert any("larger than the weights (1 bytes)" in line for line in small.suggestions())


def test_nothing_ran_yet() -> None:
    with pytest.raises(NotOptimized):
        dicompile.summary(plain_dit(1).model)
    sample = plain_dit(1)
    cached = optimized(sample, "fora", STEPS)
    with pytest.raises(NotYetRun):
        dicompile.summary(cached)
    call(cached, sample.inputs, timesteps(STEPS)[0], 0)
    with dicompile.session(), pytest.raises(NotYetRun) as error:
        dicompile.summary(cached)
    assert error.value.what == "PlainDiT has not run in this session"


def test_nested_time_counts_once_and_every_thread_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 4.0])
    monkeypatch.setattr("dicompile.compiler.time.perf_counter", lambda: next(now))
    watch, seen = Stopwatch(), list[float]()
    with watch, watch:
        pass
    thread = threading.Thread(target=lambda: seen.append(watch.seconds))
    thread.start()
    thread.join()
    assert (watch.seconds, seen) == (3.0, [0.0])
