"""Slots in host memory, on a lane that copies only when somebody waits: what is used too early, or too late, shows."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.lower import Call, Program
from dicompile.parked import Home, Parked
from dicompile.runtime.storage import AHEAD, BlockingLane, Copy, Supply, lane_for, run_calls
from dicompile.runtime.work import lane_of
from dicompile.text import size_text
from tests import models
from tests.models import optimized, run, state_of, timesteps
from tests.runtime.runner import SCHEDULE, Runner, held, latent, model, same

POLICIES = ["fora", "toca", "taylorseer", "duca", "clusca"]


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

    def mark(self) -> int:
        return len(self.log)

    def fill(self, target: Tensor, source: Tensor, mark: int) -> Copy:
        """Nothing after the mark may have used the target, so that it had to be there before."""
        self.log.append(f"fill {mark}")
        target.view(torch.uint8).fill_(255)
        self.on_device.add(target)
        self.most = max(self.most, len(self.on_device))
        self.queue.append(Copy(source, target))
        return self.queue[-1]

    def wait(self, copy: Copy) -> None:
        while any(item is copy for item in self.queue):
            first = self.queue.pop(0)
            first.target.copy_(first.source)

    def note(self, name: str) -> Any:
        """A function that does what `identity` does, and is noted when it runs."""

        def function(*tensors: Tensor) -> tuple[Tensor]:
            self.log.append(name)
            return (tensors[-1] + 0,)

        return function

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

    monkeypatch.setattr("dicompile.runtime.work.lane_of", functools.cache(late_lane))
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


# Weights that lie elsewhere.


def parked(value: float) -> Parked:
    """A weight that lies in host memory, and is wanted on a device that the CPU stands for."""
    held = torch.full((4,), value)
    home = Home(torch.device("cpu"), lambda _: held, lambda _: held, is_in_module=False)
    return Parked(torch.empty(4, device="meta"), home)


def layers(lane: LateLane, reads: Sequence[Sequence[int]]) -> Program:
    """Calls that read some of the weights in the first registers, and return the last one of them."""
    first = 1 + max(map(max, reads))
    calls = tuple(Call(f"{i}", lane.note(f"call {i}"), tuple(inputs), (first + i,)) for i, inputs in enumerate(reads))
    return Program(calls, first + len(reads), (), (), (), (), (), (), (), ())  # type: ignore[arg-type]


def test_a_weight_is_copied_while_the_call_before_its_reader_runs_and_dropped_after_it() -> None:
    lane, weights = LateLane(), [parked(i) for i in range(4)]
    registers: list[Any] = [*weights, *[None] * 4]
    supply = Supply(lane)
    run_calls(layers(lane, [[0], [1], [2], [3]]), registers, None, supply=supply)
    assert [float(tensor[0]) for tensor in registers[4:]] == [0, 1, 2, 3]
    # Memory is taken before the call in front of the reader is queued, and filled when it is.
    order = ["fill 0", "call 0", "fill 1", "call 1", "fill 3", "call 2", "fill 5", "call 3"]
    assert lane.log == order
    assert registers[:4] == weights
    assert lane.most == 1 + AHEAD
    assert not lane.on_device
    assert supply.bytes == 4 * 16


def test_what_is_not_read_is_not_brought_and_what_is_read_on_and_on_is_brought_once() -> None:
    supply = Supply(lane := LateLane())
    registers: list[Any] = [*(parked(i) for i in range(4)), *[None] * 4]
    run_calls(layers(lane, [[0, 1], [0, 3], [0], [3]]), registers, None, supply=supply)
    assert sum(entry.startswith("fill") for entry in lane.log) == 4  # 0, 1, 3, and 3 once more
    assert supply.bytes == 4 * 16
    run_calls(layers(lane, [[0, 1], [0, 3], [0], [3]]), registers, None, supply=supply)
    assert supply.bytes == 8 * 16


def test_weights_of_a_run_that_fails_are_parked_again() -> None:
    def fails(*_: Tensor) -> tuple[Tensor]:
        raise KeyboardInterrupt

    lane, weights = LateLane(), [parked(i) for i in range(3)]
    registers: list[Any] = [*weights, *[None] * 3]
    program = layers(lane, [[0], [1], [2]])
    calls = (program.calls[0], Call("fails", fails, (1,), (4,)), program.calls[2])
    with pytest.raises(KeyboardInterrupt):
        run_calls(replace(program, calls=calls), registers, None, supply=Supply(lane))
    assert registers[:3] == weights
    assert lane.queue == []
    assert not lane.on_device


def test_on_the_cpu_weights_are_looked_up() -> None:
    registers, supply = [parked(5), None], Supply()
    run_calls(layers(LateLane(), [[0]]), registers, None, supply=supply)
    assert float(registers[1][0]) == 5
    assert supply.bytes == 16


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_are_brought_give_the_same_bits_and_fewer_of_them_where_less_is_computed(
    policy: str, lanes: list[LateLane]
) -> None:
    runner = Runner(policy)
    wanted = Runner(policy).run()
    own = [item.name for item in model().capture.inputs if not item.role.is_given]
    runner.others = {name: elsewhere(model().sample.model.get_parameter(name)) for name in own}
    assert same(runner.run(), wanted)
    (lane,) = lanes
    assert lane.queue == []
    assert not lane.on_device
    report = runner.state.report
    each = {kind: fetched // report.kinds[kind] for kind, fetched in report.fetched_bytes.items()}
    assert each.keys() == report.kinds.keys()
    assert all(each[kind] < each["full"] for kind in each if kind != "full")
    assert f"{size_text(each['full'])} a full call" in str(report)


def elsewhere(weight: Tensor) -> Any:
    home = Home(torch.device("cpu"), lambda _: weight, lambda _: weight, is_in_module=False)
    return Parked(weight, home)


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
    for copy in (lane.send(tensor), lane.fetch(tensor), lane.fill(torch.empty(3), tensor, lane.mark())):
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
    assert lane_of(torch.device("cpu")) is None
