"""Weights of a class of their own, such as quantised ones, as the plain tensors that they consist of.

torch calls such classes traceable wrapper subclasses: an instance is some tensors and a description of how to put them
together (``__tensor_flatten__``, ``__tensor_unflatten__``), and what it means lies in the operators of its library.
Graphs hold the plain tensors. A linear map with such a weight is one operator, so that whatever its library makes of
it (integers and scales, a decompression, a kernel of its own) is found, cached, refreshed and counted as a linear map,
which it stands for. Where code is compiled, the operator is written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dicompile.errors import CannotCapture


@dataclass(frozen=True, eq=False)
class Wrapper:
    """How tensors are put together to one of another class; equal wrappers are one object.

    Attributes:
        name: for graphs of this process.
        kind: the class.
        parts: attributes that hold tensors, and how those are put together, if they are no plain ones themselves.
        context: whatever else the class wants to know.
        shape: of the whole.
        strides: of the whole.
    """

    name: str
    kind: Any
    parts: tuple[tuple[str, Wrapper | None], ...]
    context: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def put_together(self, tensors: Iterator[Tensor]) -> Tensor:
        """The whole; takes as many plain tensors as it has."""
        inner = {name: next(tensors) if of is None else of.put_together(tensors) for name, of in self.parts}
        made: Tensor = self.kind.__tensor_unflatten__(inner, self.context, self.shape, self.strides)
        return made

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Attributes that lead to its plain tensors."""
        for name, of in self.parts:
            yield from ((name,),) if of is None else ((name, *rest) for rest in of.paths())


_WRAPPERS: dict[str, Wrapper] = {}


def is_wrapped(value: object) -> bool:
    """True for a tensor of a class that consists of other tensors."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def wrapper_of(tensor: Any) -> Wrapper:
    """How a tensor of a class of its own is put together.

    Raises:
        CannotCapture: its class does not describe it in the same way twice.
    """
    names, context = tensor.__tensor_flatten__()
    if not _is_equal(context, tensor.__tensor_flatten__()[1]):
        raise CannotCapture(
            f"whether a weight of class {type(tensor).__name__} is put together as it was cannot be told",
            where="capture",
            why="what its __tensor_flatten__ says of it does not compare equal to itself",
            fix="report it to the library of the class",
        )
    inner = ((name, getattr(tensor, name)) for name in names)
    parts = tuple((name, wrapper_of(value) if is_wrapped(value) else None) for name, value in inner)
    shape, strides = tuple(tensor.shape), tensor.stride()
    for known in _WRAPPERS.values():
        same = (known.kind, known.parts, known.shape, known.strides) == (type(tensor), parts, shape, strides)
        if same and _is_equal(known.context, context):
            return known
    made = Wrapper(f"{type(tensor).__name__}_{len(_WRAPPERS)}", type(tensor), parts, context, shape, strides)
    return _WRAPPERS.setdefault(made.name, made)


def _is_equal(first: object, second: object) -> bool:
    try:
        return bool(first == second)
    except Exception:  # arrays, and whatever else has no answer
        return False


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of."""
    if not is_wrapped(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def put_together(name: str, *parts: Tensor) -> Tensor:
    """The tensor of the class that a wrapper stands for."""
    return _WRAPPERS[name].put_together(iter(parts))


def class_of(name: Any) -> str:
    """Name of the class that a wrapper stands for."""
    return str(_WRAPPERS[name].kind.__name__)


def linear_of(source: Tensor, parts: Sequence[Tensor], bias: Tensor | None, wrapper: str) -> Tensor:
    """A linear map whose weight is put together of plain tensors, as its library computes it."""
    with torch._C._EnableTorchFunction():  # off where compiled code runs, but the library has to be asked
        return F.linear(source, put_together(wrapper, *parts), bias)


@torch.library.custom_op(
    "dicompile::wrapped_linear",
    mutates_args=(),
    schema="(Tensor source, Tensor[] parts, Tensor? bias, str wrapper) -> Tensor",
)
def wrapped_linear(source: Tensor, parts: Sequence[Tensor], bias: Tensor | None, wrapper: str) -> Tensor:
    """The same as one operator.

    Args:
        source: [..., c].
        parts: plain tensors of the weight, [d, c].
        bias: [d], or None.
        wrapper: name of the `Wrapper` of the weight.

    Returns:
        [..., d].
    """
    return linear_of(source, parts, bias, wrapper)


@wrapped_linear.register_fake
def _(source: Tensor, parts: Sequence[Tensor], bias: Tensor | None, wrapper: str) -> Tensor:
    return linear_of(source, parts, bias, wrapper)


@wrapped_linear.register_vmap
def _(_: Any, in_dims: Any, source: Tensor, parts: Sequence[Tensor], bias: Tensor | None, wrapper: str) -> Any:
    """Many times the same weight: rows are rows."""
    at, *others = in_dims
    assert not any(
        itertools.chain.from_iterable(d if isinstance(d, (list, tuple)) else [d is not None] for d in others)
    )
    return wrapped_linear(source.movedim(at, 0), parts, bias, wrapper), 0


WRAPPED_LINEAR = torch.ops.dicompile.wrapped_linear.default
