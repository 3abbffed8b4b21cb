"""Turns: calls that only run do so together, a call that compiles does so alone, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import CannotCapture
from dicompile.lower.inductor import compile_segment
from dicompile.passes import Segment
from dicompile.turns import Turns
from tests.models import call, optimized, plain_dit, run, timesteps

SECONDS = 60
"""How long anything may wait for another thread."""


class Together:
    """Counts who is inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    def __enter__(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


def test_calls_that_run_share_their_turn() -> None:
    turns, barrier = Turns(), threading.Barrier(3)

    def work(_: int) -> None:
        with turns.running():
            turns.entered()
            barrier.wait(SECONDS)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


def test_a_call_that_compiles_is_alone_to_its_end() -> None:
    turns, compiling, running = Turns(), Together(), Together()

    def work(number: int) -> None:
        for turn in range(30):
            with turns.running():
                turns.entered()
                if (turn + number) % 3:
                    with running:
                        assert compiling.inside == 0
                else:
                    with turns.compiling(), compiling, turns.compiling():
                        assert running.inside == 0
                    with compiling:  # still
                        assert running.inside == 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert compiling.most == 1


def test_all_calls_may_find_at_once_that_they_have_to_compile() -> None:
    turns, barrier, compiling = Turns(), threading.Barrier(3), Together()

    def work(_: int) -> None:
        with turns.running():
            turns.entered()
            barrier.wait(SECONDS)
            with turns.compiling(), compiling:
                pass

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert compiling.most == 1


def test_calls_enter_one_by_one() -> None:
    turns, entering, inside = Turns(), Together(), Together()

    def work(_: int) -> None:
        for _turn in range(50):
            with turns.running():
                with entering:
                    pass
                turns.entered()
                with inside:
                    pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert entering.most == 1


def test_a_call_within_a_call_waits_for_nobody() -> None:
    turns, begun = Turns(), threading.Event()

    def compile_something() -> None:
        begun.set()
        with turns.compiling():
            pass

    with ThreadPoolExecutor(1) as pool, turns.running():
        turns.entered()
        waiting = pool.submit(compile_something)
        assert begun.wait(SECONDS)
        while not turns._waiting:
            pass
        with turns.running():
            assert not waiting.done()


def test_an_error_or_interrupt_ends_a_turn() -> None:
    turns = Turns()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), turns.running(), turns.compiling():
            raise error
        with pytest.raises(error), turns.compiling():
            raise error
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: turns.compiling().__enter__() is None).result(SECONDS)


def test_an_interrupt_while_waiting_leaves_the_call_running(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    with turns.running():
        monkeypatch.setattr(turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.compiling():
            pass
        assert list(turns._running.values()) == [1]
        monkeypatch.undo()
    assert (turns._running, turns._waiting, turns._alone) == ({}, 0, None)


# Optimized models ------------------------------------------------------------------------------------------------


class Meets:
    """A compiler of segments that wait for each other, once they are told to."""

    def __init__(self) -> None:
        self.barrier: threading.Barrier | None = None

    def compile_segment(self, segment: Segment, mode: str) -> Any:
        compiled = compile_segment(segment, mode)

        def meet(*arguments: Any) -> Any:
            if self.barrier is not None:
                self.barrier.wait(SECONDS)
            return compiled(*arguments)

        return meet


def test_threads_that_compile_nothing_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meets = Meets()
    monkeypatch.setattr("dicompile.lower.variants.compile_segment", meets.compile_segment)
    sample = plain_dit(1)
    model = optimized(sample, "fora", 4)
    wanted = [run(model, sample.inputs, timesteps(4), seed) for seed in (1, 2)]
    meets.barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda seed: run(model, sample.inputs, timesteps(4), seed), (1, 2)))
    for outputs, expected in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_shapes_that_are_new_are_captured_while_other_threads_sample() -> None:
    sample = plain_dit(1)
    model = optimized(sample, "fora", 4)

    def batch(size: int) -> dict[str, Tensor]:
        return {name: value[:size] for name, value in sample.inputs.items()}

    wanted = run(model, batch(4), timesteps(4))
    alone = {size: run(optimized(sample, "fora", 4), batch(size), timesteps(4)) for size in (1, 2, 3)}

    def sample_on(_: int) -> bool:
        return all(_same(run(model, batch(4), timesteps(4)), wanted) for _ in range(20))

    with ThreadPoolExecutor(5) as pool:
        sampling = pool.map(sample_on, range(2))
        new = pool.map(lambda size: run(model, batch(size), timesteps(4)), (1, 2, 3))
        assert all(sampling)
        assert all(_same(outputs, alone[size]) for size, outputs in zip((1, 2, 3), new, strict=True))
    assert len(model.frames) == 4


def test_a_model_that_cannot_be_captured_leaves_the_turn_to_others() -> None:
    class ReadsTheTimestep(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 2 if torch.sin(t).max().item() > 0 else x

    refused = dicompile.optimize(ReadsTheTimestep(), mode="eager")
    with pytest.raises(CannotCapture):
        refused(torch.ones(2, 4, 8), torch.ones(2))
    sample = plain_dit(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call, optimized(sample, "none", 1), sample.inputs, 999, 0).result(SECONDS)


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
