"""Arguments of a call, taken apart: tensors become inputs of a graph, and on everything else it depends.

Lists, dictionaries and output classes are looked into, and so are objects (a key-value cache), see `opened`. A function
or class that holds nothing is compared by identity.
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dicompile.errors import CannotCapture
from dicompile.lazy import is_lazy
from dicompile.opened import PLAIN, comparable, flatten_comparable, is_item, opened

_SIMPLE = frozenset(PLAIN)
_PLAIN = frozenset((Tensor, nn.Parameter))
"""Classes of tensors that have no attributes of their own."""


class Like(NamedTuple):
    """What a tensor is like, besides its values.

    Attributes:
        attributes: what somebody has hung on it (``latents.mask = ...``), comparable; None for nothing.
    """

    kind: type
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_lazy: bool = False
    attributes: object = None

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """What a tensor is like.

        Raises:
            CannotCapture: it is sparse.
        """
        kind = type(tensor)
        own = _attributes_of(tensor) if tensor.__dict__ else None
        if kind in _PLAIN and tensor.layout is not torch.strided:
            raise CannotCapture(
                f"an argument is a tensor of layout {tensor.layout}",
                where="capture",
                why="what its memory holds differs from call to call in more than values",
                fix="pass it dense (to_dense), or make it from dense tensors in the forward",
            )
        return cls(
            kind, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad,
            is_lazy(tensor), flatten_comparable(own) if own else None,
        )  # fmt: skip

    def is_laid_out(self, *, densely: bool) -> bool:
        """True if no two elements share memory; `densely`, and nothing else lies between them."""
        extent = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and (stride < extent or (densely and stride != extent)):
                return False
            extent = stride * size if size > 1 else extent
        return True

    def can_lie_as(self, other: object) -> bool:
        """True for a view of longer memory that differs from another tensor in nothing but its strides."""
        if not isinstance(other, Like) or self._replace(strides=other.strides) != other:
            return False
        is_view = self.is_laid_out(densely=False) and not self.is_laid_out(densely=True)
        return is_view and other.is_laid_out(densely=False)


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call, taken apart.

    Attributes:
        args: positional arguments, as given.
        kwargs: keyword arguments, as given.
        tensors: the tensors among them, in order, each once; then the open numbers.
        key: everything else, what the tensors are like, and which of them are one; calls with unequal keys share no
            graph.
        numbers: names of the open numbers among the keyword arguments: 0-d tensors to whoever runs the graph.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: list[Tensor]
    key: tuple[object, ...]
    numbers: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_numbers: Iterable[str] = ()) -> Arguments:
        """Take arguments apart.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            open_numbers: keyword arguments that are not part of the key where they are Python or NumPy numbers.

        Raises:
            CannotCapture: one of them is an object that cannot be looked into.
        """
        open_ = {name: _python_number(kwargs[name]) for name in open_numbers if is_number(kwargs.get(name))}
        closed = {**kwargs, **{name: type(value).__name__ for name, value in open_.items()}} if open_ else kwargs
        tensors: list[Tensor] = []
        rest: list[object] = [*open_]
        if not (_flatten_simply(args, tensors, rest) and _flatten_simply(closed, tensors, rest)):
            leaves, spec = flatten_arguments((args, dict(closed)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            rest = [
                str(spec),
                *(None if isinstance(leaf, Tensor) else (type(leaf), comparable(leaf)) for leaf in leaves),
                *open_,
            ]
        kinds = list(map(Like.of, tensors))
        unique = {id(tensor): tensor for tensor in tensors}
        if len(unique) < len(tensors):
            places = list(unique)
            rest.append(tuple(places.index(id(tensor)) for tensor in tensors))
        numbers_ = [torch.tensor(value, dtype=_DTYPES[type(value)]) for value in open_.values()]
        return cls(args, kwargs, [*unique.values(), *numbers_], (*rest, *kinds), tuple(open_))

    @property
    def given(self) -> list[Tensor]:
        """The tensors without the numbers."""
        return self.tensors[: len(self.tensors) - len(self.numbers)]

    @property
    def without_sizes(self) -> tuple[object, ...]:
        """Equal for calls that differ in nothing but sizes; one of 1 is something else."""
        return tuple(
            part._replace(shape=torch.Size(min(size, 2) for size in part.shape), strides=())
            if isinstance(part, Like) else part
            for part in self.key if type(part) is not int and not (type(part) is tuple and part[:1] == (int,))
        )  # fmt: skip

    def names(self, module: nn.Module) -> list[str]:
        """Dotted name of each tensor (``added_cond_kwargs.resolution``), by the forward's own argument names."""
        parameters = list(inspect.signature(module.forward).parameters.values())
        paths, _ = pytree.tree_flatten_with_path(opened((self.args, dict(self.kwargs))))
        found = {id(leaf): _dotted(path, parameters) for path, leaf in reversed(paths) if isinstance(leaf, Tensor)}
        return [*(found[id(tensor)] for tensor in self.given), *self.numbers]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with other tensors in the places of `given`, objects copied."""
        other = dict(zip(map(id, self.given), tensors, strict=True))
        return self.mapped(lambda _, leaf: other.get(id(leaf), leaf))

    def mapped(self, function: Callable[[tuple[Any, ...], Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with what a function makes of every path and leaf, objects copied."""
        args, kwargs = pytree.tree_map_with_path(function, opened((self.args, dict(self.kwargs))))
        return tuple(args), dict(kwargs)

    def laid_out_as(self, key: tuple[object, ...]) -> Arguments | None:
        """The same with copies of tensors, in the layout of those of other arguments; None if more than that differs.

        Only views of longer memory are copied: they have other strides with every length of the whole, such as a
        history that grows from window to window.

        Args:
            key: of the other arguments, which is that of the result.
        """
        if len(key) != len(self.key):
            return None
        pairs = list(zip(self.key, key, strict=True))
        if not all(own == other or (isinstance(own, Like) and own.can_lie_as(other)) for own, other in pairs):
            return None
        likes = [(own, other) for own, other in pairs if isinstance(other, Like)]
        if len(likes) != len(self.given):
            return None  # a tensor that is given twice
        laid_out = [
            tensor if own == other else torch.empty_strided(
                other.shape, other.strides, dtype=other.dtype, device=other.device
            ).copy_(tensor)
            for tensor, (own, other) in zip(self.given, likes, strict=True)
        ]  # fmt: skip
        return replace(self, tensors=[*laid_out, *self.tensors[len(laid_out) :]], key=key)

    def copied(self) -> Arguments:
        """The same arguments with copies of the tensors: what a forward writes to them does not reach the caller."""
        copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in self.given]
        for copied, tensor in zip(copies, self.given, strict=True):
            vars(copied).update(_attributes_of(tensor))
        args, kwargs = self.filled(copies)
        return Arguments(args, kwargs, [*copies, *self.tensors[len(copies) :]], self.key, self.numbers)


def _attributes_of(tensor: Tensor) -> dict[str, Any]:
    """What somebody has hung on a plain tensor; what Dynamo notes there is none of it."""
    own = vars(tensor) if type(tensor) in _PLAIN else {}
    return {name: value for name, value in own.items() if not name.startswith("_dynamo")} if own else own


_DTYPES = {int: torch.int64, float: torch.float64}


def with_python_numbers(kwargs: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """Keyword arguments with Python numbers in the place of NumPy's, of these names."""
    numbers_ = {name: _python_number(kwargs[name]) for name in names if is_number(kwargs.get(name))}
    return {**kwargs, **numbers_} if numbers_ else kwargs


def is_number(value: object) -> bool:
    """True for Python and NumPy numbers that are real; flags are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _python_number(value: Any) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def bind_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_numbers: Iterable[str]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Arguments with all positional ones by name, if one of them is an open number."""
    if not any(map(is_number, args)):
        return args, kwargs
    parameters = list(inspect.signature(module.forward).parameters.values())[: len(args)]
    named = all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    by_name = dict(zip((parameter.name for parameter in parameters), args, strict=False))
    if not named or len(by_name) < len(args) or not any(is_number(by_name.get(name)) for name in open_numbers):
        return args, kwargs
    return (), {**by_name, **kwargs}


def _flatten_simply(value: Any, tensors: list[Tensor], rest: list[object]) -> bool:
    """Take apart what has only plain containers in it; False where there is anything else."""
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        rest.append(None)
    elif kind in _SIMPLE:
        rest += (kind, comparable(value) if kind is float or kind is complex else value)
    elif kind is dict:
        rest += ("dict", *value)
        return all(_flatten_simply(item, tensors, rest) for item in value.values())
    elif kind is tuple or kind is list:
        rest += (kind, len(value))
        return all(_flatten_simply(item, tensors, rest) for item in value)
    else:
        return False
    return True


def flatten_arguments(arguments: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of arguments, objects looked into.

    Raises:
        CannotCapture: one of them cannot be.
    """
    return pytree.tree_flatten(opened(arguments))


@dataclass(frozen=True)
class TakenOut:
    """A list or dictionary of the caller out of which a forward takes items, as ``residuals.pop()`` does.

    Attributes:
        path: indices and keys that lead from ``(args, kwargs)`` to it.
        kept: indices or keys of what stays.
    """

    path: tuple[Any, ...]
    kept: tuple[Any, ...]

    def repeat(self, arguments: Arguments) -> None:
        """Take the same items out at another call."""
        container: Any = (arguments.args, arguments.kwargs)
        for key in self.path:
            container = container[key]
        if isinstance(container, list):
            container[:] = [container[i] for i in self.kept]
            return
        for key in container.keys() - set(self.kept):
            del container[key]


class Watched:
    """Arguments of a forward that may write to the lists, dictionaries and objects among them.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._arguments = (args, dict(kwargs))
        self._before = flatten_arguments(self._arguments)
        self._containers = [(path, held, copy.copy(held)) for path, held in _containers(self._arguments)]

    def taken_out(self, model: str) -> tuple[TakenOut, ...]:
        """What the forward took out of them, which is put back.

        Raises:
            CannotCapture: it wrote to them in another way.
        """
        found = []
        for path, now, before in self._containers:
            kept = _kept_in_list(before, now) if isinstance(before, list) else _kept_in_dict(before, now)
            if kept is not None and len(kept) < len(before):
                found.append(TakenOut(path, kept))
                now.clear()
                now.extend(before) if isinstance(before, list) else now.update(before)
        after = flatten_arguments(self._arguments)
        if self._before[1] != after[1] or any(map(is_not, self._before[0], after[0])):
            raise CannotCapture(
                f"{model} writes to a list, dictionary or object among its arguments",
                where="capture",
                why="a step that is skipped could not repeat the write",
                fix="return what is written instead",
            )
        return tuple(found)


def _containers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every plain list and dictionary among ``(args, kwargs)``, with its path."""
    if type(value) not in (list, dict, tuple):
        return
    if len(path) > 1 and type(value) is not tuple:
        yield path, value
    for key, item in value.items() if type(value) is dict else enumerate(value):
        yield from _containers(item, (*path, key))


def _kept_in_list(before: list[Any], now: list[Any]) -> tuple[int, ...] | None:
    """Indices of what stayed, in order; None if there is anything else."""
    rest = iter(enumerate(before))
    kept = [next((i for i, item in rest if item is wanted), None) for wanted in now]
    return None if None in kept else tuple(i for i in kept if i is not None)


def _kept_in_dict(before: dict[Any, Any], now: dict[Any, Any]) -> tuple[Any, ...] | None:
    return tuple(now) if all(key in before and before[key] is item for key, item in now.items()) else None


def _dotted(path: Sequence[Any], parameters: Sequence[inspect.Parameter]) -> str:
    """Name of a leaf of ``(args, kwargs)``."""
    first, *inner = path[1:]
    head = _name_at(first.idx, parameters) if hasattr(first, "idx") else str(first.key)
    keys = (getattr(part, "key", getattr(part, "idx", part)) for part in inner)
    return ".".join([head, *(str(key) for key in keys if not is_item(key))])


def _name_at(position: int, parameters: Sequence[inspect.Parameter]) -> str:
    """Name of a positional argument; ``args.0`` where the forward takes any number of them."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [parameter.name for parameter in parameters if parameter.kind in positional]
    rest = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    return named[position] if position < len(named) else f"{rest[0]}.{position - len(named)}"
