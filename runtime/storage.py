"""Slots in host memory: what a step stores leaves the accelerator, and comes back one call before it is read.

Copies run beside the computation, on a stream of their own. At any time the accelerator holds what the running call and
the next one read, and what the last call stored; the rest of the cache lies in pinned memory of the host. No copy makes
the host wait: streams wait for each other.

Memory stays bounded although the host runs ahead of the accelerator: every tensor on it belongs to the stream of the
computation, which waits for a copy before it reuses the memory that the copy reads or writes. Had the copying stream
tensors of its own, or were they handed over by ``record_stream``, nothing could be reused before the host sees that a
copy is done, and a host that is a step ahead would allocate the whole cache once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dicompile.lower import Program
from dicompile.runtime.observe import Watch

AHEAD = 1
"""How many calls before the one that reads it a slot is fetched."""


@dataclass(frozen=True)
class Copy:
    """A copy that was started.

    Attributes:
        source: what is copied; held until the copy is done.
        target: what will hold the same then.
        done: what `Lane.wait` waits for.
    """

    source: torch.Tensor
    target: torch.Tensor
    done: Any = None


class Lane(Protocol):
    """Copies in the order in which they are asked for, beside the computation of the current stream."""

    def send(self, tensor: torch.Tensor) -> Copy:
        """Start to copy to the host what the computation has made so far."""
        ...

    def fetch(self, tensor: torch.Tensor) -> Copy:
        """Start to copy from the host, to memory that the computation does not use any more."""
        ...

    def wait(self, copy: Copy) -> None:
        """Let the computation wait until a copy is done."""
        ...


class CudaLane:
    """Copies through pinned memory on a stream of their own.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, tensor: torch.Tensor) -> Copy:
        """See `Lane`."""
        return self._copy(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))

    def fetch(self, tensor: torch.Tensor) -> Copy:
        """See `Lane`."""
        return self._copy(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device))

    def wait(self, copy: Copy) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self.device).wait_event(copy.done)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return Copy(source, target, self.stream.record_event())


class BlockingLane:
    """Copies one after the other with the computation, for accelerators whose streams nobody tried here.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensor: torch.Tensor) -> Copy:
        """See `Lane`."""
        return Copy(tensor, tensor.to("cpu"))

    def fetch(self, tensor: torch.Tensor) -> Copy:
        """See `Lane`."""
        return Copy(tensor, tensor.to(self.device))

    def wait(self, copy: Copy) -> None:
        """See `Lane`: it is done."""


def lane_for(device: torch.device) -> Lane | None:
    """How slots leave a device; None for the CPU, where they are in host memory already."""
    if device.type == "cpu":
        return None
    return CudaLane(device) if device.type == "cuda" else BlockingLane(device)


class Offload:
    """The copies of one run of a program. Registers of slots hold tensors of the host before and after it.

    Args:
        program: what runs.
        lane: how tensors move.
    """

    def __init__(self, program: Program, lane: Lane) -> None:
        self._lane = lane
        reads = {register for _, register in program.reads}
        writes = {register for _, register in program.writes}
        self._needed: list[list[int]] = []
        last: dict[int, int] = {}
        for number, call in enumerate(program.calls):
            self._needed.append([register for register in dict.fromkeys(call.inputs) if register in reads])
            reads.difference_update(call.inputs)
            last.update(dict.fromkeys((*call.inputs, *call.outputs), number))
        self._leaving: list[list[int]] = [[] for _ in program.calls]
        for register in sorted(writes):
            self._leaving[last[register]].append(register)
        self._started = 0
        self._coming: dict[int, Copy] = {}
        self._going: list[Copy] = []

    def before(self, call: int, registers: list[Any]) -> None:
        """Fetch what the next calls read, and wait for what this one does."""
        while self._started <= min(call + AHEAD, len(self._needed) - 1):
            for register in self._needed[self._started]:
                self._coming[register] = self._lane.fetch(registers[register])
            self._started += 1
        for register in self._needed[call]:
            copy = self._coming.pop(register)
            self._lane.wait(copy)
            registers[register] = copy.target

    def after(self, call: int, registers: list[Any]) -> None:
        """Send what nobody reads any more at this step; release what was sent after the call before."""
        self._release()
        for register in self._leaving[call]:
            copy = self._lane.send(registers[register])
            registers[register] = copy.target
            self._going.append(copy)

    def close(self) -> None:
        """End all copies, those of a run that failed, too: the memory they use is free for the computation then."""
        for copy in self._coming.values():
            self._lane.wait(copy)
        self._coming.clear()
        self._release()

    def _release(self) -> None:
        for copy in self._going:
            self._lane.wait(copy)
        self._going.clear()


def run_calls(program: Program, registers: list[Any], lane: Lane | None, watch: Watch | None = None) -> None:
    """Run the calls of a program on registers, with slots in host memory if there is a lane, and watched if asked."""
    moves = None if lane is None else Offload(program, lane)
    try:
        for number, call in enumerate(program.calls):
            if moves is not None:
                moves.before(number, registers)
            _run_call(call.function, call.inputs, call.outputs, registers)
            for register in call.frees:
                registers[register] = None
            if watch is not None:
                watch.after(call.outputs, registers)
            if moves is not None:
                moves.after(number, registers)
    finally:
        if moves is not None:
            moves.close()


def _run_call(function: Any, inputs: Sequence[int], outputs: Sequence[int], registers: list[Any]) -> None:
    """Run a segment; its own references to what it read and made end with it."""
    for register, result in zip(outputs, function(*[registers[i] for i in inputs]), strict=True):
        registers[register] = result
