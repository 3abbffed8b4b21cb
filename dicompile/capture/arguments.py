"""Arguments of a call, taken apart: tensors become inputs of a graph, and on everything else it depends.

Lists, dictionaries and output classes are looked into, and so are objects (a key-value cache): by their attributes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dicompile.errors import CannotCapture

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_DEEPEST = 8


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call, taken apart.

    Attributes:
        tensors: the tensors among them, by dotted name (``added_cond_kwargs.resolution``).
        key: everything else, and what the tensors are like; calls with unequal keys share no trace.
        pack: positional and keyword arguments with other tensors in the places of these.
    """

    tensors: Mapping[str, Tensor]
    key: tuple[object, ...]
    pack: Callable[[Sequence[Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Arguments of ``module(*args, **kwargs)``.

        Raises:
            TypeError: its forward does not take them.
            CannotCapture: one of them is an object that cannot be looked into.
        """
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        parameters = list(bound.signature.parameters)
        paths, spec = pytree.tree_flatten_with_path(_opened((bound.args, bound.kwargs)))
        leaves = [leaf for _, leaf in paths]
        tensors = {_dotted(path, parameters): leaf for path, leaf in paths if isinstance(leaf, Tensor)}
        rest = tuple(_kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tensors, (str(spec), *rest), filler(leaves, spec))


def flatten_arguments(arguments: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of arguments, objects looked into.

    Raises:
        CannotCapture: one of them cannot be.
    """
    return pytree.tree_flatten(_opened(arguments))


def filler(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Callable[[Sequence[Tensor]], Any]:
    """A function that puts tensors in the places of those among the leaves, and packs them as they came."""
    fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def fill(tensors: Sequence[Tensor]) -> Any:
        filled = list(fixed)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return pytree.tree_unflatten(filled, spec)

    return fill


@dataclass(frozen=True)
class _Opened:
    """An object as a container of its attributes; put together again it is a copy of the object."""

    like: object
    attributes: Mapping[str, Any]


class _Class:
    """What an opened object is besides its attributes: equal for objects of one class with the same attributes."""

    def __init__(self, like: object, names: Iterable[str]) -> None:
        self.like, self.names = like, tuple(names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and (type(self.like), self.names) == (type(other.like), other.names)

    def __hash__(self) -> int:
        return hash((type(self.like), self.names))

    def __repr__(self) -> str:
        return f"{type(self.like).__qualname__}{self.names}"


def _flatten(opened: _Opened) -> tuple[list[Any], _Class]:
    return list(opened.attributes.values()), _Class(opened.like, opened.attributes)


def _flatten_with_keys(opened: _Opened) -> tuple[list[tuple[Any, Any]], _Class]:
    keyed: list[tuple[Any, Any]] = [(pytree.MappingKey(name), value) for name, value in opened.attributes.items()]
    return keyed, _Class(opened.like, opened.attributes)


def _unflatten(values: Iterable[Any], kind: _Class) -> object:
    made = copy.copy(kind.like)
    vars(made).update(zip(kind.names, values, strict=True))
    return made


pytree.register_pytree_node(
    _Opened,
    _flatten,
    _unflatten,
    serialized_type_name="dicompile.capture.arguments._Opened",
    flatten_with_keys_fn=_flatten_with_keys,
)


def _opened(value: Any, depth: int = 0) -> Any:
    def opened(leaf: Any) -> Any:
        if isinstance(leaf, (Tensor, *PLAIN)) or callable(leaf):
            return leaf
        if not hasattr(leaf, "__dict__") or depth > _DEEPEST:
            raise CannotCapture(
                f"an argument holds an object of class {type(leaf).__name__}",
                where="capture",
                why="what it holds may differ at every call, and nothing tells",
                fix="give tensors, numbers, and lists or dictionaries of them",
            )
        return _Opened(leaf, {name: _opened(item, depth + 1) for name, item in vars(leaf).items()})

    return pytree.tree_map(opened, value)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _dotted(path: Sequence[Any], parameters: Sequence[str]) -> str:
    """Name of a leaf of ``(args, kwargs)``."""
    first, *inner = path[1:]
    head = parameters[first.idx] if hasattr(first, "idx") else str(first.key)
    return ".".join([head, *(str(getattr(part, "key", getattr(part, "idx", part))) for part in inner)])
