"""Objects as containers of what they hold: tensors in them are found, and others put into a copy of the object.

pytree looks into plain containers and output classes. Other objects are opened here: by their attributes, by their
items if their class derives from a container, functions by what they close over.
"""

from __future__ import annotations

import collections
import enum
import functools
import gc
import numbers
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from dicompile.errors import CannotCapture

PLAIN = (bool, int, float, complex, str, bytes, range, type(None), torch.dtype, torch.device)
"""Values that say everything."""

_WHOLE = (Tensor, types.CodeType, torch.Size, enum.Enum, numbers.Real, np.generic, *PLAIN)
_BY_IDENTITY = (type, types.ModuleType, OpOverload, OpOverloadPacket, HigherOrderOperator, CustomOpDef)
_BY_ATTRIBUTES = (object, types.SimpleNamespace)
"""What a class is built on whose instances hold nothing but attributes."""
_CONTAINERS = (dict, collections.OrderedDict, list, tuple, set, frozenset)
_ITEMS = "items()"
"""In the place of an attribute: what lies in a container."""
_IS_SELF = "__dict__ is self"
"""In the place of attributes: they are the items (``self.__dict__ = self``)."""
_DEEPEST = 8
_MOST_REACHED = 10_000
_HEAP_TYPE = 1 << 9
"""Flag of classes that are made while Python runs (Py_TPFLAGS_HEAPTYPE)."""


@dataclass(frozen=True)
class _Kind:
    """What an opened object is besides what it holds.

    Attributes:
        of: its class.
        names: of what it holds.
        function: it, if it is a function.
    """

    of: type
    names: tuple[str, ...]
    function: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"{self.of.__module__}.{self.of.__qualname__}{self.names}"


@dataclass(frozen=True)
class _Opened:
    """An object as a container of what it holds; put together again it is a copy of the object."""

    like: object
    held: Mapping[str, Any]

    @property
    def kind(self) -> _Kind:
        function = self.like if isinstance(self.like, types.FunctionType) else None
        return _Kind(type(self.like), tuple(self.held), function)


class _Hidden(Exception):
    """What an object holds cannot be told."""


def opened(value: Any) -> Any:
    """A value with all objects in it opened.

    Raises:
        CannotCapture: what one of them holds cannot be told.
    """
    return _opened(value, is_result=False)


def opened_result(value: Any) -> Any:
    """A result with those objects in it opened that hold tensors; others, and modules, are left as they are.

    Raises:
        CannotCapture: one of them holds a tensor where no other can be put.
    """
    return _opened(value, is_result=True)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments, in order, each as often as it is in them; raises what `opened` does."""
    return _tensors(opened(value))


def tensors_in_result(value: Any) -> list[Tensor]:
    """The tensors in a result, in order, each as often as it is in it; raises what `opened_result` does."""
    return _tensors(opened_result(value))


def is_item(key: object) -> bool:
    """True for the step of a pytree path that leads from an object to what lies in it as in a container."""
    return key == _ITEMS


def comparable(value: object) -> object:
    """A value that is equal to the same one only: 0.0 is not -0.0, and what is not a number is one."""
    return repr(value) if isinstance(value, (float, complex)) and (not value or value != value) else value  # noqa: PLR0124


def flatten_comparable(value: Any) -> tuple[object, ...]:
    """What tells a value from another one: everything in it, but tensors by their identity.

    Raises:
        CannotCapture: what an object in it holds cannot be told.
    """
    leaves, spec = pytree.tree_flatten(opened(value))
    return str(spec), *(id(leaf) if isinstance(leaf, Tensor) else comparable(leaf) for leaf in leaves)


def _opened(value: Any, around: tuple[int, ...] = (), *, is_result: bool) -> Any:
    """A value with the objects in it opened.

    Args:
        value: the value.
        around: identities of the objects that it lies in.
        is_result: see `opened_result`.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, _WHOLE) or (is_result and _is_of_module(leaf)):
            return leaf
        try:
            held = _held_by(leaf)
            if held is None:
                return leaf
            if id(leaf) in around or len(around) > _DEEPEST:
                raise _Hidden
        except _Hidden:
            if is_result and not _reaches_tensor(leaf):
                return leaf
            raise (_refused_result if is_result else _refused_argument)(leaf) from None
        inner = (*around, id(leaf))
        inside = {name: _opened(item, inner, is_result=is_result) for name, item in held.items()}
        return leaf if is_result and not _tensors(inside) else _Opened(leaf, inside)

    return pytree.tree_map(of, value)


def _is_of_module(value: object) -> bool:
    return isinstance(value.__self__ if isinstance(value, types.MethodType) else value, nn.Module)


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _refused_argument(value: object) -> CannotCapture:
    return CannotCapture(
        f"an argument holds an object of class {type(value).__name__}",
        where="capture",
        why="what it holds may differ at every call, and nothing tells",
        fix="give tensors, numbers, and lists or dictionaries of them",
    )


def _refused_result(value: object) -> CannotCapture:
    return CannotCapture(
        f"the result holds tensors in an object of class {type(value).__name__}",
        where="capture",
        why="it cannot be made again around the tensors of another call",
        fix="return tensors, and lists, dictionaries or objects of them",
    )


def _held_by(value: Any) -> Mapping[str, Any] | None:
    """What an object holds that a forward may read or write; None for one whose identity says everything.

    Raises:
        _Hidden: it cannot be told.
    """
    if isinstance(value, types.FunctionType):
        return _held_by_function(value)
    if isinstance(value, (types.MethodType, functools.partial)):
        names = ("__func__", "__self__") if isinstance(value, types.MethodType) else ("func", "args", "keywords")
        return {name: getattr(value, name) for name in names}
    if isinstance(value, _BY_IDENTITY) or type(value) is object:
        return None
    base = _built_on(type(value))
    own = getattr(value, "__dict__", {})
    attributes = {**_in_slots(value), **({_IS_SELF: True} if own is value else own)}
    if base in _CONTAINERS:
        return {_ITEMS: _items(value, base), **attributes}
    if base in _BY_ATTRIBUTES and (attributes or hasattr(value, "__dict__")):
        return attributes
    if callable(value) and not hasattr(value, "__dict__"):
        return None
    raise _Hidden


def _built_on(kind: type) -> type:
    """The class that is not written in Python on which a class is built: it says what lies in it beside attributes."""
    return next(cls for cls in kind.__mro__ if not cls.__flags__ & _HEAP_TYPE or _has_own_new(cls))


def _has_own_new(kind: type) -> bool:
    """True for a class of C, as far as it has anything of its own to make."""
    new = vars(kind).get("__new__")
    return isinstance(new, types.BuiltinFunctionType) and new.__self__ is kind


def _items(value: Any, base: Any) -> Any:
    """What lies in a container, whatever its class makes of looking into it.

    Raises:
        _Hidden: a set holds more than plain values: in what order it does is another thing for a copy.
    """
    if issubclass(base, dict):
        return dict(base.items(value))
    items = tuple(base.__iter__(value))
    if issubclass(base, (set, frozenset)) and not all(isinstance(item, PLAIN) for item in items):
        raise _Hidden
    return items


def _in_slots(value: object) -> dict[str, Any]:
    """Attributes for which a class written in Python has a place of its own (``__slots__``)."""
    classes = (cls for cls in type(value).__mro__ if "__slots__" in vars(cls))
    places = (item for cls in classes for item in vars(cls).items())
    names = (name for name, place in places if isinstance(place, types.MemberDescriptorType))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _held_by_function(function: types.FunctionType) -> Mapping[str, Any] | None:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not (function.__closure__ or vars(function) or any(type(value) not in PLAIN for value in defaults)):
        return None
    return {
        "__code__": function.__code__,
        "__globals__": sys.intern(f"{id(function.__globals__):x}"),  # the same object every time
        "__defaults__": function.__defaults__,
        "__kwdefaults__": function.__kwdefaults__,
        "__dict__": dict(vars(function)),
        "__closure__": tuple(_content(cell) for cell in function.__closure__ or ()),
    }


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _reaches_tensor(value: object) -> bool:
    """True if a tensor can be reached from an object of C by references, or if it leads too far to tell."""
    seen, ahead = {id(value)}, [value]
    while ahead and len(seen) < _MOST_REACHED:
        found = _references(ahead.pop())
        if any(isinstance(item, Tensor) for item in found):
            return True
        new = [item for item in found if id(item) not in seen and not isinstance(item, _WHOLE)]
        seen.update(map(id, new))
        ahead += new
    return bool(ahead)


def _references(value: object) -> Iterable[object]:
    if isinstance(value, (nn.Module, *_BY_IDENTITY)):
        return ()
    if isinstance(value, types.FunctionType):
        return (*map(_content, value.__closure__ or ()), value.__defaults__, value.__kwdefaults__)
    return gc.get_referents(value)


def _flatten(value: _Opened) -> tuple[list[Any], _Kind]:
    return list(value.held.values()), value.kind


def _flatten_with_keys(value: _Opened) -> tuple[list[tuple[Any, Any]], _Kind]:
    return [(pytree.MappingKey(name), item) for name, item in value.held.items()], value.kind


def _unflatten(values: Iterable[Any], kind: _Kind) -> object:
    held = dict(zip(kind.names, values, strict=True))
    if kind.function is not None:
        return _function_like(kind.function, held)
    if issubclass(kind.of, types.MethodType):
        return types.MethodType(held["__func__"], held["__self__"])
    if issubclass(kind.of, functools.partial):
        return kind.of(held["func"], *held["args"], **held["keywords"])
    made = _filled(kind.of, held.pop(_ITEMS, ()))
    if held.pop(_IS_SELF, False):
        object.__setattr__(made, "__dict__", made)
    for name, value in held.items():
        object.__setattr__(made, name, value)  # it may be frozen, and a module checks what it is given
    return made


def _filled(kind: type, items: Any) -> Any:
    """A new object of a class with nothing in it but items, none of which its class is asked for."""
    base: Any = _built_on(kind)
    if base in (tuple, frozenset):
        return base.__new__(kind, items)
    made = base.__new__(kind)
    if base is list:
        list.extend(made, items)
    elif base is set:
        set.update(made, items)
    elif issubclass(base, dict):
        for key, item in items.items():
            base.__setitem__(made, key, item)
    return made


def _function_like(function: types.FunctionType, held: Mapping[str, Any]) -> types.FunctionType:
    closure = tuple(map(types.CellType, held["__closure__"])) or None
    made = types.FunctionType(
        held["__code__"], function.__globals__, function.__name__, held["__defaults__"], closure
    )  # fmt: skip
    made.__kwdefaults__ = held["__kwdefaults__"]
    made.__qualname__ = function.__qualname__
    vars(made).update(held["__dict__"])
    return made


pytree.register_pytree_node(
    _Opened,
    _flatten,
    _unflatten,
    serialized_type_name="dicompile.opened._Opened",
    flatten_with_keys_fn=_flatten_with_keys,
)
