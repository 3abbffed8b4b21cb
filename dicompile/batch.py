"""Rows of a batch that are told apart: some of them as a call of their own, and that no row sees another one.

A gate may decide about every sample by itself, or run one guidance half of a batch alone. Then some rows of a call do
one thing at a step, and others another; what they are by themselves is found, and captured, as any call of the user is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dicompile.analysis import mixed_samples
from dicompile.capture import Arguments, Role
from dicompile.errors import CannotBatch, CannotCapture
from dicompile.plan import Gate
from dicompile.runtime.rows import Batch, Part, picked

if TYPE_CHECKING:
    from dicompile.model import Found, Frame, ModelCalls


def batch_of(calls: ModelCalls, gate: Gate, arguments: Arguments, found: Found) -> Batch | None:
    """The rows of a call, for a gate that tells them apart; None where all of them are one picture.

    The first call of every shape shows that the model keeps rows apart, by those of one picture or guidance half.

    Args:
        calls: of the model.
        gate: of its policy.
        arguments: of the call, with a timestep for every row.
        found: the code for it.

    Raises:
        CannotBatch: they do not make up two guidance halves, or the model mixes them.
    """
    frame, _, inputs = found
    latent = input_of(frame, inputs, Role.LATENT)
    assert latent is not None
    rows, name = len(latent), type(calls.module).__name__
    if gate.halves and rows % 2:
        raise CannotBatch(
            f"{name} was called with {rows} row{'s'[: rows - 1]}, which are no two guidance halves",
            where=f"a gate with halves={gate.halves!r}",
            why="half of the rows of every call are one half's",
            fix="leave halves out where every half has a call of its own, or where there is no guidance",
        )
    if rows == gate.unit and not gate.leads:
        return None
    if not frame.parted:
        single = gate.leading(rows)[0] if gate.leads else range(0, rows, rows // gate.unit)
        _found(calls, arguments, found, rows, single)
    return Batch(rows, functools.partial(_part, calls, arguments, found, rows))


def input_of(frame: Frame, inputs: Sequence[Any], role: Role) -> Tensor | None:
    """The input of a call with a role, if there is one."""
    position = frame.known.capture.input_position(role)
    return None if position is None else inputs[position]


def with_timesteps(calls: ModelCalls, arguments: Arguments) -> tuple[Arguments, Found]:
    """Arguments of a call, with a timestep for every row of its latent, and the code for them.

    Raises:
        CannotBatch: the timestep or the latent cannot be told, or the model takes one timestep for all rows.
    """
    found = calls.find(arguments)
    time, latent = (input_of(found[0], found[2], role) for role in (Role.TIMESTEP, Role.LATENT))
    if time is None or latent is None or not latent.ndim:
        raise _cannot(
            calls,
            "its timestep or latent cannot be told",
            "rows may be at different timesteps, and the latent has as many rows",
            'say which inputs they are: timestep="its name", latent="its name"',
        )
    if time.ndim > 1 or (time.ndim == 1 and not len(time) == 1 < len(latent)):
        return arguments, found
    single = time.to(torch.float32) if time.dtype is torch.float64 else time
    rows = single.to(latent.device).expand(len(latent))
    args, kwargs = arguments.mapped(lambda _, leaf: rows if leaf is time else leaf)
    kwargs |= dict.fromkeys(arguments.numbers, rows)
    made = calls.arguments(args, kwargs)
    try:
        return made, calls.find(made)
    except Exception as error:
        raise _cannot(
            calls,
            "it takes one timestep for all rows, and none for each",
            str(error).splitlines()[0],
            "let its forward take a timestep of shape [b]",
        ) from error


def _cannot(calls: ModelCalls, what: str, why: str, fix: str) -> CannotBatch:
    name = type(calls.module).__name__
    return CannotBatch(f"the rows of a batch of {name} cannot be told apart: {what}", where="capture", why=why, fix=fix)


def _part(calls: ModelCalls, arguments: Arguments, found: Found, count: int, rows: Sequence[int]) -> Part:
    """Some rows of a call, as a call of their own."""
    frame, _, inputs = _found(calls, arguments, found, count, rows)
    return Part(frame.compiled.run, inputs)


def _found(calls: ModelCalls, arguments: Arguments, whole: Found, count: int, rows: Sequence[int]) -> Found:
    """The code for some rows of a call.

    Raises:
        CannotBatch: the model mixes rows, or cannot be captured for so few.
    """
    has_rows = [tensor.ndim > 0 and tensor.shape[0] == count for tensor in arguments.given]
    with torch.no_grad():
        given = [
            picked(tensor, rows, count) if has else tensor
            for tensor, has in zip(arguments.given, has_rows, strict=True)
        ]
    args, kwargs = arguments.filled(given)
    try:
        found = calls.find(calls.arguments(args, kwargs))
    except CannotCapture as error:
        raise _mixes(calls, f"it cannot be captured for {len(rows)} of {count} rows: {error.what}") from error
    frame, tensors, _ = whole
    if len(rows) not in frame.parted:
        why = why_mixed(frame, tensors, arguments, has_rows, found[0])
        if why:
            raise _mixes(calls, why)
        frame.parted.add(len(rows))
    return found


def _mixes(calls: ModelCalls, why: str) -> CannotBatch:
    return CannotBatch(
        f"{type(calls.module).__name__} is not known to keep the rows of a batch apart",
        where="a gate with decides='sample' or halves",
        why=why,
        fix="leave both out of the gate, so that one decision holds for the whole call",
    )


def why_mixed(
    frame: Frame, tensors: Sequence[object], arguments: Arguments, has_rows: Sequence[bool], smaller: Frame
) -> str:
    """Why rows of a batch may depend on each other; empty if they do not.

    Args:
        frame: code for the batch.
        tensors: of its call, as `Found` has them.
        arguments: of its call, or of one that differs in nothing but the number of rows.
        has_rows: for every tensor that was given, whether its first axis counts rows.
        smaller: code for fewer rows.
    """
    capture, alone, captured = frame.known.capture, smaller.known.capture, frame.captured
    own = len(tensors) - len(arguments.tensors) - len(captured.constants)
    given = {own + i for i, has in enumerate(has_rows) if has}
    are_alike = [item.name for item in capture.inputs] == [item.name for item in alone.inputs] and all(
        torch.equal(ours, theirs) for ours, theirs in zip(capture.constants, alone.constants, strict=True)
    )
    if not are_alike:
        return "its code makes other constants for another size of the batch"
    rows = [i for i, place in enumerate(captured.order) if place in given]
    return mixed_samples(capture, frame.compiled.structure, rows, alone)
