"""The same call with other sizes, so that a second capture tells which numbers of a graph follow from which size.

Nobody says which sizes of its arguments a model lets vary, and which belong to it: an image has channels and rows. So
Dynamo is asked: sizes that are equal are taken for one, another number is put in their place, and where the forward can
be traced with it, that size may vary. Nothing is run. A size of which this cannot be told stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dicompile.capture.arguments import Arguments
from dicompile.capture.captured import Captured, Unsettled
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.capture.members import Whole, capture_members
from dicompile.compat import meta_errors_unsaid
from dicompile.errors import CannotCapture, InvalidSetting

log = logging.getLogger("dicompile")

FACTORS = tuple(map(Fraction, ("2", "3", "1/2", "5", "3/2", "7", "11", "13")))
"""What sizes are multiplied with: another factor for every size, so that products of sizes can be told apart."""

_TRIES = 3
"""Factors that are tried of each size."""
_IMAGE = 4
"""Dimensions of a tensor whose second one may count channels."""
_MARKS = "_dynamo_dynamic_indices"


@dataclass(frozen=True, order=True)
class Dim:
    """A dimension of a given tensor.

    Attributes:
        tensor: number of the tensor among those that are given.
        axis: of the tensor.
    """

    tensor: int
    axis: int


@dataclass(frozen=True)
class _Number:
    """Python ints of one value at one place of their lists or dictionaries, such as the height of a grid."""

    value: int
    key: str


@dataclass(frozen=True)
class _Change:
    """What has another size."""

    sizes: Mapping[Dim, int] = field(default_factory=dict)
    numbers: Mapping[_Number, int] = field(default_factory=dict)
    factors: tuple[Fraction, ...] = ()

    def wider(self, dims: Sequence[Dim], size: int, numbers: Sequence[_Number], factor: Fraction) -> _Change | None:
        """The same with other sizes of more dimensions and numbers; None if one would be no whole one, or 1."""
        sizes: dict[Dim, int | Fraction] = {**self.sizes, **dict.fromkeys(dims, size * factor)}
        values: dict[_Number, int | Fraction] = {
            **self.numbers,
            **{number: number.value * factor for number in numbers},
        }
        if any(value.denominator > 1 or value == 1 for value in (*sizes.values(), *values.values())):
            return None
        return _Change(
            {dim: int(value) for dim, value in sizes.items()},
            {number: int(value) for number, value in values.items()},
            (*self.factors, factor),
        )

    def of(self, arguments: Arguments) -> Arguments:
        """The arguments with these sizes and numbers."""
        made = {
            id(tensor): _laid_out_like(tensor, [self.sizes.get(Dim(i, j), n) for j, n in enumerate(tensor.shape)])
            for i, tensor in enumerate(arguments.given)
        }

        def other(path: tuple[Any, ...], leaf: Any) -> Any:
            is_int = type(leaf) is int
            return self.numbers.get(_Number(leaf, str(path[-1])), leaf) if is_int else made.get(id(leaf), leaf)

        args, kwargs = arguments.mapped(other)
        return Arguments.of(args, kwargs, arguments.numbers)


def resized(module: nn.Module, arguments: Arguments) -> tuple[Arguments, Captured] | None:
    """A call with other sizes, and what it captures; None if no size is known to vary.

    Where dimensions were marked (``torch._dynamo.mark_dynamic``) these have other sizes, and no others.

    Args:
        module: the module; it is not run.
        arguments: of a call.

    Raises:
        InvalidSetting: the module cannot be captured with another size of a dimension that was marked.
    """
    marked = marked_dims(arguments)
    plain = unmarked(arguments)
    with meta_errors_unsaid():
        groups = sorted(_groups(arguments).items(), reverse=True)
        change, found = _at_once(module, plain, groups)
        for size, group in groups:
            for dims in _finest_first(group):
                change, found = _widened(module, plain, change, dims, size) or (change, found)
    _check_marked(module, arguments, marked - change.sizes.keys())
    names = arguments.names(module)
    if found is None:
        log.warning(
            "%s takes no other sizes that tracing could find: they are symbols when they vary", type(module).__name__
        )
        return None
    varying = ", ".join(f"{names[dim.tensor]}[{dim.axis}]" for dim in sorted(change.sizes))
    log.info("%s: symbols at once for %s", type(module).__name__, varying)
    return change.of(plain), found


def marked_dims(arguments: Arguments) -> frozenset[Dim]:
    """Dimensions that ``torch._dynamo.mark_dynamic`` has marked as those that vary."""
    given = enumerate(arguments.given)
    return frozenset(Dim(i, axis) for i, tensor in given for axis in getattr(tensor, _MARKS, ()))


def unmarked(arguments: Arguments) -> Arguments:
    """The same without marks, which would make symbols of sizes while Dynamo traces."""
    if not marked_dims(arguments):
        return arguments
    args, kwargs = arguments.filled([tensor.detach() for tensor in arguments.given])
    return Arguments.of(args, kwargs, arguments.numbers)


def _groups(arguments: Arguments) -> dict[int, list[Dim]]:
    """Dimensions that may vary, by size. Those of 1 mean something else to many operators, so that they stay."""
    marked = marked_dims(arguments)
    groups: dict[int, list[Dim]] = {}
    for i, tensor in enumerate(arguments.given):
        static = getattr(tensor, "_dynamo_static_indices", ())
        for axis, size in enumerate(tensor.shape):
            may_vary = Dim(i, axis) in marked if marked else axis not in static
            if may_vary and size > 1 and type(tensor) in (Tensor, FakeTensor):
                groups.setdefault(size, []).append(Dim(i, axis))
    return groups


def _finest_first(group: Sequence[Dim]) -> list[list[Dim]]:
    """Which dimensions of one size may vary together: rows and columns of an image do by themselves, or all do."""
    turns: dict[int, list[Dim]] = {}
    for dim in group:
        turns.setdefault(sum(dim.tensor == other.tensor and other < dim for other in group), []).append(dim)
    return [*turns.values(), [*group]] if len(turns) > 1 else [[*group]]


def _at_once(
    module: nn.Module, arguments: Arguments, groups: Sequence[tuple[int, Sequence[Dim]]]
) -> tuple[_Change, Captured | None]:
    """Another size of all that looks like samples or tokens, which most models take; no change if this one does not.

    What fails does so in tenths of a second: it is tracing to the end that takes long, once for all sizes instead of
    once for each.
    """
    change = _Change()
    for size, group in groups:
        for dims in _finest_first(group):
            likely = _likely([dim for dim in dims if dim not in change.sizes], arguments)
            wider = [change.wider(likely, size, (), factor) for factor in _factors(change)]
            change = next(filter(None, wider), change) if likely else change
    captured = _captured(module, change.of(arguments)) if len(change.factors) > 1 else None
    return (_Change(), None) if captured is None else (change, captured)


def _likely(dims: Sequence[Dim], arguments: Arguments) -> list[Dim]:
    """Those that look like samples or tokens: no features, and no channels of an image or film.

    A row of numbers for each sample is a mask of tokens if there are as many of these, and features if not.
    """
    ndim = [tensor.ndim for tensor in arguments.given]
    channels = {dim for dim in dims if dim.axis == 1 and ndim[dim.tensor] >= _IMAGE}
    features = {dim for dim in dims if (dim.axis, ndim[dim.tensor]) == (2, 3)}
    likely = [dim for dim in dims if dim not in channels | features]
    return likely if any((dim.axis, ndim[dim.tensor]) != (1, 2) for dim in likely) else []


def _factors(change: _Change) -> list[Fraction]:
    """Factors that are tried of the next size."""
    return [factor for factor in FACTORS if factor not in change.factors][:_TRIES]


def _widened(
    module: nn.Module, arguments: Arguments, change: _Change, dims: Sequence[Dim], size: int
) -> tuple[_Change, Captured] | None:
    """Another size of as many of the dimensions as the module takes; None if it takes none."""
    for some in _fewer_and_fewer([dim for dim in dims if dim not in change.sizes], arguments):
        for numbers in _numbers(arguments, change):
            for factor in _factors(change):
                wider = change.wider(some, size, numbers, factor)
                captured = None if wider is None else _captured(module, wider.of(arguments))
                if wider is not None and captured is not None:
                    return wider, captured
    return None


def _fewer_and_fewer(dims: Sequence[Dim], arguments: Arguments) -> list[tuple[Dim, ...]]:
    """All, or those that count neither features nor channels, which a model with as many tokens has, too."""
    ndim = [tensor.ndim for tensor in arguments.given]
    features = {dim for dim in dims if dim.axis == ndim[dim.tensor] - 1}
    channels = {dim for dim in dims if dim.axis == 1 and ndim[dim.tensor] >= _IMAGE}
    left_out: tuple[set[Dim], ...] = (set(), features, channels, features | channels)
    return [some for some in dict.fromkeys(tuple(d for d in dims if d not in out) for out in left_out) if some]


def _numbers(arguments: Arguments, change: _Change) -> list[tuple[_Number, ...]]:
    """Python ints that may have to change with a size: none, or one."""
    leaves, _ = pytree.tree_flatten_with_path((arguments.args, dict(arguments.kwargs)))
    found = [_Number(leaf, str(path[-1])) for path, leaf in leaves if type(leaf) is int and leaf > 1]
    return [(), *((number,) for number in dict.fromkeys(found) if number not in change.numbers)]


def _captured(module: nn.Module, arguments: Arguments) -> Captured | None:
    try:
        try:
            found = capture_members(module, arguments)
        except Whole:
            found = None
        return found or capture_by_dynamo(module, arguments)
    except (CannotCapture, Unsettled) as refused:
        log.debug("%s: no capture of other sizes: %s", type(module).__name__, refused)
        return None


def _laid_out_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of another shape, its dimensions in the same order in memory; expanded ones stay so."""
    if list(tensor.shape) == list(shape):
        return tensor
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = tensor.new_zeros([shape[i] if tensor.stride(i) else 1 for i in order])
    return dense.permute([order.index(i) for i in range(tensor.ndim)]).expand(list(shape))


def _check_marked(module: nn.Module, arguments: Arguments, dims: frozenset[Dim]) -> None:
    """Raise if a dimension that was marked has to stay as it is.

    Raises:
        InvalidSetting: it has to.
    """
    for dim in sorted(dims):
        size = arguments.given[dim.tensor].shape[dim.axis]
        raise InvalidSetting(
            f"dimension {dim.axis} of {arguments.names(module)[dim.tensor]} cannot be dynamic",
            where="mark_dynamic",
            why="a size of 1 means something else to many operators" if size == 1
            else f"{type(module).__name__} cannot be captured with another size than {size}",
            fix="call it with a larger size first" if size == 1 else "take the mark off, or use maybe_mark_dynamic",
        )  # fmt: skip


def resized_inputs(graph: fx.Graph, inputs: Sequence[Any]) -> list[Any] | None:
    """Inputs of other sizes for a graph of Dynamo's that has symbols for them; None if it has none, or none may vary.

    Args:
        graph: torch-level graph.
        inputs: tensors and sizes that it was called with.
    """
    examples = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
    pairs = list(zip(examples, inputs, strict=True))
    given = {example.node.expr: value for example, value in pairs if isinstance(example, torch.SymInt) and value > 1}
    if not given:
        return None
    shapes = next(example.node.shape_env for example in examples if isinstance(example, torch.SymInt))
    # A guard on a symbol of something else, such as a Python float, says nothing about sizes.
    guards = [guard.expr for guard in shapes.guards if guard.expr.free_symbols <= given.keys()]
    values, left = dict(given), list(FACTORS)
    for symbol, value in given.items():
        for factor in left[:_TRIES]:
            other = value * factor
            tried = {**values, symbol: int(other)}
            if other.denominator == 1 and other > 1 and all(bool(guard.xreplace(tried)) for guard in guards):
                values = tried
                left.remove(factor)
                break
    return None if values == given else [_other_input(example, value, values) for example, value in pairs]


def _other_input(example: Any, value: Any, values: Mapping[Any, int]) -> Any:
    if isinstance(example, torch.SymInt):
        return values.get(example.node.expr, value)
    if not isinstance(value, Tensor):
        return value
    sizes = [size.node.expr.xreplace(values) if isinstance(size, torch.SymInt) else size for size in example.shape]
    return _laid_out_like(value, list(map(int, sizes)))
