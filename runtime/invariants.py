"""Tables of what does not depend on the latent: filled when a step asks for it, and dropped with the generation.

A table holds for the very tensors that it was made of: the same objects, unchanged since. A row holds for the very
timestep that it was made for: which one later steps will bring is told from the schedule, and compared when they do. On
an accelerator the answer comes with a delay, so that a step may run before (`Doubt`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dicompile.lower import CHUNK, Invariant
from dicompile.parked import Parked
from dicompile.plan import TimestepSchedule
from dicompile.runtime.storage import Supply

MOST_TABLES = 16
"""Tables that a generation has at once: one for every conditioning that its calls come with."""

RESTS = 2
"""Steps for which a table is kept that is not asked for: conditioning may come in turns, or have changed for good."""

MOST_WRONG = 2
"""Steps of a generation that may run twice since another timestep came than was foretold; later ones wait."""

FORMULAS: tuple[Callable[[Tensor, torch.dtype], Tensor], ...] = (
    lambda times, dtype: times.to(dtype),
    lambda times, dtype: times.to(dtype) / 1000,
    lambda times, dtype: (times / 1000).to(dtype),
    lambda times, dtype: 1 - times.to(dtype) / 1000,
    lambda times, dtype: (1000 - times.to(dtype)) / 1000,
)
"""What pipelines hand a model for a timestep of their scheduler: where it is another function, rows are made singly."""


@dataclass
class Chunk:
    """Values for `CHUNK` steps.

    Attributes:
        times: timestep of every step, in a first axis.
        values: of all steps, by name.
        rows: the same, each step by itself.
    """

    times: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


class Watched:
    """A tensor, and what tells that it has changed.

    Edits through ``tensor.data`` count no version; where that can be had for nothing, on a CPU, some elements are
    looked at. What belongs to the model is held weakly.

    Args:
        tensor: the tensor.
        is_given: it belongs to a call, which may bring an equal one in its place.
    """

    __slots__ = ("_elements", "_is_given", "_place", "_seen", "_tensor", "_version")

    def __init__(self, tensor: Tensor, *, is_given: bool) -> None:
        self._is_given, self._tensor = is_given, (lambda: tensor) if is_given else weakref.ref(tensor)
        self._version, self._place = tensor._version, tensor.data_ptr()
        self._elements = _elements_of(tensor)
        self._seen = [element.value for element in self._elements]

    def is_now(self, tensor: Tensor) -> bool:
        """True if a tensor is the same, or one that is as good."""
        before = self._tensor()
        if before is None or before._version != self._version or before.data_ptr() != self._place:
            return False
        if [element.value for element in self._elements] != self._seen:
            return False
        return before is tensor or (self._is_given and _is_same(before, tensor))


_NUMBERS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


def _elements_of(tensor: Tensor) -> tuple[Any, ...]:
    """Four elements of a tensor, from its first to its last one, to look at where they lie."""
    number = _NUMBERS.get(tensor.element_size())
    if tensor.device.type != "cpu" or number is None or not tensor.numel():
        return ()
    sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
    places = {sum((size - 1) * i // 3 * stride for size, stride in sizes) for i in range(4)}
    return tuple(number.from_address(tensor.data_ptr() + place * tensor.element_size()) for place in sorted(places))


@dataclass
class Table:
    """Values of one model for one conditioning.

    Attributes:
        made_of: every tensor that they depend on.
        fixed: values that hold for every step, by name.
        chunks: values by chunk of the schedule.
        bytes: that it holds.
        step: the last step that it served.
        calls: so many calls of it.
        calls_before: and so many calls of the step before.
    """

    made_of: tuple[Watched, ...] = ()
    fixed: dict[str, Tensor] = field(default_factory=dict)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    bytes: int = 0
    step: int | None = None
    calls: int = 0
    calls_before: int = 0

    def serve(self, step: int) -> None:
        """Note a call."""
        if step != self.step:
            self.step, self.calls_before, self.calls = step, self.calls, 0
        self.calls += 1


@dataclass
class Kept:
    """Tables of one generation.

    Attributes:
        tables: the latest ones.
        made: so many so far. Where there are ever new ones, nothing is computed ahead.
        first_step: the step at which the first one was made.
        is_found: one of them served a second call.
        wrong: so many steps ran with rows of another timestep, and were run anew.
    """

    tables: list[Table] = field(default_factory=list)
    made: int = 0
    first_step: int | None = None
    is_found: bool = False
    wrong: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that they hold."""
        return sum(table.bytes for table in self.tables)


class Doubt:
    """Whether the rows that a step uses are those of its timestep: asked before it runs, answered when it is queued.

    The host would have to wait for all earlier work to know it before, while the accelerator had nothing to do.

    Args:
        row: the timestep that was foretold.
        time: the one that came.
    """

    def __init__(self, row: Tensor, time: Tensor) -> None:
        self._differs = (row != time).any().to("cpu", non_blocking=True)
        self._is_there = None if time.device.type == "cpu" else torch.Event(time.device)
        if self._is_there is not None:
            self._is_there.record()

    @property
    def is_justified(self) -> bool:
        """True if another timestep came. Waits for what was queued before the doubt came up."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return bool(self._differs)


class Tables:
    """Finds and fills the tables of one captured model.

    Args:
        invariants: what is in them, by name.
        timestep: number of the input that is the timestep, or None.
        given: numbers of the inputs that belong to the call.
    """

    def __init__(self, invariants: Mapping[str, Invariant], timestep: int | None, given: frozenset[int]) -> None:
        self.invariants, self.timestep = invariants, timestep
        leaves = {i for item in invariants.values() for i in item.inputs if isinstance(i, int)} - {timestep}
        self._leaves = tuple((i, i in given) for i in sorted(leaves))

    def load(
        self,
        reads: Sequence[tuple[str, int]],
        registers: list[Any],
        kept: Kept,
        schedule: TimestepSchedule,
        step: int,
        *,
        may_doubt: bool = False,
        is_again: bool = False,
        supply: Supply | None = None,
    ) -> Doubt | None:
        """Put values into registers.

        Args:
            reads: name and register of each.
            registers: of the program that runs; the first ones hold the inputs of the model.
            kept: tables of the generation; a new one is added, and one that has served its last call taken out.
            schedule: of the whole run.
            step: of it.
            may_doubt: the step can be run twice, so that comparing its timestep need not wait for a device.
            is_again: the step has run, and a doubt was justified.
            supply: brings weights that lie elsewhere, if any do.

        Returns:
            A doubt to look at when the step has run; where it is justified, load again, and run it again.
        """
        kept.tables = [table for table in kept.tables if table.step is None or table.step >= step - RESTS]
        needs_others = supply is not None and supply.needs_others
        table = self._find(kept, registers, step, once=needs_others)
        if is_again:
            kept.wrong += 1
        else:
            table.serve(step)
        chunk, doubt = None, None
        if any(self.invariants[name].mapped is not None for name, _ in reads):
            chunk, doubt = self._chunk(kept, table, registers, schedule, step, may_doubt=may_doubt)
        values = _Values(self, table, chunk, registers, step, supply)
        if supply is not None and not supply.agree(values.lacking([name for name, _ in reads])):
            values = _Values(self, Table(), None, registers, step, supply)  # for this call alone: all ranks lack all
        for name, register in reads:
            registers[register] = values[name]
        if step + 1 >= schedule.steps and table.calls >= table.calls_before:
            kept.tables = [other for other in kept.tables if other is not table]
        return doubt

    def _chunk(
        self,
        kept: Kept,
        table: Table,
        inputs: Sequence[Any],
        schedule: TimestepSchedule,
        step: int,
        *,
        may_doubt: bool,
    ) -> tuple[Chunk | None, Doubt | None]:
        """Values for many steps, where they are worth being computed at once, and whether it is sure that they hold."""
        is_new = table.calls == 1 and step != kept.first_step and not kept.is_found
        if self.timestep is None or kept.made > MOST_TABLES or not table.made_of or is_new:
            return None, None
        time = inputs[self.timestep]
        number, row = divmod(step, CHUNK)
        known = table.chunks.get(number)
        if known is not None and may_doubt and kept.wrong < MOST_WRONG and _is_waited_for(time):
            return known, Doubt(known.times[row], time)
        return _chunk_of(table, time, schedule, step), None

    def _find(self, kept: Kept, inputs: Sequence[Any], step: int, *, once: bool) -> Table:
        """The table for these inputs; one is not kept where nothing tells that an input has changed.

        A table may serve every step once only: which calls of a step have equal inputs, a rank would decide for itself.
        """
        for table in kept.tables:
            if not (once and table.step == step) and all(
                watched.is_now(_held(inputs[i])) for (i, _), watched in zip(self._leaves, table.made_of, strict=True)
            ):
                kept.is_found = True
                return table
        kept.made += 1
        kept.first_step = step if kept.first_step is None else kept.first_step
        made_of = [(_held(inputs[i]), is_given) for i, is_given in self._leaves]
        if any(tensor.is_inference() for tensor, _ in made_of):
            return Table()
        table = Table(tuple(Watched(tensor, is_given=is_given) for tensor, is_given in made_of))
        kept.tables = [*kept.tables[1 - MOST_TABLES :], table]
        return table


class _Values:
    """Values for one call, by name."""

    def __init__(
        self,
        tables: Tables,
        table: Table,
        chunk: Chunk | None,
        inputs: Sequence[Any],
        step: int,
        supply: Supply | None,
    ) -> None:
        self._tables, self._inputs, self._table, self._chunk = tables, inputs, table, chunk
        self._supply = supply
        self._row, self._alone = step % CHUNK, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        item, chunk = self._tables.invariants[name], self._chunk
        if item.mapped is None or chunk is None:
            known = self._table.fixed if item.mapped is None else self._alone
            if name not in known:
                known[name] = laid_out(item.function(*self._arguments(item, self.__getitem__)), item)
                self._table.bytes += known[name].nbytes if item.mapped is None else 0
            return known[name]
        if name not in chunk.rows:
            chunk.rows[name] = tuple(laid_out(row, item) for row in self._rows(name, chunk).unbind(0))
        return chunk.rows[name][self._row]

    def lacking(self, names: Sequence[str]) -> list[str]:
        """What has to be computed of weights that lie elsewhere before values can be had, in this order."""
        found: dict[str, bool] = {}

        def visit(name: str) -> None:
            if name in found or self._is_known(name):
                return
            inputs = self._tables.invariants[name].inputs
            for before in inputs:
                if isinstance(before, str):
                    visit(before)
            found[name] = any(isinstance(i, int) and isinstance(self._inputs[i], Parked) for i in inputs)

        for name in names:
            visit(name)
        return [name for name, is_of_weights in found.items() if is_of_weights]

    def _is_known(self, name: str) -> bool:
        if self._tables.invariants[name].mapped is None:
            return name in self._table.fixed
        return name in self._alone if self._chunk is None else name in self._chunk.values

    def _arguments(self, item: Invariant, value_of: Callable[[str], Any], times: Tensor | None = None) -> list[Any]:
        """What an invariant is computed of: other ones, and then inputs of the model, which are brought at once."""
        known: dict[int | str, Any] = {name: value_of(name) for name in item.inputs if isinstance(name, str)}
        numbers = [number for number in item.inputs if isinstance(number, int)]
        given = [times if times is not None and i == self._tables.timestep else self._inputs[i] for i in numbers]
        there = given if self._supply is None else self._supply.bring(given)
        known.update(zip(numbers, there, strict=True))
        return [known[key] for key in item.inputs]

    def _rows(self, name: str, chunk: Chunk) -> Any:
        """Values for all steps of a chunk; one that is the same for all as it is."""
        item = self._tables.invariants[name]
        if item.mapped is None:
            return self[name]
        if name not in chunk.values:
            rows = self._arguments(item, lambda before: self._rows(before, chunk), chunk.times)
            chunk.values[name] = item.mapped(*rows)
            self._table.bytes += chunk.values[name].nbytes
        return chunk.values[name]


def _held(value: Any) -> Tensor:
    """The tensor that holds a value, which may be elsewhere."""
    return value.held if isinstance(value, Parked) else value


def _chunk_of(table: Table, time: Tensor, schedule: TimestepSchedule, step: int) -> Chunk | None:
    """The chunk that a step lies in, if it holds for this timestep, or can be made."""
    number, row = divmod(step, CHUNK)
    chunk = table.chunks.get(number)
    if chunk is not None and torch.equal(chunk.times[row], time):
        return chunk
    times = _times_of_chunk(time, schedule, step)
    if times is None:
        return None
    dropped = table.chunks.pop(number, None)
    table.bytes -= sum(value.nbytes for value in dropped.values.values()) if dropped is not None else 0
    table.chunks[number] = Chunk(times)
    return table.chunks[number]


def _times_of_chunk(time: Tensor, schedule: TimestepSchedule, step: int) -> Tensor | None:
    """What the model will be given at the steps of a chunk, if that can be told from this one."""
    first = step - step % CHUNK
    times = schedule.timesteps[first : first + CHUNK]
    if step - first >= len(times):
        return None
    padding = times[-1:] * (CHUNK - len(times))  # rows of no step
    known = torch.tensor([*times, *padding], dtype=torch.float32, device=time.device)
    made = [formula(known, time.dtype) for formula in FORMULAS]
    foretold = [rows.view(-1, *[1] * time.ndim).expand(-1, *time.shape) for rows in made if rows.dtype == time.dtype]
    is_it = torch.stack([(rows[step - first] == time).all() for rows in foretold]).tolist()  # one answer of the device
    return next((rows for rows, is_right in zip(foretold, is_it, strict=True) if is_right), None)


def _is_waited_for(tensor: Tensor) -> bool:
    """True if looking at a value waits for a device."""
    return tensor.device.type != "cpu"


def laid_out(tensor: Tensor, item: Invariant) -> Tensor:
    """A value in the layout that the steps were compiled for."""
    pairs = zip(tensor.shape, tensor.stride(), item.strides, strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in pairs):
        return tensor
    return torch.empty_strided(tensor.shape, item.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _is_same(before: Tensor, now: Tensor) -> bool:
    """True for equal values, where comparing them waits for no device."""
    is_alike = before.shape == now.shape and before.dtype == now.dtype and before.device == now.device
    return is_alike and before.device.type == "cpu" and torch.equal(before, now)
