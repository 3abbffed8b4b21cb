"""What comes to the accelerator one call before it is read: slots in host memory, and weights that lie elsewhere.

What a step stores leaves the accelerator, and comes back; weights that are offloaded part by part, or spread over
ranks, are only read, so they are dropped when the calls at hand have read them. A call that is skipped has nothing
brought.

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
from typing import Any, ClassVar, Protocol

import torch

from dicompile.errors import PlansDiffer
from dicompile.lower import Program
from dicompile.parked import Parked, brought
from dicompile.runtime.observe import Watch
from dicompile.sharded import Gathering, Sharding, tell

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


class Arriving(Protocol):
    """Weights that one call reads, on their way."""

    def start(self) -> None:
        """Begin what the host may have to wait for; the accelerator has the call before to work on meanwhile."""
        ...

    def take(self) -> list[torch.Tensor]:
        """The weights; what the computation is given from now on waits for them."""
        ...


class Copying:
    """Weights that are copied; or looked up, where they are wanted on the CPU.

    To read a file, or memory that is not pinned, the host has to wait: that begins with `start`.

    Args:
        weights: where they are.
        lane: copies them; None for the CPU.
    """

    def __init__(self, weights: Sequence[Parked], lane: Lane | None) -> None:
        self._weights, self._lane = weights, lane
        self._room = [] if lane is None else [weight.reserve() for weight in weights]
        self._mark = None if lane is None else lane.mark()  # nothing after it uses this room
        self._copies: list[Copy] = []

    def start(self) -> None:
        """See `Arriving`."""
        if self._lane is None:
            self._copies = [Copy(value, value) for value in map(brought, self._weights)]
        else:
            pairs = zip(self._weights, self._room, strict=True)
            self._copies = [self._lane.fill(room, weight.find(), self._mark) for weight, room in pairs]

    def take(self) -> list[torch.Tensor]:
        """See `Arriving`."""
        if self._lane is not None:
            for copy in self._copies:
                self._lane.wait(copy)
        return [copy.target for copy in self._copies]


class Supply:
    """Brings weights that lie elsewhere, during one call of a model.

    Args:
        lane: how they come to the device; None where that is the CPU, which looks them up.

    Attributes:
        bytes: of all that it has brought.
    """

    needs_others: ClassVar[bool] = False
    """True if other ranks have to bring the same weights at the same time."""

    def __init__(self, lane: Lane | None = None) -> None:
        self.lane, self.bytes = lane, 0

    def bring(self, values: Sequence[Any]) -> list[Any]:
        """Values that are wanted at once; those that are parked are brought."""
        parked = [value for value in values if isinstance(value, Parked)]
        self.bytes += sum(weight.nbytes for weight in parked)
        found = iter(self._found(parked))
        return [next(found) if isinstance(value, Parked) else value for value in values]

    def begin(self, weights: Sequence[Parked]) -> Arriving:
        """Bring what a call reads; it is told when the call before that is queued."""
        self.bytes += sum(weight.nbytes for weight in weights)
        return self._begun(weights)

    def agree(self, lacking: Sequence[str]) -> bool:
        """True if all ranks that have to bring weights together bring the same ones in this call.

        Args:
            lacking: what is computed of weights before the first call of the program, by name.
        """
        del lacking
        return True

    def _found(self, weights: Sequence[Parked]) -> Sequence[torch.Tensor]:
        return list(map(brought, weights))

    def _begun(self, weights: Sequence[Parked]) -> Arriving:
        return Copying(weights, self.lane)


class SharedSupply(Supply):
    """Brings weights of which every rank has a part: all ranks gather them at once.

    Args:
        sharding: of any of the weights.
        doing: what this call does, and gathers, in words; equal on all ranks that do the same.
        told: what an error says of this rank.
    """

    needs_others: ClassVar[bool] = True

    def __init__(self, sharding: Sharding, doing: str, told: str) -> None:
        super().__init__()
        self._sharding, self._doing, self._told = sharding, doing, told

    def agree(self, lacking: Sequence[str]) -> bool:
        """See `Supply`; every rank has to ask, once in every call.

        Raises:
            PlansDiffer: ranks do not do the same; raised on all of them.
        """
        mine = self._doing, "\n".join(lacking)
        doing, missing = zip(*tell(mine, self._sharding.group, self._sharding.device), strict=True)
        if len(set(doing)) > 1:
            raise PlansDiffer(
                "ranks that gather weights together take different steps",
                where=self._told,
                why="a rank that computes a block would wait for one that reuses it",
                fix="give all ranks the same policy, schedule, number of steps and calls in each, and room for the "
                "same cache; name guidance contexts (dicompile.cache_context), which their tensors tell otherwise",
            )
        return len(set(missing)) == 1

    def _found(self, weights: Sequence[Parked]) -> Sequence[torch.Tensor]:
        return self._begun(weights).take() if weights else ()

    def _begun(self, weights: Sequence[Parked]) -> Arriving:
        return Gathering([(weight.tensor, sharding_of(weight)) for weight in weights])


def sharding_of(weight: Parked) -> Sharding:
    """How a weight is spread over ranks."""
    assert weight.home.sharding is not None
    return weight.home.sharding


def names_of(weights: Sequence[Parked]) -> str:
    """What tells weights that ranks gather from others."""
    return " ".join(sharding_of(weight).name for weight in weights)


def needed(program: Program, registers: Sequence[Any]) -> list[list[int]]:
    """Registers of weights that lie elsewhere, for every call of a program that reads them."""
    return [
        [register for register in dict.fromkeys(call.inputs) if isinstance(registers[register], Parked)]
        for call in program.calls
    ]


class Weights:
    """Weights of one run of a program that lie elsewhere. Their registers hold `Parked` before and after it.

    What the next call reads is asked for before this one is queued; what the host has to wait for begins afterwards.

    Args:
        program: what runs.
        registers: of it.
        supply: brings them.
    """

    def __init__(self, program: Program, registers: Sequence[Any], supply: Supply) -> None:
        self._supply = supply
        self._needed = [*needed(program, registers), *([] for _ in range(AHEAD))]
        self._parked: dict[int, Parked] = {}
        self._coming: dict[int, tuple[list[int], Arriving]] = {}

    def before(self, call: int, registers: list[Any]) -> None:
        """Ask for what the next call reads, and wait for what this one does."""
        if not call:
            self._begin(0, registers)
            self._start(0)
        self._begin(call + AHEAD, registers)
        if call in self._coming:
            wanted, arriving = self._coming.pop(call)
            for register, weight in zip(wanted, arriving.take(), strict=True):
                registers[register] = weight

    def after(self, call: int, registers: list[Any]) -> None:
        """Start to copy what the next call reads, now that this one is queued; drop what it does not read."""
        self._start(call + AHEAD)
        stay = {register for needed in self._needed[call + 1 : call + 1 + AHEAD] for register in needed}
        for register in self._needed[call]:
            if register not in stay:
                registers[register] = self._parked.pop(register)

    def close(self, registers: list[Any]) -> None:
        """End all that has begun, in a run that failed, too, and drop what was brought."""
        for _, arriving in self._coming.values():
            arriving.take()
        for register, parked in self._parked.items():
            registers[register] = parked
        self._coming.clear()
        self._parked.clear()

    def _begin(self, call: int, registers: Sequence[Any]) -> None:
        wanted = [register for register in self._needed[call] if register not in self._parked]
        if wanted:
            self._parked |= {register: registers[register] for register in wanted}
            self._coming[call] = wanted, self._supply.begin([registers[register] for register in wanted])

    def _start(self, call: int) -> None:
        if call in self._coming:
            self._coming[call][1].start()


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
