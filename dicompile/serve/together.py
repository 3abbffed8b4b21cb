"""Calls of several requests as one: their rows put into one batch, one forward, and everybody's rows given back.

A request with two rows, for guidance, is joined with another one as both first rows, then both second rows: what a
policy does to the halves of a batch it does to the same rows then. What a request remembers stays its own: slots are
copied into the batch where a step reads them, and out of it where it writes them. So memory goes back with the request
that has it, whoever else was in its batches, and a group need not stay together. What that costs is counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dicompile.analysis import WHOLE
from dicompile.batch import why_mixed
from dicompile.capture import Arguments, Capture
from dicompile.compiler import Options
from dicompile.errors import CannotBatch, CannotCapture
from dicompile.lower import Program
from dicompile.model import Found, Frame, ModelCalls
from dicompile.policies import NoCache
from dicompile.runtime import SchedulerLink, Step, run_calls, streams
from dicompile.runtime.rows import empty_rows


@dataclass(frozen=True)
class Call:
    """A step of one request, ready to run.

    Attributes:
        step: what runs.
        registers: of its program; everything that it reads is there.
        frame: the code of the request by itself.
        arguments: of the model.
        rows: of its batch.
        options: of its policy.
        stream: on which its thread queues work for the accelerator, if there is one.
    """

    step: Step
    registers: list[Any]
    frame: Frame
    arguments: Arguments
    rows: int
    options: Options
    stream: torch.Stream | None = None

    @property
    def has_rows(self) -> tuple[bool, ...]:
        """For every tensor that was given, whether its first axis counts rows of the batch."""
        return tuple(tensor.ndim > 0 and tensor.shape[0] == self.rows for tensor in self.arguments.given)


def _loaded(program: Program) -> dict[Hashable, int]:
    """Registers of what a program reads for every row, besides inputs, by what it is."""
    return {
        **dict(program.reads),
        **{("noise", item.site): item.register for item in program.noise},
        **{("predicted", item.block): item.register for item in program.predicted},
        **{("partner", i): register for i, register in enumerate(program.partners)},
    }


def _left(program: Program) -> dict[Hashable, int]:
    """Registers of what a program leaves, by what it is."""
    return {
        **{("result", i): r for i, r in enumerate(program.results) if isinstance(r, int)},
        **{("write", slot): register for slot, register in program.writes},
        **{("chosen", site): register for site, register in program.chosen},
    }


class Together:
    """Runs steps of several requests as one.

    Args:
        options: of the requests, but for what they do not share: policy and schedule.
        module: the model.

    Attributes:
        copied: bytes of slots that were copied into batches and out of them.
        captures: so many batch sizes and settings were captured.
    """

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        trunk = options.policy.trunk
        policy = NoCache() if trunk == WHOLE else options.policy
        self._calls = ModelCalls(module, replace(options, policy=policy, link=SchedulerLink(1)))
        self._checked: weakref.WeakKeyDictionary[Capture, set[int]] = weakref.WeakKeyDictionary()
        self.copied, self.captures = 0, 0

    def run(self, calls: Sequence[Call]) -> None:
        """Run the step of every request; what it leaves is in its registers then.

        Work is queued on the stream of the thread that runs this: after what the requests' threads have queued on
        theirs, and before what they will queue.

        Args:
            calls: alike in shapes, settings and what they do.

        Raises:
            CannotBatch: the model mixes the rows of a batch, or cannot be captured for a larger one.
        """
        with streams.after([call.stream for call in calls]):
            self._run(calls)

    def _run(self, calls: Sequence[Call]) -> None:
        first = calls[0]
        frame, _, inputs = self._found(calls)
        program = frame.compiled.programs.program(first.step.planned)
        constants = frame.compiled.run.constants
        registers: list[Any] = [*inputs, *constants, *[None] * (program.registers - len(inputs) - len(constants))]
        self._load(program, registers, calls)
        run_calls(program, registers, None)
        left = _left(program)
        readers = Counter(left.values())  # what a gate compares is a result as well
        for what, register in left.items():
            parts = parted(registers[register], first.rows, len(calls))
            readers[register] -= 1
            if not readers[register]:
                registers[register] = None
            if isinstance(what, tuple) and what[0] == "write":
                self.copied += sum(part.nbytes for part in parts)
            for call, part in zip(calls, parts, strict=True):
                call.registers[_left(call.step.program)[what]] = streams.give(part, call.stream)

    def _load(self, program: Program, registers: list[Any], calls: Sequence[Call]) -> None:
        own = [_loaded(call.step.program) for call in calls]
        for what, register in _loaded(program).items():
            parts = [call.registers[known[what]] for call, known in zip(calls, own, strict=True)]
            registers[register] = joined(parts, calls[0].rows)
            self.copied += registers[register].nbytes
        first = calls[0]
        ints = {(item.site, item.is_count): item.register for item in first.step.program.ints}
        weights = {item.site: item.register for item in first.step.program.weights}
        for number in program.ints:
            registers[number.register] = first.registers[ints[number.site, number.is_count]]
        for item in program.weights:
            registers[item.register] = first.registers[weights[item.site]]

    def _found(self, calls: Sequence[Call]) -> Found:
        first = calls[0]
        columns = zip(*(call.arguments.given for call in calls), strict=True)
        tensors = [
            joined(column, first.rows) if has_rows else column[0]
            for has_rows, column in zip(first.has_rows, columns, strict=True)
        ]
        args, kwargs = first.arguments.filled(tensors)
        try:
            found = self._calls.find(Arguments.of(args, kwargs))
        except CannotCapture as error:
            raise CannotBatch(
                f"{type(self._calls.module).__name__} cannot be captured for {len(calls)} requests in one batch",
                where="dicompile.serve",
                why=error.what,
                fix="Batcher(..., sizes=(1,)) runs every request by itself",
            ) from error
        checked = self._checked.setdefault(found[0].known.capture, set())
        if first.rows not in checked:
            self._check(found[0], found[1], first)
            streams.settle(first.stream)  # what the capture has made is read on other streams later
            checked.add(first.rows)
            self.captures += 1
        return found

    def _check(self, frame: Frame, tensors: Sequence[Tensor], call: Call) -> None:
        """Check that no row of the larger batch depends on another one."""
        why = why_mixed(frame, tensors, call.arguments, call.has_rows, call.frame)
        if why:
            raise CannotBatch(
                f"{type(self._calls.module).__name__} is not known to keep the rows of a batch apart",
                where="dicompile.serve, when two requests were to run as one",
                why=why,
                fix="Batcher(..., sizes=(1,)) runs every request by itself",
            )


def joined(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors of several requests as one, their first rows first: ``[rows * s, ...]`` each.

    The result lies in memory as they do, its axes in the same order: code was compiled for that.
    """
    whole = empty_rows(parts[0], len(parts) * parts[0].shape[0])
    for own, part in zip(whole.unflatten(0, (rows, len(parts), -1)).unbind(1), parts, strict=True):
        own.copy_(part.unflatten(0, (rows, -1)))
    return whole


def parted(whole: Tensor, rows: int, count: int) -> list[Tensor]:
    """What `joined` made one, taken apart: copies, each with memory of its own."""
    parts = []
    for part in whole.unflatten(0, (rows, count, -1)).unbind(1):
        parts.append(empty_rows(whole, whole.shape[0] // count))
        parts[-1].unflatten(0, (rows, -1)).copy_(part)
    return parts
