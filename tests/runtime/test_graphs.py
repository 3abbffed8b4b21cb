"""Recorded steps, with a recorder that runs them once more: the same bits, at addresses that never move."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.compiler import Options
from dicompile.errors import InvalidSetting, StaleRead
from dicompile.lower import Backend, Hoist
from dicompile.policies import ToCa, TokenCache, get_policy
from dicompile.runtime import SchedulerLink, Session, current_session
from dicompile.runtime.graphs import Buffers, Graphs, Static
from dicompile.wrapper import CachedModel, record_of
from tests import models
from tests.models import Sample, run, timesteps
from tests.policies import predictors
from tests.runtime.rerun import Recorder, address
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, latent, model, same

POLICIES = ["fora", "toca", "taylorseer", "duca", "clusca"]
WEIGHT = "blocks.0.mlp.0.weight"


@pytest.fixture(autouse=True)
def fresh_session() -> Iterator[None]:
    with dicompile.session():
        yield


def recording(policy: Any = "toca", **changes: Any) -> Runner:
    return Runner(policy, recorder=Recorder(), **changes)


@functools.cache
def plain(policy: str, seed: int = 0) -> list[Tensor]:
    """What a run gives of which nothing is recorded."""
    with dicompile.session():
        return Runner(policy).run(seed)


def graphs_of(runner: Runner) -> Graphs:
    assert runner.executor.graphs is not None
    return runner.owner.graphs_of(runner.executor, runner.executor.graphs)


def counts(runner: Runner) -> tuple[int, int]:
    """Calls that were recorded in this generation, and that were replayed."""
    return runner.state.report.recorded, runner.state.report.replayed


@pytest.mark.parametrize("policy", [*POLICIES, "none"])
@pytest.mark.sampled
def test_recorded_runs_give_the_same_bits_and_later_ones_record_nothing(policy: str) -> None:
    wanted, runner = plain(policy), recording(policy)
    seen = []
    for _ in range(4):
        assert same(runner.run(), wanted)
        seen.append(counts(runner))
    recorded = len(graphs_of(runner)._all[0].recordings)
    assert sum(now for now, _ in seen) == recorded
    assert seen[2:] == [(0, STEPS), (0, STEPS)]
    assert len(graphs_of(runner)._all) == 1


def test_random_scores_are_drawn_outside() -> None:
    source = model().programs(ToCa(score="random"))
    wanted, runner = Runner(source).run(), recording(source)
    assert [same(runner.run(), wanted) for _ in range(3)] == [True] * 3
    other = Runner(source, seed=1)
    assert not same(other.run(), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_never_move(policy: str) -> None:
    runner, places = recording(policy), {}
    for _ in range(3):
        for step in range(STEPS):
            runner.run(steps=[step])
            for slot, tensor in zip(runner.plan.slots, runner.context.store, strict=False):
                if tensor is not None:
                    assert places.setdefault(slot, address(tensor)) == address(tensor)
    assert set(places) == set(runner.plan.slots)
    assert len(set(places.values())) == len(places)


def test_equal_steps_share_a_recording() -> None:
    runner = recording("fora")
    for _ in range(3):
        runner.run()
    whole = runner.link.schedule
    kinds = {runner.source.step(whole, index).key for index in range(STEPS)}
    assert len(graphs_of(runner)._all[0].recordings) == len(kinds) < STEPS


def guided(runner: Runner, first: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Both halves of guidance; the second one joins at a step."""
    outputs: tuple[list[Tensor], list[Tensor]] = [], []
    for step in range(STEPS):
        for name, labels, output in zip(("cond", "uncond"), (LABELS, OTHER_LABELS), outputs, strict=True):
            if name == "cond" or step >= first:
                with dicompile.cache_context(name):
                    output.extend(runner.run(steps=[step], labels=labels))
    return outputs


@pytest.mark.parametrize("policy", ["toca", "taylorseer"])
@pytest.mark.parametrize("first", [0, 3])
def test_guidance_partners_have_buffers_of_their_own(policy: str, first: int) -> None:
    wanted, runner = guided(Runner(policy), first), recording(policy)
    for _ in range(3):
        cond, uncond = guided(runner, first)
        assert same(cond, wanted[0])
        assert same(uncond, wanted[1])
    assert counts(runner) == (0, 2 * STEPS - first)
    assert len(graphs_of(runner)._all) == 2


@pytest.mark.parametrize("policy", ["toca", "taylorseer"])
def test_two_sessions_take_turns(policy: str) -> None:
    wanted, runner = [plain(policy, seed) for seed in range(2)], recording(policy)
    runner.run()
    for _ in range(3):
        sessions, outputs = [Session(), Session()], ([], [])  # type: ignore[var-annotated]
        for step in range(STEPS):
            for seed, session in enumerate(sessions):
                with dicompile.session(session):
                    outputs[seed].extend(runner.run(seed, steps=[step]))
        assert all(same(output, expected) for output, expected in zip(outputs, wanted, strict=True))
    assert len(graphs_of(runner)._all) == 2


def test_threads_sample_at_once() -> None:
    wanted, runner = [plain("toca", seed) for seed in range(3)], recording("toca")
    outputs: dict[int, list[bool]] = {}

    def sample(seed: int) -> None:
        outputs[seed] = [same(runner.run(seed), wanted[seed]) for _ in range(3)]

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == dict.fromkeys(range(3), [True] * 3)
    assert len(graphs_of(runner)._all) <= 3


def test_a_run_that_was_left_keeps_its_buffers_until_the_next_begins() -> None:
    wanted, runner = plain("fora"), recording("fora")
    for steps in (2, STEPS, 3, STEPS):
        assert same(runner.run(steps=range(steps)), wanted[:steps])
    assert len(graphs_of(runner)._all) == 1


@pytest.mark.parametrize("generation", range(3))
def test_an_error_in_a_step_leaves_nothing_behind(generation: int) -> None:
    wanted, runner = plain("taylorseer"), recording("taylorseer")
    for _ in range(generation):
        runner.run()
    runner.run(steps=range(2))
    runner.others["head.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="shape"):
        runner.run(steps=[2])
    runner.others.clear()
    assert runner.state.cache_bytes == 0
    for _ in range(3):
        assert same(runner.run(), wanted)
    assert counts(runner) == (0, STEPS)
    assert len(graphs_of(runner)._all) == 1


def test_a_step_that_cannot_be_recorded_raises_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InvalidSetting("a step of this model cannot be recorded as a CUDA graph")

    wanted, runner = plain("fora"), recording("fora")
    with monkeypatch.context() as patched:
        patched.setattr(graphs_of(runner).recorder, "record", refuse)
        assert same(runner.run(steps=range(2)), wanted[:2])
        for _ in range(2):
            with pytest.raises(InvalidSetting):
                runner.run()
            assert runner.state.cache_bytes == 0
    assert same(runner.run(), wanted)


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_weights_that_change_in_the_middle_of_a_run_count_at_once(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    def outputs(runner: Runner) -> list[Tensor]:
        weight = runner.others[WEIGHT] = dict(model().sample.model.named_parameters())[WEIGHT].detach().clone()
        before = runner.run(steps=range(STEPS // 2))
        if change == "replaced":
            runner.others[WEIGHT] = 2 * weight
        else:
            weight.mul_(2)
        return before + runner.run(steps=range(STEPS // 2, STEPS))

    runner = recording("fora")
    wanted = outputs(Runner("fora"))
    assert not same(wanted, plain("fora"))
    with caplog.at_level(logging.WARNING, "dicompile"):
        for _ in range(3):
            assert same(outputs(runner), wanted)
    assert caplog.text.count("weights were moved or replaced") == 1


def test_a_latent_that_is_written_to_in_place_is_read_at_every_step() -> None:
    runner, x = recording("fora"), latent(0)
    for _ in range(3):
        outputs = [runner(timestep, x.copy_(latent(step))) for step, timestep in enumerate(SCHEDULE)]
        assert same(outputs, plain("fora"))


def test_a_slot_that_somebody_else_wrote_to_is_still_noticed() -> None:
    runner = recording("taylorseer")
    for _ in range(3):
        runner.run()
    kinds = [step.kind for step in runner.plan.steps]
    read = max(i for i in range(1, STEPS) if kinds[i] != "full" and kinds[i - 1] == "full")
    runner.run(steps=range(read))
    for tensor in runner.context.store:
        if tensor is not None:
            tensor.add_(1)
    with pytest.raises(StaleRead, match="is not what the plan says"):
        runner.run(steps=[read])


def test_free_gives_back_what_no_generation_uses() -> None:
    runner, other = recording("fora"), Session()
    with dicompile.session(other):
        runner.run(steps=range(2))
    runner.run()
    report = runner.state.report
    assert report.graph_bytes == runner.owner.graph_bytes > 2 * runner.plan.cache_bytes
    assert f"CUDA graphs {report.recorded} recorded, {report.replayed} replayed, " in str(report)
    used, free = map(weakref.ref, graphs_of(runner)._all)
    current_session().free(runner.owner)
    gc.collect()  # what is run once more refers to its buffers, as a CUDA graph does not
    assert free() is None
    assert used() is not None
    with dicompile.session(other):
        assert same(runner.run(steps=range(2, STEPS)), plain("fora")[2:])
        current_session().clear()
    gc.collect()
    assert used() is None
    assert runner.owner.graph_bytes == 0


def test_nothing_outlives_the_model() -> None:
    runner = recording("toca")
    for _ in range(3):
        runner.run()
    buffers = weakref.ref(graphs_of(runner)._all[0])
    statics = [weakref.ref(static.written) for static in graphs_of(runner)._all[0]._statics.values()]
    del runner.executor
    gc.collect()
    assert buffers() is None
    assert not any(static() is not None for static in statics)


def test_what_a_session_leaves_when_it_ends_is_used_again() -> None:
    runner = recording("fora")
    for _ in range(3):
        with dicompile.session():
            runner.run(steps=range(4))
    assert len(graphs_of(runner)._all) == 1


def test_the_number_of_recordings_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dicompile.runtime.graphs.MOST_RECORDINGS", 2)
    wanted, runner = plain("toca"), recording("toca")
    with caplog.at_level(logging.WARNING, "dicompile"):
        assert [same(runner.run(), wanted) for _ in range(3)] == [True] * 3
    assert len(graphs_of(runner)._all[0].recordings) == 2
    assert "more than 2 different steps" in caplog.text


def slots(*sources: int) -> Any:
    """A step that moves slots so."""
    return SimpleNamespace(moves=sources, slots=tuple(f"slot {i}" for i in range(len(sources))))


def test_the_oldest_of_a_history_moves_first() -> None:
    buffers, values = Buffers(None), [torch.tensor([float(i)]) for i in range(4)]
    store = buffers.keep(slots(~0, ~1, ~2), values, [])
    places = [*map(address, store)]
    store = buffers.keep(slots(~3, 0, 1), values, store)
    assert [float(tensor) for tensor in store if tensor is not None] == [3, 0, 1]
    assert [*map(address, store)] == places


def test_a_slot_that_is_passed_on_to_another_is_read_before_it_is_written() -> None:
    buffers = Buffers(None)
    first, second = buffers.keep(slots(~0, ~1), [torch.tensor([1.0]), torch.tensor([2.0])], [])
    after = buffers.keep(slots(~0, ~1), [second, torch.tensor([3.0])], [first, second])
    assert [float(tensor) for tensor in after if tensor is not None] == [2, 3]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.tensor(5.0).expand(4),
        torch.tensor(7),
        torch.arange(24.0).reshape(4, 6)[:, 1:3],
        torch.empty(0, 3),
    ],
    ids=["contiguous", "transposed", "expanded", "one number", "no axes", "part", "empty"],
)
def test_a_place_has_the_layout_of_what_it_is_for(tensor: Tensor) -> None:
    place = Static(tensor)
    copy = place.copy(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert copy is place.tensor


def recorded_model(
    sample: Sample, policy: Any, steps: int, monkeypatch: pytest.MonkeyPatch, hoist: Hoist | None = None
) -> nn.Module:
    """An optimized model whose steps are recorded, on the CPU."""
    recorder = Recorder()
    monkeypatch.setattr("dicompile.compiler.check_can_record", lambda *_: torch.device("cpu"))
    monkeypatch.setattr("dicompile.compiler.recorder_of", lambda _: recorder)
    link, backend = SchedulerLink(timesteps(steps)), Backend("eager", records_steps=True)
    return CachedModel(sample.model, Options(get_policy(policy), link, backend, hoist=hoist))


@pytest.mark.parametrize(("policy", "hoist"), [("fora", Hoist.ALL), ("none", Hoist.ALL), ("toca", Hoist.NOTHING)])
def test_tables_are_read_by_recordings(policy: str, hoist: Hoist, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, times = models.pixart(1), timesteps(4)
    texts = [{**sample.inputs, "encoder_hidden_states": torch.randn(2, 12, 24)} for _ in range(2)]
    link = SchedulerLink(times)
    model = CachedModel(sample.model, Options(get_policy(policy), link, Backend("eager"), hoist=hoist))
    made = recorded_model(sample, policy, 4, monkeypatch, hoist)
    for text in texts * 3:
        assert same(run(made, text, times), run(model, text, times))
    report = dicompile.report(made)
    assert (report.recorded, report.replayed) == (0, 4)
    assert bool(report.hoisted_bytes) == (hoist is Hoist.ALL)


def test_lora_weights_lie_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, times = models.plain_dit(predictors.LAYERS), timesteps(predictors.STEPS)
    policy = TokenCache(predictors.adapted(), ratio=0.6, intervals=(1, 1))
    wanted = run(models.optimized(sample, policy, predictors.STEPS), sample.inputs, times)
    assert not same(
        wanted, run(models.optimized(sample, predictors.without_lora(policy), len(times)), sample.inputs, times)
    )
    made = recorded_model(sample, policy, len(times), monkeypatch)
    assert [same(run(made, sample.inputs, times), wanted) for _ in range(3)] == [True] * 3
    assert dicompile.report(made).replayed == len(times)


def test_free_and_restore_reach_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = models.plain_dit(1)
    made = recorded_model(sample, "fora", 4, monkeypatch)
    owner = record_of(made).calls.owner  # type: ignore[arg-type]
    for forget in (dicompile.free, dicompile.disable):
        dicompile.enable(made)
        run(made, sample.inputs, timesteps(4))
        assert owner.graph_bytes > 0
        forget(made)
        assert owner.graph_bytes == 0
