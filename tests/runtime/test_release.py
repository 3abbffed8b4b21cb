"""Memory: what no later step reads is released, at the latest with the last step, an error, or `dicompile.free`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import dicompile
from dicompile.errors import NotOptimized
from dicompile.lower.inductor import compile_segment
from dicompile.passes import Segment, Value
from dicompile.runtime import RunReport, Session, current_session
from tests.models import call, optimized, plain_dit, run, state_of, timesteps
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, held, latent, model, same

POLICIES = ["fora", "toca", "taylorseer", "duca", "clusca"]


class Watch:
    """Sees every tensor that leaves a segment, and how much of it is alive at every call; holds none of them."""

    def __init__(self) -> None:
        self.made: list[StorageWeakRef] = []
        self.stored: list[StorageWeakRef] = []
        self.alive_at_call: list[int] = []

    def compile_segment(self, segment: Segment, mode: str) -> Any:
        compiled, outputs = compile_segment(segment, mode), tuple(segment.outputs)

        def watched(*arguments: Any) -> Any:
            self.alive_at_call.append(self.alive(self.stored))
            results = compiled(*arguments)
            storages = [StorageWeakRef(result.untyped_storage()) for result in results]
            self.made += storages
            self.stored += [s for s, ref in zip(storages, outputs, strict=True) if not isinstance(ref, Value)]
            return results

        return watched

    @staticmethod
    def alive(storages: list[StorageWeakRef]) -> int:
        return sum(not storage.expired() for storage in storages)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", made.compile_segment)
    return made


def watched(policy: str, *, keep_chosen: bool = False) -> Runner:
    runner = Runner(model().programs(policy))
    current_session().keep_chosen = keep_chosen
    return runner


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.sampled
def test_after_the_last_step_no_tensor_of_the_run_is_left(policy: str, watch: Watch) -> None:
    runner = watched(policy)
    outputs = runner.run()
    assert watch.made
    del outputs
    assert watch.alive(watch.made) == 0  # counted references alone: nothing waits for the garbage collector
    assert runner.state.cache_bytes == runner.state.report.cache_bytes == 0


def test_chosen_tokens_stay_for_whoever_asks_to_watch_them(watch: Watch) -> None:
    runner = watched("toca", keep_chosen=True)
    step = next(i for i, planned in enumerate(runner.plan.steps) if planned.kind == "partial")
    runner.run(steps=range(step + 1))
    assert runner.state.contexts[""].chosen
    current_session().keep_chosen = False
    runner.run(seed=1, steps=range(step + 1))
    assert runner.state.contexts[""].chosen == {}


def test_a_slot_is_released_by_the_call_that_reads_it_last(watch: Watch) -> None:
    runner = watched("fora")
    last = next(i for i in range(1, STEPS) if not runner.plan.steps[i].live)
    runner.run(steps=range(last))
    watch.alive_at_call.clear()
    runner.run(steps=[last])
    assert watch.alive_at_call[0] > 0
    assert watch.alive_at_call[-1] == 0  # the epilogue runs with nothing of the cache in memory


def test_a_refresh_never_holds_two_versions_of_more_than_one_segment(watch: Watch) -> None:
    runner = watched("toca")
    step = next(i for i, planned in enumerate(runner.plan.steps) if planned.kind == "partial")
    runner.run(steps=range(step))
    count = len(held(runner.context))
    watch.alive_at_call.clear()
    runner.run(steps=[step])
    per_block = count // 2  # two blocks
    assert max(watch.alive_at_call) <= count + per_block


@pytest.mark.parametrize("policy", POLICIES)
def test_an_error_releases_everything_while_its_traceback_is_kept(policy: str, watch: Watch) -> None:
    runner = watched(policy)
    runner.run(steps=range(2))
    assert watch.alive(watch.made) > 0
    with pytest.raises(IndexError) as caught:
        runner(SCHEDULE[2], latent(2), torch.tensor([1, 2, 3, 99]))
    assert caught.tb is not None
    assert watch.alive(watch.stored) == 0
    assert runner.state.cache_bytes == 0


@pytest.mark.parametrize("partners", [1, 2])
def test_the_report_tells_the_peak_that_the_plan_predicts_for_every_context(partners: int) -> None:
    runner = Runner("toca")
    largest = 0
    for step in range(STEPS):
        for labels in (LABELS, OTHER_LABELS)[:partners]:
            runner.run(steps=[step], labels=labels)
            assert runner.state.report.cache_bytes == runner.state.cache_bytes
            largest = max(largest, runner.state.cache_bytes)
    assert runner.state.report.peak_cache_bytes == largest == partners * runner.plan.cache_bytes
    assert runner.state.report.cache_bytes == 0


def test_a_report_without_a_cache_does_not_mention_one() -> None:
    report = RunReport()
    report.kinds["full"] += 2
    assert str(report) == "2 calls: 2 full"
    report.hold(3 * 2**19)
    report.hold(2**10)
    assert str(report) == "2 calls: 2 full; cache 1.50 MiB at most, 1.00 KiB now"


# dicompile.free ------------------------------------------------------------------------------------------------------


def test_a_generation_that_was_left_is_freed_by_hand() -> None:
    sample = plain_dit(1)
    cached = optimized(sample, "fora", STEPS)
    expected = run(cached, sample.inputs, timesteps(STEPS))
    for step in range(2):
        call(cached, sample.inputs, timesteps(STEPS)[step], seed=step)
    assert dicompile.report(cached).cache_bytes > 0
    dicompile.free(cached)
    report = dicompile.report(cached)
    assert (report.cache_bytes, report.kinds.total()) == (0, 2)
    assert report.peak_cache_bytes > 0
    assert state_of(cached).contexts == {}
    assert same(run(cached, sample.inputs, timesteps(STEPS)), expected)


def test_a_generation_that_goes_on_after_it_was_freed_is_planned_anew_from_there() -> None:
    runner = Runner("fora")
    step = next(i for i, planned in enumerate(runner.plan.steps) if planned.kind == "reuse")
    runner.run(steps=range(step))
    runner.state.free()
    runner.run(steps=[step])
    assert runner.state.report.kinds == {"full": 1}
    assert runner.state.report.began == step


def test_what_no_later_call_can_read_is_released_in_the_middle_of_a_run() -> None:
    runner = Runner("fora")
    step = next(i for i, planned in enumerate(runner.plan.steps) if planned.live)
    for i in range(step + 1):
        for name in ("cond", "uncond"):
            with dicompile.cache_context(name):
                runner.run(steps=[i])
    before, uncond = runner.state.cache_bytes, runner.state.contexts["uncond"]
    with dicompile.cache_context("cond"):
        runner.run(steps=[step + 1])
        assert held(uncond)
        runner.run(steps=[step + 2])
    assert "uncond" not in runner.state.contexts
    assert (uncond.store, uncond.given, uncond.latent) == ([], {}, None)
    assert runner.state.report.cache_bytes == runner.state.cache_bytes < before


def test_another_session_keeps_what_it_has() -> None:
    sample, other = plain_dit(1), Session()
    cached = optimized(sample, "fora", STEPS)
    with dicompile.session(other):
        for step in range(2):
            call(cached, sample.inputs, timesteps(STEPS)[step], seed=step)
        held = dicompile.report(cached).cache_bytes
    dicompile.free(cached)
    dicompile.free()
    with dicompile.session(other):
        assert dicompile.report(cached).cache_bytes == held > 0
        dicompile.free()
        assert dicompile.report(cached).cache_bytes == 0


def test_without_a_model_everything_of_the_session_is_freed_the_bare_backend_included(watch: Watch) -> None:
    sample = plain_dit(1)
    torch._dynamo.reset()
    compiled = torch.compile(sample.model, backend="dicache", options={"policy": "fora", "steps": 4, "mode": "eager"})
    call(compiled, sample.inputs, timesteps(4)[0], seed=0)
    assert watch.alive(watch.stored) > 0
    dicompile.free()
    assert watch.alive(watch.stored) == 0


def test_restoring_a_model_frees_it(watch: Watch) -> None:
    sample = plain_dit(1)
    cached = optimized(sample, "fora", 4)
    call(cached, sample.inputs, timesteps(4)[0], seed=0)
    assert watch.alive(watch.stored) > 0
    dicompile.restore(cached)
    assert watch.alive(watch.stored) == 0


def test_only_an_optimized_model_can_be_freed() -> None:
    with pytest.raises(NotOptimized, match="this PlainDiT was not optimized"):
        dicompile.free(plain_dit(1).model)
    dicompile.free(optimized(plain_dit(1), "fora", 4))  # nothing ran: nothing to free, no complaint
