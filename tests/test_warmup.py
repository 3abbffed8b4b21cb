"""``warmup="background"``: generations run uncached until the code of their plan is there, and say so."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import dicompile
from dicompile import compiler
from dicompile.errors import PolicyDoesNotFit
from dicompile.lower import inductor
from dicompile.lower.workers import Request
from dicompile.plan import TimestepSchedule
from tests.models import Sample, call, dit, optimized, plain_dit, run, state_of, timesteps

STEPS = 4
FORA = dicompile.FORA(interval=2)
UNCACHED = {"uncached": STEPS}
PLANNED = {"full": 3, "reuse": 1}


class Worker:
    """Stands for the other processes: notes what they are asked for, and is done when a test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[Request], Future[None]]] = []
        self.is_done = False

    def ask(self, requests: Sequence[Request]) -> list[Future[None]]:
        future: Future[None] = Future()
        self.asked.append((requests, future))
        if self.is_done:
            future.set_result(None)
        return [future] if requests else []

    def finish(self) -> None:
        for _, future in self.asked:
            if not future.done():
                future.set_result(None)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """Another process; what this one compiles runs operator by operator."""
    made = Worker()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "ask_workers", made.ask)
    monkeypatch.setattr(inductor, "_compiled", lambda graph_module, *_: graph_module.forward)
    return made


def warming(sample: Sample, policy: Any = FORA, steps: int = STEPS) -> Any:
    return optimized(sample, policy, steps, mode="inductor", warmup="background")


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_generation_that_begins_before_its_code_is_there_runs_uncached(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    sample = plain_dit(2)
    module, planned = run(sample.model, sample.inputs, timesteps(STEPS)), optimized(sample, FORA, STEPS)
    model = warming(sample)
    with caplog.at_level(logging.WARNING, "dicompile"):
        for _ in range(2):
            assert same(run(model, sample.inputs, timesteps(STEPS)), module)
            report = dicompile.report(model)
            assert report.kinds == UNCACHED
            assert report.peak_cache_bytes == 0
            assert "its code was still being compiled" in str(report)
    assert [record.message for record in caplog.records] == [
        "compiling in the background; generations of policy fora-2 that begin before it is done run uncached"
    ]
    worker.finish()
    assert same(run(model, sample.inputs, timesteps(STEPS)), run(planned, sample.inputs, timesteps(STEPS)))
    assert dicompile.report(model).kinds == PLANNED
    assert len(worker.asked) == 1


def test_it_moves_over_where_a_generation_begins_and_nowhere_else(worker: Worker) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    for i, timestep in enumerate(timesteps(STEPS)):
        if i == 1:
            worker.finish()
        call(model, sample.inputs, timestep, seed=i)
        call(model, sample.inputs, timestep, seed=100 + i)  # of another trajectory
    assert dicompile.report(model).kinds == {"uncached": 2 * STEPS}
    run(model, sample.inputs, timesteps(STEPS))
    assert dicompile.report(model).kinds == PLANNED


def test_a_partner_that_comes_when_the_code_is_there_runs_uncached_like_the_others(worker: Worker) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    for i, timestep in enumerate(timesteps(STEPS)):
        call(model, sample.inputs, timestep, seed=i)
        worker.finish()
        if i:
            with dicompile.cache_context("late"):
                call(model, sample.inputs, timestep, seed=i)
    assert dicompile.report(model).kinds == {"uncached": 2 * STEPS - 1}


def test_a_fork_asks_anew_for_what_its_parent_waits_for(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    run(model, sample.inputs, timesteps(STEPS))
    monkeypatch.setattr(compiler, "os", SimpleNamespace(getpid=lambda: -1))
    worker.is_done = True  # the parent's is not
    for _ in range(2):
        run(model, sample.inputs, timesteps(STEPS))
    assert len(worker.asked) == 2
    assert dicompile.report(model).kinds == PLANNED


def test_another_number_of_steps_needs_no_other_code(worker: Worker) -> None:
    sample = plain_dit(2)
    run(warming(sample), sample.inputs, timesteps(STEPS))
    worker.finish()
    first = warming(sample)
    run(first, sample.inputs, timesteps(STEPS))
    assert dicompile.report(first).kinds == UNCACHED, "asked for, and not loaded yet"
    worker.finish()
    run(first, sample.inputs, timesteps(STEPS))
    longer = warming(sample, steps=2 * STEPS)
    run(longer, sample.inputs, timesteps(2 * STEPS))
    assert "uncached" not in dicompile.report(longer).kinds
    assert len(worker.asked) == 3
    assert not worker.asked[-1][0]


def test_what_another_process_cannot_compile_is_compiled_here(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    run(model, sample.inputs, timesteps(STEPS))
    worker.asked[0][1].set_exception(ImportError("no module called custom_operators"))
    with caplog.at_level(logging.WARNING, "dicompile"):
        run(model, sample.inputs, timesteps(STEPS))
    assert "done here: no module called custom_operators" in caplog.messages[-1]
    assert dicompile.report(model).kinds == PLANNED


def test_what_cannot_be_compiled_raises_at_the_next_call(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("no code for this operator")

    sample = plain_dit(2)
    model = warming(sample)
    first, second, *_ = timesteps(STEPS)
    call(model, sample.inputs, first, seed=0)
    monkeypatch.setattr(inductor, "_compiled", fails)
    worker.asked[0][1].set_exception(RuntimeError("as there"))
    with pytest.raises(NotImplementedError, match="no code for this operator"):
        call(model, sample.inputs, second, seed=1)
    call(model, sample.inputs, first, seed=0)
    assert len(worker.asked) == 2, "asked for again"
    dicompile.disable(model)
    call(model, sample.inputs, second, seed=1)


def test_what_does_not_fit_raises_at_the_first_call(worker: Worker) -> None:
    sample = dit(1)
    model = warming(sample, dicompile.ToCaPixArt())
    with pytest.raises(PolicyDoesNotFit):
        call(model, sample.inputs, 999, seed=0)
    assert not worker.asked


def test_models_that_are_restored_disabled_or_there_twice(worker: Worker) -> None:
    sample = plain_dit(2)
    restored, kept = warming(sample), warming(sample)
    run(restored, sample.inputs, timesteps(STEPS))
    assert dicompile.restore(restored) is sample.model
    run(kept, sample.inputs, timesteps(STEPS))
    dicompile.disable(kept)
    run(kept, sample.inputs, timesteps(STEPS))
    worker.finish()
    dicompile.enable(kept)
    run(kept, sample.inputs, timesteps(STEPS))
    assert dicompile.report(kept).kinds == PLANNED


def test_weights_that_change_meanwhile_are_those_that_are_used(worker: Worker) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    call(model, sample.inputs, 999, seed=0)
    with torch.no_grad():
        for parameter in sample.model.parameters():
            parameter.mul_(0.5)
    wanted = call(sample.model, sample.inputs, 750, seed=1)
    assert torch.equal(call(model, sample.inputs, 750, seed=1), wanted)
    worker.finish()
    assert torch.equal(call(model, sample.inputs, 999, seed=1), call(sample.model, sample.inputs, 999, seed=1))


def test_samples_at_different_steps_run_uncached_until_there_is_code(worker: Worker) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    mixed = {**sample.inputs, "t": torch.tensor([999, 999, 500, 500])}
    with torch.no_grad():
        assert torch.equal(model(**mixed), sample.model(**mixed))
    assert dicompile.report(model).kinds == {"uncached": 1}


def test_an_error_forgets_an_uncached_generation_like_any_other(worker: Worker) -> None:
    sample = plain_dit(2)
    model = warming(sample)
    call(model, sample.inputs, 999, seed=0)
    worker.finish()
    with pytest.raises(dicompile.errors.CallOutsideSchedule):
        call(model, sample.inputs, 123, seed=0)
    run(model, sample.inputs, timesteps(STEPS))
    assert dicompile.report(model).kinds == PLANNED
    assert not state_of(model).is_uncached


def test_the_bare_backend_warms_up_alike(worker: Worker) -> None:
    sample = plain_dit(2)
    options = {"policy": FORA, "steps": STEPS, "warmup": "background"}
    model = torch.compile(sample.model, backend="dicache", options=options)
    module = run(sample.model, sample.inputs, timesteps(STEPS))
    assert same(run(model, sample.inputs, timesteps(STEPS)), module)
    worker.finish()
    assert same(
        run(model, sample.inputs, timesteps(STEPS)),
        run(optimized(sample, FORA, STEPS), sample.inputs, timesteps(STEPS)),
    )


def test_preparing_asks_for_all_distinct_variants_at_once_if_there_are_workers(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = plain_dit(3)  # a run of two reused blocks, and one of one
    worker.is_done = True
    model = optimized(sample, FORA, STEPS, mode="inductor")
    call(model, sample.inputs, timesteps(STEPS)[0], seed=0)
    compiled = len(model.frames[0].programs.variants.variants)
    monkeypatch.setattr(compiler, "count_workers", lambda: 1)
    wanted = [(model.frames[0].programs, TimestepSchedule.of(1))]
    compiler.compile_ahead(wanted, late=False, progress=False)
    assert not worker.asked
    monkeypatch.setattr(compiler, "count_workers", lambda: 2)
    terminal = functools.partial(Console, force_terminal=True)
    monkeypatch.setattr("dicompile.progress.Console", terminal)
    dicompile.prepare(model, late=False, progress=True)
    assert f"{1 + STEPS}/{1 + STEPS}" in capsys.readouterr().err
    ((requests, _),) = worker.asked
    variants = [v for v in model.frames[0].programs.variants.variants[compiled:] if v.outputs]
    assert 1 < len({request.name for request in requests}) == len(requests) <= len(variants)
    assert all(request.is_known for request in requests), "another process has only to load them"
    dicompile.prepare(model, late=False)
    assert len(worker.asked) == 1, "nothing is left to ask for"


def test_a_gate_decides_when_the_code_of_both_ways_is_there(worker: Worker) -> None:
    sample, policy = plain_dit(2), dicompile.FirstBlockCache(1e9)
    model, planned = warming(sample, policy), optimized(sample, policy, STEPS)
    run(model, sample.inputs, timesteps(STEPS))
    assert state_of(model).report.kinds == UNCACHED
    worker.finish()
    assert same(run(model, sample.inputs, timesteps(STEPS)), run(planned, sample.inputs, timesteps(STEPS)))
    assert state_of(model).report.kinds == {"full": 1, "recalled": STEPS - 1}
