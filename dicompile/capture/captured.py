"""What a capture returns, whichever way it went."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dicompile.capture.arguments import Arguments, TakenOut
from dicompile.capture.guards import FIXED, PLAIN, Guards, meta_of
from dicompile.errors import CannotCapture
from dicompile.opened import opened_result
from dicompile.same import is_same_value

_OF_THEIR_OWN = (*PLAIN, *FIXED, nn.Module, types.MethodType)
"""Objects whose tensors are no result of whoever puts them somewhere."""


@dataclass(frozen=True)
class Pack:
    """How a module's result is made of the results of its graph.

    Attributes:
        places: for every leaf, whether it is one of the tensors that went in, and its number there or among the graph's
            results; or None, and what it is.
        spec: how the leaves are put together.
        is_tuple: True for a tuple of the first results in order.
    """

    places: tuple[tuple[bool | None, Any], ...]
    spec: pytree.TreeSpec
    is_tuple: bool

    def __call__(self, made: Sequence[Any], given: Sequence[Tensor]) -> Any:
        """The result.

        Args:
            made: results of the graph.
            given: all tensors, see `Captured.order`.
        """
        if self.is_tuple:
            return tuple(made[: len(self.places)])
        filled = [
            value if is_given is None else (given[value] if is_given else made[value])
            for is_given, value in self.places
        ]
        return pytree.tree_unflatten(filled, self.spec)


@dataclass(frozen=True)
class Captured:
    """One way through a module's forward.

    Attributes:
        graph: torch-level or ATen graph; every tensor that it reads is a placeholder.
        names: name of each placeholder, and whether it belongs to the module.
        order: position of each placeholder's value among the module's tensors that were read, the tensors of the call,
            and the constants, in this order.
        constants: tensors that the forward made of Python numbers.
        guards: what the graph depends on besides the arguments of the call.
        pack: the module's result, made of the graph's results and all tensors (see `order`).
        reads: positions of the placeholders whose values Python read, with the operator that did and its module.
        taken_out: what the forward takes out of lists and dictionaries of its caller; every call has to repeat it.
        is_run: the module was run to capture it, since Dynamo could not take it whole.
        refused: what Dynamo said then, if it was asked.
        codes: Python code that was traced, if it was.
    """

    graph: fx.GraphModule
    names: tuple[tuple[str, bool], ...]
    order: tuple[int, ...]
    constants: tuple[Tensor, ...]
    guards: Guards
    pack: Pack
    reads: dict[int, str]
    taken_out: tuple[TakenOut, ...] = ()
    is_run: bool = False
    refused: CannotCapture | None = None
    codes: frozenset[types.CodeType] = frozenset()

    def tensors(self, own: Sequence[Tensor], arguments: Arguments) -> list[Tensor]:
        """All tensors of a call, as `order` counts them.

        Args:
            own: of the module, by the guards' paths.
            arguments: of the call.
        """
        return [*own, *arguments.tensors, *self.constants]

    def pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Values of the placeholders, out of all tensors."""
        return [tensors[i] for i in self.order]

    def picker(self) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        """The same, fast."""
        return itemgetter(*self.order) if len(self.order) > 1 else self.pick


class Unsettled(Exception):
    """A forward changed what it keeps.

    Args:
        changed: what, as text.
    """

    def __init__(self, changed: Sequence[str]) -> None:
        super().__init__(", ".join(changed))
        self.changed = tuple(changed)


def packer(result: Any, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> Pack | None:
    """How a module's result is made of a graph's results; None if it holds another tensor.

    Args:
        result: what the module returned.
        results: what the graph returned, as they lie in it.
        tensors: tensors that went in, which may be in it, too.

    Raises:
        CannotCapture: it holds a tensor where no other can be put.
    """
    leaves, spec = pytree.tree_flatten(opened_result(result))
    place = {id(tensor): (True, i) for i, tensor in reversed(list(enumerate(tensors)))}
    place |= {id(tensor): (False, i) for i, tensor in reversed(list(enumerate(results)))}
    places = [place.get(id(leaf)) if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves]
    if None in places:
        return None
    known = [found for found in places if found is not None]
    is_flat = result.__class__ is tuple and all(isinstance(value, Tensor) for value in result)
    is_tuple = is_flat and known == [(False, i) for i in range(len(result))]
    return Pack(tuple(known), spec, is_tuple)


class Changes:
    """A shallow copy of what lies in an object, to tell which of it changed.

    Args:
        path: of the object, as text.
        holder: a container, a variable of an enclosing function, or an object with attributes.
    """

    def __init__(self, path: str, holder: Any) -> None:
        self._path, self._holder, self._before = path, holder, _items(holder)

    def found(self) -> Iterator[tuple[str, Any]]:
        """Path and value of every entry that is another object now."""
        now = _items(self._holder)
        has_keys = not isinstance(self._holder, (set, types.CellType))
        for key in self._changed(now):
            yield f"{self._path}.{key}" if has_keys else self._path, now.get(key)

    def put_back_equals(self) -> None:
        """Put back entries in whose place the same lies in another container (``self.f = [t.to() for t in f]``)."""
        now = _items(self._holder)
        for key in self._before.keys() & now.keys():
            if now[key] is not self._before[key] and is_equal_to(now[key], self._before[key]):
                self._put_back(key)

    def undo(self) -> None:
        """Put back what was there."""
        changed = self._changed(_items(self._holder))
        if not changed:
            return
        if isinstance(self._holder, (dict, set)):
            self._holder.clear()
            self._holder.update(self._before)
        elif isinstance(self._holder, (list, deque)):
            self._holder.clear()
            self._holder.extend(self._before.values())
        else:
            for key in changed:
                self._put_back(key)

    def _changed(self, now: Mapping[Any, Any]) -> list[Any]:
        return [key for key in {**self._before, **now} if self._before.get(key, self) is not now.get(key, self)]

    def _put_back(self, key: Any) -> None:
        if isinstance(self._holder, (dict, list, deque)):
            self._holder[key] = self._before[key]
            return
        cls = type if isinstance(self._holder, type) else object  # modules do not put tensors where they were
        if key in self._before:
            cls.__setattr__(self._holder, key, self._before[key])
        else:
            cls.__delattr__(self._holder, key)


def holds_tensor(value: object, depth: int = 3) -> bool:
    """True for a tensor, for containers with one, and for objects with one; a module has its own."""
    return any(
        isinstance(leaf, Tensor)
        or (depth > 0 and not isinstance(leaf, _OF_THEIR_OWN) and holds_tensor(list(_items(leaf).values()), depth - 1))
        for leaf in pytree.tree_leaves(value)
    )


def is_equal_to(first: Any, second: Any) -> bool:
    """True for containers of the same tensors, or of others with the same memory, and alike in everything else.

    Equal values would not do: what a forward keeps of its arguments is equal as long as these are.
    """
    (ours, spec), (others, other_spec) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    return spec == other_spec and all(map(_are_equal, ours, others))


def _are_equal(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return first is second or (isinstance(first, PLAIN) and is_same_value(first, second))
    return first is second or (meta_of(first) == meta_of(second) and first.data_ptr() == second.data_ptr() != 0)


def _items(holder: Any) -> dict[Any, Any]:
    """What lies in an object: entries, the value of a variable, or attributes."""
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, (list, deque)):
        return dict(enumerate(holder))
    if isinstance(holder, set):
        return {item: item for item in holder}
    if isinstance(holder, types.CellType):
        return {} if holder == types.CellType() else {"cell_contents": holder.cell_contents}
    slots = (name for cls in type(holder).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(holder, name))
    return {name: getattr(holder, name) for name in slots} | dict(getattr(holder, "__dict__", {}))
