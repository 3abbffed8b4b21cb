"""Who remembers: guidance contexts, sessions, threads and tasks never see each other's features."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import CannotCapture
from dicompile.runtime import Session, current_session
from dicompile.runtime.session import current_context
from tests.models import call, optimized, plain_dit, run, state_of, timesteps
from tests.runtime.runner import LABELS, OTHER_LABELS, SCHEDULE, STEPS, Runner, latent, model, same

POLICIES = ["fora", "toca"]
Partners = tuple[list[Tensor], list[Tensor]]


def alone(policy: str, labels: Tensor) -> list[Tensor]:
    return Runner(policy).run(labels=labels)


def in_named_contexts(runner: Runner) -> Partners:
    outputs: Partners = [], []
    for step in range(STEPS):
        for name, labels, output in zip(("cond", "uncond"), (LABELS, OTHER_LABELS), outputs, strict=True):
            with dicompile.cache_context(name):
                output.extend(runner.run(steps=[step], labels=labels))
    return outputs


def by_order(runner: Runner) -> Partners:
    outputs: Partners = [], []
    for step in range(STEPS):
        for labels, output in zip((LABELS, OTHER_LABELS), outputs, strict=True):
            output.extend(runner.run(steps=[step], labels=labels))
    return outputs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("guided", [in_named_contexts, by_order])
@pytest.mark.sampled
def test_guidance_partners_give_what_each_gives_alone(policy: str, guided: Callable[[Runner], Partners]) -> None:
    runner = Runner(policy)
    for _ in range(2):
        cond, uncond = guided(runner)
        assert same(cond, alone(policy, LABELS))
        assert same(uncond, alone(policy, OTHER_LABELS))
        assert runner.state.report.kinds.total() == 2 * STEPS
        assert runner.state.report.cold_starts == []


def test_contexts_are_named_or_numbered() -> None:
    runner = Runner("fora")
    in_named_contexts(runner)
    assert list(runner.state.contexts) == ["cond", "uncond"]
    by_order(runner)
    assert list(runner.state.contexts) == ["", "#1"]


@pytest.mark.parametrize("guided", [in_named_contexts, by_order])
@pytest.mark.parametrize("calls", [1, 2])
def test_guidance_left_at_the_first_step_leaves_no_trace(guided: Callable[[Runner], Partners], calls: int) -> None:
    expected = guided(Runner("toca"))
    runner = Runner("toca")
    for name, labels in [("cond", LABELS), ("uncond", OTHER_LABELS)][:calls]:
        with dicompile.cache_context(name if guided is in_named_contexts else ""):
            runner(SCHEDULE[0], latent(0, seed=5), labels)
    again = guided(runner)
    assert all(same(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("policy", [*POLICIES, "taylorseer"])
def test_a_partner_that_pauses_is_planned_anew_and_the_other_does_not_notice(policy: str, named: bool) -> None:
    runner, pause = Runner(policy), 3
    outputs: Partners = [], []
    for i in range(STEPS):
        with dicompile.cache_context("cond" if named else ""):
            outputs[0].extend(runner.run(steps=[i]))
        if i != pause:
            with dicompile.cache_context("uncond" if named else ""):
                outputs[1].extend(runner.run(steps=[i], labels=OTHER_LABELS))
    assert same(outputs[0], alone(policy, LABELS))
    assert same(outputs[1][:pause], alone(policy, OTHER_LABELS)[:pause])
    assert same(outputs[1][pause:], Runner(policy).run(steps=range(pause + 1, STEPS), labels=OTHER_LABELS))
    report = runner.state.report
    assert report.cold_starts == [pause + 1]
    assert report.kinds == runner.kinds_from(0) + runner.kinds_from(0, pause) + runner.kinds_from(pause + 1)


def test_an_optimized_model_opens_contexts_as_diffusers_pipelines_do() -> None:
    sample = plain_dit(1)
    cached = optimized(sample, "fora", STEPS)
    for step, timestep in enumerate(timesteps(STEPS)):
        for name in ("cond", "uncond"):
            with cached.cache_context(name):
                assert current_context() == name
                call(cached, sample.inputs, timestep, seed=step)
    assert current_context() == ""
    assert list(state_of(cached).contexts) == ["cond", "uncond"]


def test_a_context_ends_where_it_fails() -> None:
    with pytest.raises(ValueError, match="inside"), dicompile.cache_context("cond"):
        raise ValueError("inside")
    assert current_context() == ""


@pytest.mark.parametrize("policy", POLICIES)
def test_two_generations_that_take_turns_need_a_session_each(policy: str) -> None:
    runner, sessions = Runner(policy), (Session(), Session())
    outputs: Partners = [], []
    for step in range(STEPS):
        for seed, (own, output) in enumerate(zip(sessions, outputs, strict=True)):
            with dicompile.session(own):
                output.extend(runner.run(seed=seed, steps=[step]))
    for seed, output in enumerate(outputs):
        assert same(output, Runner(policy).run(seed=seed))


def test_a_session_is_left_as_it_was_found() -> None:
    runner = Runner("fora")
    expected = Runner("fora").run()
    outputs = runner.run(steps=range(4))
    with dicompile.session() as inner:
        assert current_session() is inner
        runner.run(seed=3)
    outputs += runner.run(steps=range(4, STEPS))
    assert same(outputs, expected)


def test_a_cleared_session_remembers_nothing() -> None:
    runner = Runner("fora")
    runner.run(steps=range(2))
    current_session().clear()
    assert runner.state.contexts == {}
    assert runner.state.generation == 0


def test_a_model_that_is_gone_leaves_nothing_in_the_session() -> None:
    with dicompile.session() as own:
        runner = Runner("fora")
        runner.run(steps=range(2))
        assert len(own._states) == 1
        del runner
        assert len(own._states) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_two_threads_at_once_give_what_each_gives_alone(policy: str) -> None:
    runner, together = Runner(policy), threading.Barrier(2)

    def work(seed: int) -> list[Tensor]:
        outputs = []
        for step in range(STEPS):
            together.wait(timeout=60)
            outputs += runner.run(seed=seed, steps=[step])
        return outputs

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, (1, 2)))
    for seed, result in zip((1, 2), results, strict=True):
        assert same(result, Runner(policy).run(seed=seed))


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_that_compile_at_once_do_not_disturb_each_other(policy: str) -> None:
    sample = plain_dit(1)
    cached, together = optimized(sample, policy, STEPS), threading.Barrier(3)

    def work(seed: int) -> list[Tensor]:
        together.wait(timeout=60)
        return run(cached, sample.inputs, timesteps(STEPS), seed)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert len(cached.frames) == 1
    for seed, result in enumerate(results):
        assert same(result, run(cached, sample.inputs, timesteps(STEPS), seed))


def test_threads_that_rewrite_at_once_do_not_disturb_each_other() -> None:
    runner, together = Runner(model().programs("toca")), threading.Barrier(3)

    def work(seed: int) -> list[Tensor]:
        together.wait(timeout=60)
        return runner.run(seed=seed)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    for seed, result in enumerate(results):
        assert same(result, Runner("toca").run(seed=seed))


def test_threads_that_inherit_a_context_still_have_sessions_of_their_own() -> None:
    here = current_session()
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(context.run, current_session).result()
    assert there is not here


def test_a_session_that_was_opened_goes_along_to_other_threads() -> None:
    with dicompile.session() as own, ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.copy_context().run, current_session).result() is own


def test_tasks_that_take_turns_in_one_thread_give_what_each_gives_alone() -> None:
    runner = Runner("toca")
    runner.run(seed=9, steps=range(3))

    async def work(seed: int) -> list[Tensor]:
        outputs = []
        for step in range(STEPS):
            outputs += runner.run(seed=seed, steps=[step])
            await asyncio.sleep(0)
        return outputs

    async def both() -> tuple[list[Tensor], list[Tensor]]:
        return await asyncio.gather(work(1), work(2))

    for seed, result in zip((1, 2), asyncio.run(both()), strict=True):
        assert same(result, Runner("toca").run(seed=seed))


def test_shapes_that_are_new_are_captured_while_other_threads_sample() -> None:
    sample = plain_dit(1)
    model = optimized(sample, "fora", 4)

    def batch(size: int) -> dict[str, Tensor]:
        return {name: value[:size] for name, value in sample.inputs.items()}

    wanted = run(model, batch(4), timesteps(4))
    alone = {size: run(optimized(sample, "fora", 4), batch(size), timesteps(4)) for size in (1, 2, 3)}

    def sample_on(_: int) -> bool:
        return all(same(run(model, batch(4), timesteps(4)), wanted) for _ in range(20))

    with ThreadPoolExecutor(5) as pool:
        sampling = pool.map(sample_on, range(2))
        new = pool.map(lambda size: run(model, batch(size), timesteps(4)), (1, 2, 3))
        assert all(sampling)
        assert all(same(outputs, alone[size]) for size, outputs in zip((1, 2, 3), new, strict=True))
    assert len(model.frames) == 4


def test_a_model_that_cannot_be_captured_leaves_the_lock_to_others() -> None:
    class ReadsTheTimestep(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 2 if torch.sin(t).max().item() > 0 else x

    refused = dicompile.optimize(ReadsTheTimestep(), mode="eager")
    with pytest.raises(CannotCapture):
        refused(torch.ones(2, 4, 8), torch.ones(2))
    sample = plain_dit(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call, optimized(sample, "none", 1), sample.inputs, 999, 0).result(60)
