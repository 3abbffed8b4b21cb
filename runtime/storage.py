"""What comes to the accelerator one call before it is read: slots in host memory, and weights that lie elsewhere.

What a step stores leaves the accelerator, and comes back; weights that are offloaded part by part are only read, so
they are dropped when the calls at hand have read them. A call that is skipped has nothing brought.

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
from dicompile.parked import Parked, brought
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

    def mark(self) -> Any:
        """The work that the computation has been given so far."""
        ...

    def fill(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> Copy:
        """Start to copy from the host, to memory that nothing after a mark uses."""
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

    def mark(self) -> Any:
        """See `Lane`."""
        return torch.cuda.current_stream(self.device).record_event()

    def fill(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> Copy:
        """See `Lane`."""
        self.stream.wait_event(mark)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return Copy(source, target, self.stream.record_event())

    def wait(self, copy: Copy) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self.device).wait_event(copy.done)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        return self.fill(target, source, self.mark())


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

    def mark(self) -> Any:
        """See `Lane`."""

    def fill(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> Copy:
        """See `Lane`."""
        del mark
        return Copy(source, target.copy_(source))

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


class Supply:
    """Brings weights that lie elsewhere, during one call of a model.

    Args:
        lane: how they come to the device; None where that is the CPU, which looks them up.

    Attributes:
        bytes: of all that it has brought.
    """

    def __init__(self, lane: Lane | None = None) -> None:
        self.lane, self.bytes = lane, 0

    def bring(self, value: Any) -> Any:
        """A value that is wanted at once; brought, if it is parked."""
        if isinstance(value, Parked):
            self.bytes += value.tensor.nbytes
        return brought(value)

    def reserve(self, parked: Parked) -> torch.Tensor | None:
        """Memory for a weight, if it is copied."""
        return None if self.lane is None else parked.reserve()

    def mark(self) -> Any:
        """The work that the computation has been given, none of which uses later what was reserved."""
        return None if self.lane is None else self.lane.mark()

    def fill(self, parked: Parked, target: torch.Tensor | None, mark: Any) -> Copy:
        """Start to copy a weight to the memory that was reserved for it."""
        self.bytes += parked.tensor.nbytes
        if self.lane is not None and target is not None:
            return self.lane.fill(target, parked.find(), mark)
        value = parked.bring()
        return Copy(value, value)

    def wait(self, copy: Copy) -> None:
        """Let the computation wait until a copy is done."""
        if self.lane is not None:
            self.lane.wait(copy)


class Weights:
    """Weights of one run of a program that lie elsewhere. Their registers hold `Parked` before and after it.

    What the next call reads gets its memory before this call is queued, and is copied afterwards: to read a file, or
    memory that is not pinned, the host has to wait, and the accelerator has this call to work on meanwhile.

    Args:
        program: what runs.
        registers: of it.
        supply: brings them.
    """

    def __init__(self, program: Program, registers: Sequence[Any], supply: Supply) -> None:
        self._supply = supply
        self._needed = [
            [register for register in dict.fromkeys(call.inputs) if isinstance(registers[register], Parked)]
            for call in program.calls
        ]
        self._needed += [[] for _ in range(AHEAD)]
        self._parked: dict[int, Parked] = {}
        self._room: list[tuple[int, torch.Tensor | None]] = []
        self._mark: Any = None
        self._coming: dict[int, Copy] = {}

    def before(self, call: int, registers: list[Any]) -> None:
        """Wait for what this call reads, and make room for what the next one does."""
        if not call:
            self._reserve(0, registers)
            self._fill()
        self._reserve(call + AHEAD, registers)
        for register in self._needed[call]:
            copy = self._coming.pop(register, None)
            if copy is not None:
                self._supply.wait(copy)
                registers[register] = copy.target

    def after(self, call: int, registers: list[Any]) -> None:
        """Copy what the next call reads, now that this one is queued; drop what it does not read."""
        self._fill()
        stay = {register for needed in self._needed[call + 1 : call + 1 + AHEAD] for register in needed}
        for register in self._needed[call]:
            if register not in stay:
                registers[register] = self._parked.pop(register)

    def close(self, registers: list[Any]) -> None:
        """End all copies, those of a run that failed, too, and drop what was brought."""
        for copy in self._coming.values():
            self._supply.wait(copy)
        for register, parked in self._parked.items():
            registers[register] = parked
        self._coming.clear()
        self._parked.clear()

    def _reserve(self, call: int, registers: Sequence[Any]) -> None:
        for register in self._needed[call]:
            if register not in self._parked:
                self._parked[register] = registers[register]
                self._room.append((register, self._supply.reserve(registers[register])))
        self._mark = self._supply.mark()

    def _fill(self) -> None:
        for register, target in self._room:
            self._coming[register] = self._supply.fill(self._parked[register], target, self._mark)
        self._room.clear()


def run_calls(
    program: Program,
    registers: list[Any],
    lane: Lane | None,
    watch: Watch | None = None,
    supply: Supply | None = None,
) -> None:
    """Run the calls of a program on registers.

    Args:
        program: what runs.
        registers: of it.
        lane: how slots go to host memory and back, if they do.
        watch: is shown what the calls have made.
        supply: brings weights that lie elsewhere, if any do.
    """
    moves = None if lane is None else Offload(program, lane)
    weights = None if supply is None else Weights(program, registers, supply)
    try:
        for number, call in enumerate(program.calls):
            if weights is not None:
                weights.before(number, registers)
            if moves is not None:
                moves.before(number, registers)
            _run_call(call.function, call.inputs, call.outputs, registers)
            for register in call.frees:
                registers[register] = None
            if watch is not None:
                watch.after(call.outputs, registers)
            if moves is not None:
                moves.after(number, registers)
            if weights is not None:
                weights.after(number, registers)
    finally:
        if moves is not None:
            moves.close()
        if weights is not None:
            weights.close(registers)


def _run_call(function: Any, inputs: Sequence[int], outputs: Sequence[int], registers: list[Any]) -> None:
    """Run a segment; its own references to what it read and made end with it."""
    for register, result in zip(outputs, function(*[registers[i] for i in inputs]), strict=True):
        registers[register] = result
