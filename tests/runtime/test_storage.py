"""Slots in host memory, on a lane that copies only when somebody waits: what is used too early, or too late, shows."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.lower import Call, Program
from dicompile.runtime.execute import _lane_of
from dicompile.runtime.storage import AHEAD, BlockingLane, Copy, lane_for, run_calls
from tests import models
from tests.models import optimized, run, state_of, timesteps
from tests.runtime.runner import SCHEDULE, Runner, held, latent, same

POLICIES = ["fora", "toca", "taylorseer", "duca"]


class LateLane:
    """Copies in order, and only when a copy is waited for; until then a target holds no numbers."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.queue: list[Copy] = []
        self.on_device: weakref.WeakSet[Any] = weakref.WeakSet()
        self.log: list[str] = []
        self.most = 0

    def send(self, tensor: Tensor) -> Copy:
        return self._start("send", tensor)

    def fetch(self, tensor: Tensor) -> Copy:
        copy = self._start("fetch", tensor)
        self.on_device.add(copy.target)
        self.most = max(self.most, len(self.on_device))
        return copy

    def wait(self, copy: Copy) -> None:
        while any(item is copy for item in self.queue):
            first = self.queue.pop(0)
            first.target.copy_(first.source)

    def _start(self, name: str, tensor: Tensor) -> Copy:
        target = torch.empty_like(tensor)
        target.view(torch.uint8).fill_(255)  # not a number, in every dtype of floats
        self.log.append(name)
        self.queue.append(Copy(tensor, target))
        return self.queue[-1]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[LateLane]:
    """Every lane that executors make, one for a device; the CPU counts as an accelerator."""
    made: list[LateLane] = []

    def late_lane(device: torch.device) -> LateLane:
        made.append(LateLane(device))
        return made[-1]

    monkeypatch.setattr("dicompile.runtime.execute._lane_of", functools.cache(late_lane))
    return made


def offloading(policy: str) -> Runner:
    return Runner(policy, offload=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_from_host_memory_gives_the_same_bits(policy: str, lanes: list[LateLane]) -> None:
    runner = offloading(policy)
    wanted = Runner(policy).run()
    assert same(runner.run(), wanted)
    assert same(runner.run(), wanted)
    (lane,) = lanes
    assert {"send", "fetch"} == set(lane.log)
    assert lane.queue == []
    assert runner.state.cache_bytes == 0
    assert runner.state.report.cold_starts == []


def test_between_two_calls_nothing_of_the_cache_is_on_the_accelerator(lanes: list[LateLane]) -> None:
    runner = offloading("toca")
    for step in range(len(runner.plan.steps)):
        runner.run(steps=[step])
        assert not any(tensor in lanes[0].on_device for tensor in held(runner.context))
        assert len(held(runner.context)) == len(runner.plan.steps[step].live)


def identity(tensor: Tensor) -> tuple[Tensor]:
    return (tensor + 0,)


def line(blocks: int) -> Program:
    """Every block reads a slot and writes it; register 0 is unused."""
    slots = [f"slot {i}" for i in range(blocks)]
    calls = tuple(Call(f"block{i}", identity, (1 + i,), (1 + blocks + i,), (1 + i,)) for i in range(blocks))
    reads = tuple((slot, 1 + i) for i, slot in enumerate(slots))
    writes = tuple((slot, 1 + blocks + i) for i, slot in enumerate(slots))
    return Program(calls, 1 + 2 * blocks, reads, writes, (), (), (), (), (), ())  # type: ignore[arg-type]


def filled(blocks: int) -> list[Any]:
    return [None, *(torch.full((4,), float(i)) for i in range(blocks)), *[None] * blocks]


def test_the_accelerator_never_holds_more_than_what_this_call_and_the_next_read() -> None:
    lane, registers = LateLane(), filled(8)
    run_calls(line(8), registers, lane)
    assert [float(tensor[0]) for tensor in registers[9:]] == list(range(8))
    assert lane.most == 1 + AHEAD
    assert not any(tensor in lane.on_device for tensor in registers[9:])


def test_a_slot_is_fetched_before_the_call_in_front_of_its_reader_runs() -> None:
    lane, registers = LateLane(), filled(3)
    run_calls(line(3), registers, lane)
    assert lane.log == ["fetch", "fetch", "send", "fetch", "send", "send"]


def test_a_value_that_a_later_call_reads_stays_until_then() -> None:
    lane = LateLane()
    calls = (Call("first", identity, (0,), (1,)), Call("second", identity, (1,), (2,), (2,)))
    program = Program(calls, 3, (), (("slot", 1),), (), (), (), (), (), ())  # type: ignore[arg-type]
    registers: list[Any] = [torch.ones(4), None, None]
    run_calls(program, registers, lane)
    assert torch.equal(registers[1], torch.ones(4))
    assert lane.log == ["send"]


def test_copies_of_a_run_that_fails_come_to_an_end() -> None:
    def fails(_: Tensor) -> tuple[Tensor]:
        raise KeyboardInterrupt

    program, lane, registers = line(4), LateLane(), filled(4)
    calls = (program.calls[0], Call("fails", fails, (2,), (6,)), *program.calls[2:])
    with pytest.raises(KeyboardInterrupt):
        run_calls(replace(program, calls=calls), registers, lane)
    assert lane.queue == []


def test_without_a_lane_calls_just_run() -> None:
    registers = filled(3)
    run_calls(line(3), registers, None)
    assert [float(tensor[0]) for tensor in registers[4:]] == [0, 1, 2]


def test_an_error_leaves_nothing_behind(lanes: list[LateLane]) -> None:
    runner = offloading("fora")
    runner.run(steps=range(2))
    with pytest.raises(IndexError):
        runner(SCHEDULE[2], latent(2), torch.tensor([1, 2, 3, 99]))
    assert lanes[0].queue == []
    assert runner.state.cache_bytes == 0
    assert same(runner.run(), Runner("fora").run())


def test_on_the_cpu_slots_are_in_host_memory_already() -> None:
    assert lane_for(torch.device("cpu")) is None
    sample = models.plain_dit(1)
    plain = optimized(sample, "fora", 4)
    wanted = run(plain, sample.inputs, timesteps(4))
    model = optimized(sample, "fora", 4, cache_device="cpu")
    assert same(run(model, sample.inputs, timesteps(4)), wanted)
    assert "in host memory" in dicompile.plan_of(model).summary()
    assert state_of(model).cache_bytes == 0


def test_narrow_slots_travel_with_their_scales(lanes: list[LateLane]) -> None:
    sample = models.plain_dit(1)
    wanted = run(optimized(sample, "toca", 6, cache_dtype="float8_e4m3fn"), sample.inputs, timesteps(6))
    both = optimized(sample, "toca", 6, cache_dtype="float8_e4m3fn", cache_device="cpu")
    assert same(run(both, sample.inputs, timesteps(6)), wanted)
    assert lanes[0].log.count("fetch") > 0


def test_a_device_that_nobody_tried_copies_while_it_waits() -> None:
    lane = BlockingLane(torch.device("cpu"))
    tensor = torch.randn(3)
    for copy in (lane.send(tensor), lane.fetch(tensor)):
        lane.wait(copy)
        assert torch.equal(copy.target, tensor)
    assert isinstance(lane_for(torch.device("meta")), BlockingLane)


def test_executors_of_a_device_share_its_lane(lanes: list[LateLane]) -> None:
    wanted = Runner("fora").run()
    for _ in range(2):
        runner = offloading("fora")
        assert same(runner.run(), wanted)
        assert same(runner.run(), wanted)
    assert len(lanes) == 1
    assert _lane_of(torch.device("cpu")) is None
