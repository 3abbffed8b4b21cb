"""What a captured graph was captured under, and whether that still holds.

A forward is Python: it branches on attributes, on what its processors hold, on globals. A graph is one way through it,
so it serves a call only while everything that was read on that way is as it was. `Guards` is the list of it: a frozen
value that can be printed, made once by the capture, in the same form for both ways to capture.

Every fact is found by a *path* from the module (or from a Python module): ``self.blocks.0.attn.processor.scale``.
Walking thousands of paths takes milliseconds. `Pins` is what such a walk finds, as flat lists: at this key of this
dictionary lies this very object. Comparing identities takes microseconds, and is stricter than the facts. Where a pin
does not hold, the paths are walked again: the facts decide, and new pins are made.
"""

from __future__ import annotations

import enum
import functools
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from dataclasses import dataclass, replace
from operator import attrgetter, getitem, is_, methodcaller
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.capture.hooked import do_the_same
from dicompile.compat import local_part, tensor_check
from dicompile.config import environment
from dicompile.errors import CannotCapture
from dicompile.lazy import is_lazy
from dicompile.ops.wrapped import is_wrapped, wrapper_of
from dicompile.parked import HOOKED, Home, Parked, forward_under_hooks, is_own_method, kind_of, seen_as
from dicompile.same import is_same_value
from dicompile.tensor_parallel import HOOKS, is_divided

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
         torch.memory_format, enum.Enum, slice, range)  # fmt: skip
FIXED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType,
         types.WrapperDescriptorType, types.GetSetDescriptorType, classmethod, staticmethod, property,
         logging.Filterer, functools._lru_cache_wrapper)  # fmt: skip
PARTS = frozenset({
    "_parameters", "_buffers", "_modules", *HOOKS, "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
})  # fmt: skip
"""Dictionaries that a module keeps for life; what they hold is compared."""


_CODE = attrgetter("__code__")
_CALLED = attrgetter("__call__", "_call_impl")


class By(enum.Enum):
    """How a path goes on."""

    ATTRIBUTE = "attribute"
    ITEM = "item"
    DICT = "__dict__"
    TYPE = "type"
    CELL = "cell"
    HOOK = "hook"

    __hash__ = object.__hash__  # there is one of each, and the hash of an enum is Python: a tenth of a deep capture


@dataclass(frozen=True, slots=True)
class Path:
    """Where an object is found.

    Attributes:
        root: "self", or the name of a Python module.
        links: how to go on from there, and to what.
    """

    root: str = "self"
    links: tuple[tuple[By, Any], ...] = ()

    def attribute(self, name: str) -> Path:
        """The path to an attribute of what lies at this one."""
        return Path(self.root, (*self.links, (By.ATTRIBUTE, name)))

    def item(self, key: Any) -> Path:
        """The path to an item of what lies at this one."""
        return Path(self.root, (*self.links, (By.ITEM, key)))

    def hook(self, number: int) -> Path:
        """The path to one of the hooks in the dictionary at this one: keys count all hooks of a process."""
        return Path(self.root, (*self.links, (By.HOOK, number)))

    def via(self, by: By) -> Path:
        """The path to the type, or to the attributes, of what lies at this one."""
        return Path(self.root, (*self.links, (by, None)))

    def below(self, other: Path) -> Path:
        """The path from a module to what this one finds from the module that lies at another path."""
        return Path(other.root, (*other.links, *self.links)) if self.root == "self" else self

    @property
    def parent(self) -> Path:
        """The path without its last link."""
        return Path(self.root, self.links[:-1])

    @property
    def name(self) -> str:
        """Dotted name of a tensor below the module, as in a state dict, or of one in a variable."""
        named = (key.name if by is By.CELL else key for by, key in self.links if by in (By.ATTRIBUTE, By.ITEM, By.CELL))
        keys = map(str, named)
        return ".".join(key for key in keys if key not in ("_parameters", "_buffers", "_modules"))

    def __str__(self) -> str:
        text = self.root
        for by, key in self.links:
            if by in (By.ATTRIBUTE, By.CELL):
                text += f".{key}"
            elif by in (By.ITEM, By.HOOK):
                text += f".{key}" if isinstance(key, str) and text.endswith("_modules") else f"[{key!r}]"
            else:
                text = f"type({text})" if by is By.TYPE else f"{text}.__dict__"
        return text.replace("._modules.", ".").replace(".__dict__['_modules']", "")


@dataclass(frozen=True, eq=False, slots=True)
class Cell:
    """A variable of an enclosing function, equal to itself alone.

    Attributes:
        function: qualified name of the function that reads it.
        name: of the variable.
        cell: what holds it.
    """

    function: str
    name: str
    cell: types.CellType

    def contents(self) -> Any:
        """The value of the variable."""
        return self.cell.cell_contents

    def __str__(self) -> str:
        return f"{self.function}({self.name})"


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """What an object that is no Python holds (an array), equal to itself alone.

    Attributes:
        name: what it is.
        contents: finds it.
    """

    name: str
    contents: Callable[[], Any]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Variable:
    """What lies in a context variable.

    Attributes:
        variable: it.
        default: what somebody gets who asks while nothing lies there, if he said so.
    """

    variable: ContextVar[Any]
    default: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Of the variable."""
        return self.variable.name

    @property
    def path(self) -> Path:
        """Where it is found: by itself, wherever the variable lies."""
        return Path("contextvars", ((By.CELL, self),))

    def contents(self) -> Any:
        """Its value, or the default; None where there is neither."""
        try:
            return self.variable.get(*self.default)
        except LookupError:
            return None

    def __str__(self) -> str:
        return self.name


ENVIRONMENT = Path("os", ((By.ATTRIBUTE, "environ"), (By.CELL, Content("values", environment))))
"""What environment variables hold, all together: which one a forward asks for cannot always be told."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that was read.

    Attributes:
        path: where.
        kind: "value" (a number or a name: `expected` is it), "fixed" (a function, class or Python module: `expected`
            is the object), "object" (its type is `expected`), "container" (type and keys, or elements of a set),
            "same" (it is the object at the path `expected`), "wrapped" (a tensor of a class of its own, put together as
            `expected` says), or "absent" (there is no such attribute).
        expected: see `kind`.
        code: of a function, which tools that reload edited files exchange (IPython's ``%autoreload``).
    """

    path: Path
    kind: str
    expected: Any = None
    code: types.CodeType | None = None

    @classmethod
    def of(cls, path: Path, value: object) -> Fact:
        """What can be said of a value at a path.

        Raises:
            CannotCapture: it gives something else whenever it is asked.
        """
        if isinstance(value, PLAIN):
            return cls(path, "value", value)
        if isinstance(value, (*FIXED, types.MethodType)):
            return cls(path, "fixed", value, code_of(value))
        if isinstance(value, (Mapping, Sequence, AbstractSet)):
            return cls(path, "container", (type(value), keys_of(value)))
        if isinstance(value, Iterator) and not hasattr(value, "__dict__"):  # one written in Python is looked into
            raise CannotCapture(
                f"{path} is a {type(value).__name__}, of which the forward takes the next value",
                where="capture",
                why="another value at every call, and where it stands cannot be told without taking one",
                fix="keep the values in a list, and count, or pass them to the model",
            )
        return cls(path, "object", type(value))

    def holds(self, value: object) -> bool:
        """True if a value that lies at the path now is as it was."""
        if self.kind == "value":
            return is_same_value(self.expected, value)
        if self.kind == "fixed":
            return do_the_same(self.expected, value) and (self.code is None or self.code == code_of(value))
        if self.kind == "wrapped":
            return is_wrapped(value) and wrapper_of(value) is self.expected
        if self.kind == "container":
            return type(value) is self.expected[0] and keys_of(value) == self.expected[1]
        return type(value) is self.expected

    def __str__(self) -> str:
        if self.kind == "absent":
            return f"{self.path} is absent"
        if self.kind == "same":
            return f"{self.path} is {self.expected}"
        if self.kind == "value":
            return f"{self.path} == {self.expected!r} ({type(self.expected).__name__})"
        if self.kind == "container":
            kind, keys = self.expected
            return f"{self.path} is a {kind.__name__} of {keys if isinstance(keys, int) else list(keys)}"
        if self.kind == "fixed":
            is_module = isinstance(self.expected, types.ModuleType)  # torch.classes answers to any attribute
            name = self.expected.__name__ if is_module else getattr(self.expected, "__qualname__", None)
            return f"{self.path} is {name or self.expected.__class__.__name__}"
        kind = self.expected.kind if self.kind == "wrapped" else self.expected
        return f"{self.path} is a {kind.__qualname__}"


def code_of(value: object) -> types.CodeType | None:
    """What a function, or a method, runs; None of anything else, and of a partial call that is bound like a method."""
    return getattr(value, "__code__", None) if isinstance(value, (types.FunctionType, types.MethodType)) else None


def keys_of(container: Any) -> Any:
    """What tells containers of one type apart besides their items: keys in order, elements of a set, or a length.

    Hooks around the forward of a module are not among its attributes here: they are found where the forward is.
    """
    if isinstance(container, Mapping):
        return tuple(key for key in container if key not in HOOKED) if "_modules" in container else tuple(container)
    return frozenset(container) if isinstance(container, AbstractSet) else len(container)


@dataclass(frozen=True)
class Guards:
    """Everything a graph depends on besides the arguments of the call.

    Attributes:
        facts: what was read, parents before their attributes.
        tensors: paths of the tensors that were read, whose values may differ.
        metas: type, shape, strides, dtype and device of each.
        same: pairs of positions among the tensors that hold one and the same tensor.
        modules: paths of the modules that ran; hooks that they get change what they do.
        hooks: for each module, and for each of `HOOKS`, the number of hooks that it had.
        called: for each module, what its class has in the place of torch's own way to call it; see `called_by`.
    """

    facts: tuple[Fact, ...]
    tensors: tuple[Path, ...]
    metas: tuple[tuple[object, ...], ...]
    same: tuple[tuple[int, int], ...] = ()
    modules: tuple[Path, ...] = ()
    hooks: tuple[tuple[int, ...], ...] = ()
    called: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(
        cls, module: nn.Module, facts: Mapping[Path, Fact], tensors: Sequence[Path], modules: Sequence[Path]
    ) -> Guards:
        """Guards for a module as it is now.

        Args:
            module: the module.
            facts: what was read.
            tensors: paths of tensors that were read.
            modules: paths of the modules that ran.
        """
        walk = Walk(module)
        found, ran = [walk.value(path) for path in tensors], [walk.value(path) for path in modules]
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(found)))}
        return cls(
            facts=tuple(sorted(facts.values(), key=lambda fact: len(fact.path.links))),
            tensors=tuple(tensors),
            metas=tuple(meta_of(tensor) for tensor in found),
            same=tuple((first[id(tensor)], i) for i, tensor in enumerate(found) if first[id(tensor)] != i),
            modules=tuple(modules),
            hooks=tuple(map(_hook_counts, ran)),
            called=tuple(called_by(type(module)) for module in ran),
        )

    def below(self, path: Path) -> Guards:
        """The same for a module that lies at a path from another one."""

        def moved(fact: Fact) -> Fact:
            expected = fact.expected.below(path) if fact.kind == "same" else fact.expected
            return replace(fact, path=fact.path.below(path), expected=expected)

        return replace(
            self,
            facts=tuple(map(moved, self.facts)),
            tensors=tuple(tensor.below(path) for tensor in self.tensors),
            modules=tuple(module.below(path) for module in self.modules),
        )

    def pin(self, module: nn.Module, homes: Mapping[int, Home] = MappingProxyType({})) -> Pins | str:
        """Walk all paths.

        Args:
            module: the module that was captured.
            homes: of its weights that are elsewhere, by id; they count as being on the device where they are wanted.

        Returns:
            What was found, or the first fact that does not hold.
        """
        walk = Walk(module, homes)
        try:
            wrong = next(filter(None, (walk.check(fact) for fact in self.facts)), None)
            if wrong is not None:
                return wrong
            tensors = [walk.value(path) for path in self.tensors]
            ran = [walk.value(path) for path in self.modules]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            return f"a path is gone: {error}"
        wrong = self._other_tensor(tensors, homes) or self._other_call(ran)
        return wrong or walk.pins(self.tensors, tensors, ran)

    def found(self, module: nn.Module, homes: Mapping[int, Home] = MappingProxyType({})) -> Pins:
        """What lies in a module for which they hold, as that of which they were made; see `pin`."""
        pins = self.pin(module, homes)
        assert isinstance(pins, Pins), pins
        return pins

    def _other_tensor(self, tensors: Sequence[Any], homes: Mapping[int, Home]) -> str | None:
        for path, meta, tensor in zip(self.tensors, self.metas, tensors, strict=True):
            if not isinstance(tensor, Tensor) or meta_of(tensor, homes.get(id(tensor))) != meta:
                return f"{path} is {_shown(tensor)} now"
        is_untied = any(tensors[i] is not tensors[j] for i, j in self.same)
        return "tensors that were one are two now" if is_untied else None

    def _other_call(self, modules: Sequence[nn.Module]) -> str | None:
        for path, module, hooks, called in zip(self.modules, modules, self.hooks, self.called, strict=True):
            if _hook_counts(module) != hooks:
                return f"{path} has other hooks now"
            if called_by(type(module)) != called:
                return f"{path} is called in another way now"
        return None

    def __str__(self) -> str:
        tensors = [f"{path}: {meta}" for path, meta in zip(self.tensors, self.metas, strict=True)]
        hooks = [f"{path} has {sum(n)} hooks" for path, n in zip(self.modules, self.hooks, strict=True) if any(n)]
        return "\n".join([*map(str, self.facts), *tensors, *hooks])


def meta_of(tensor: Tensor, home: Home | None = None) -> tuple[object, ...]:
    """Type, shape, strides, dtype, device and marks of a tensor; as it is wanted, if it is elsewhere."""
    device, dtype = (tensor.device, tensor.dtype) if home is None else (home.device, home.dtype_of(tensor))
    return kind_of(tensor, home), tuple(tensor.shape), tensor.stride(), dtype, device, is_lazy(tensor)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"


def called_by(kind: type) -> tuple[Any, ...]:
    """What a class of modules has in the place of torch's own way to call them, which tracers exchange for a while."""
    return tuple(own for own, torchs in zip(_CALLED(kind), _CALLED(nn.Module), strict=True) if own is not torchs)


def _hook_counts(module: nn.Module) -> tuple[int, ...]:
    return tuple(sum(seen_as(hook) is not None for hook in getattr(module, name).values()) for name in HOOKS)


@dataclass
class Pins:
    """What was found at the paths of `Guards`, for comparing it fast.

    Attributes:
        tensors: of the module, as they were found.
        homes: number and home of those that are elsewhere.
        divided: numbers of those that are what a rank has of a weight.
    """

    tensors: list[Tensor]
    homes: tuple[tuple[int, Home], ...]
    divided: tuple[int, ...]
    _places: tuple[list[Any], list[Any], list[Any]]
    _numbers: tuple[list[Any], list[Any], list[Any]]
    _computed: list[tuple[Callable[[], Any], Any]]
    _listed: list[Any]
    _sized: list[Any]
    _empty: list[Any]
    _typed: list[Any]
    _functions: list[Any]
    _tensors_in: list[Any]
    _tensor_keys: list[Any]

    def __post_init__(self) -> None:
        self._sizes = list(map(len, self._sized))
        self._lists = list(map(keys_of, self._listed))
        self._types = list(map(type, self._typed))
        self._classes = [kind for kind in dict.fromkeys(self._types) if issubclass(kind, nn.Module)]
        self._called = list(map(_CALLED, self._classes))
        self._codes = list(map(_CODE, self._functions))
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(self.tensors)))}
        self._same = [(first[id(tensor)], i) for i, tensor in enumerate(self.tensors) if first[id(tensor)] != i]
        self._unique = sorted(first.values())  # the check refuses a tensor that comes twice
        self._check = tensor_check([self.tensors[i] for i in self._unique])

    def hold(self) -> list[Tensor] | None:
        """The module's tensors, if everything lies where it lay, and they are as they were but for their values."""
        try:
            if not self._lie():
                return None
            tensors: list[Any] = list(map(getitem, self._tensors_in, self._tensor_keys))
            for i in self.divided:
                tensors[i] = local_part(tensors[i])
        except (KeyError, IndexError, AttributeError):
            return None
        if any(tensors[i] is not tensors[j] for i, j in self._same):
            return None
        unique = [tensors[i] for i in self._unique] if self._same else tensors
        return tensors if self._check(*unique) else None

    def given(self, tensors: Sequence[Tensor]) -> Sequence[Any]:
        """What code is given for the module's tensors: themselves, or what stands for those that are elsewhere."""
        if not self.homes:
            return tensors
        given: list[Any] = [*tensors]
        for i, home in self.homes:
            given[i] = Parked(tensors[i], home)
        return given

    def _lie(self) -> bool:
        """True if everything but the tensors lies where it lay."""
        containers, keys, values = self._places
        # Lists compare identities first. What is not a number is equal to nothing else, but for equal texts.
        if list(map(getitem, containers, keys)) != values:
            return False
        containers, keys, values = self._numbers
        if not all(map(is_, map(getitem, containers, keys), values)):
            return False
        if any(self._empty) or list(map(len, self._sized)) != self._sizes:
            return False
        if list(map(type, self._typed)) != self._types or list(map(keys_of, self._listed)) != self._lists:
            return False
        if list(map(_CODE, self._functions)) != self._codes or list(map(_CALLED, self._classes)) != self._called:
            return False
        return all(is_same_value(find(), value) for find, value in self._computed)


class Walk:
    """Follows paths from a module, every link once.

    Args:
        module: where they begin.
        homes: of its weights that are elsewhere, by id; what a rank has of others is the weight.
    """

    def __init__(self, module: nn.Module, homes: Mapping[int, Home] = MappingProxyType({})) -> None:
        self._module, self._homes = module, homes
        self._found: dict[Path, Any] = {}
        self._places: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}
        self._computed: list[tuple[Callable[[], Any], Any]] = []
        self._sized: dict[int, Any] = {}
        self._watched: dict[int, Any] = {}
        self._functions: dict[int, Any] = {}
        self._typed: dict[int, Any] = {}
        self._classes: dict[type, Any] = {}

    def find(self, path: Path) -> Any:
        """What lies at a path; None where it is gone."""
        try:
            return self.value(path)
        except (KeyError, IndexError, AttributeError, TypeError):
            return None

    def value(self, path: Path) -> Any:
        """What lies at a path."""
        found = self._found.get(path, self)  # one look-up, since the hash of a path takes as long as following it
        if found is self:
            if path.links:
                by, key = path.links[-1]
                found = self._follow(self.value(path.parent), by, key)
            else:
                found = self._module if path.root == "self" else python_module(path.root)
            self._found[path] = found
        return found

    def put(self, path: Path, value: Any) -> bool:
        """Put a value back at a path; False where it cannot be done."""
        parent, (by, key) = self.value(path.parent), path.links[-1]
        place = find_place(parent, key) if by is By.ATTRIBUTE else (parent, key)
        if place is None or not isinstance(place[0], (dict, list)):
            return False
        place[0][place[1]] = value
        self._found[path] = value
        return True

    def watch(self, container: Any) -> None:
        """Pin the keys of a container, the elements of a set, or a length."""
        self._watched[id(container)] = container

    def check(self, fact: Fact) -> str | None:
        """What is wrong about a fact; None if it holds."""
        if fact.kind == "absent":
            return None if self._is_absent(fact.path) else f"{fact}: it is there now"
        value = self.value(fact.path)
        if not (value is self.value(fact.expected) if fact.kind == "same" else fact.holds(value)):
            return f"{fact}: it is {_shown(value)} now"
        if fact.kind == "container":
            self.watch(value)
        if fact.code is not None:
            self._functions[id(value)] = value
        if fact.kind == "object":
            self._typed[id(value)] = value
        return None

    def _is_absent(self, path: Path) -> bool:
        value, name = self.value(path.parent), path.links[-1][1]
        own = self._own(value)
        if isinstance(own, dict):
            self._sized[id(own)] = own
            for part in ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ():
                self._sized[id(own[part])] = own[part]
        return self._place(value, name) is None

    def _place(self, value: object, name: str) -> tuple[Any, Any] | None:
        """Where an attribute is found; the classes that are asked before must not get one of this name."""
        place = find_place(value, name)
        if place is not None and not isinstance(place[0], types.MappingProxyType):
            return place
        for cls in value.__mro__ if isinstance(value, type) else type(value).__mro__:
            held = self._classes.setdefault(cls, vars(cls))
            if place is not None and name in held:
                return held, name
            self._sized[id(held)] = held
        return place

    def _own(self, value: Any) -> Any:
        """The attributes of an object; every thread has its own ones of a ``threading.local``."""
        own = getattr(value, "__dict__", None)
        if isinstance(value, threading.local):
            self._places[id(value), By.DICT] = _Computed(vars), value, own
        return own

    def _follow(self, value: Any, by: By, key: Any) -> Any:
        if by is By.DICT:
            return self._own(value)
        if by is By.TYPE:
            return type(value)
        if by is By.CELL:
            return self._compute(key.contents)
        if by is By.HOOK:
            return self._at(value, key_of_hook(value, key))
        return self._at(value, key) if by is By.ITEM else self._attribute(value, key)

    def _attribute(self, value: Any, name: str) -> Any:
        own = self._own(value)
        if own is not None and not isinstance(value, (type, types.ModuleType)):
            self._sized[id(own)] = own
        place = self._place(value, name)
        return self._at(*place) if place is not None else self._compute(functools.partial(getattr, value, name))

    def _at(self, container: Any, key: Any) -> Any:
        if isinstance(container, tuple):
            return container[key]  # it is pinned itself
        if isinstance(container, (Mapping, list, types.MappingProxyType)) and not isinstance(key, slice):
            value = container[key]
            if key not in PARTS:
                self._places[id(container), key] = container, key, value
            return value if id(value) in self._homes else seen_as(value)
        return self._compute(functools.partial(getitem, container, key))

    def _compute(self, find: Callable[[], Any]) -> Any:
        value = find()
        self._computed.append((find, value))
        return value

    def _listed_and_sized(self) -> tuple[list[Any], list[Any]]:
        """Containers whose keys have to be compared, in order, and those of which the length tells."""
        listed, sized = [], list(self._sized.values())
        for container in self._watched.values():
            is_mapping = isinstance(container, Mapping)
            are_modules = is_mapping and all(isinstance(value, (nn.Module, type(None))) for value in container.values())
            is_pinned = are_modules and all((id(container), key) in self._places for key in container)
            if is_pinned or not (is_mapping or isinstance(container, AbstractSet)):
                sized.append(container)
            else:
                listed.append(container)
        return listed, sized

    def pins(self, paths: Sequence[Path], tensors: list[Tensor], modules: list[nn.Module]) -> Pins:
        """Everything that was found on the way."""
        places, homes = [], self._homes
        for path in paths:
            place = _place_of(self.value(path.parent), *path.links[-1])
            places.append(place)
            self._places.pop((id(place[0]), place[1]), None)  # its value may differ, and so may the tensor itself
        hooks = [vars(module)[name] for module in modules for name in HOOKS]
        for own in (vars(module) for module in modules if "forward" in vars(module)):
            self._at(own, "forward")  # where others bring its weights, somebody has to look anew
        listed, sized = self._listed_and_sized()
        return Pins(
            tensors=tensors,
            homes=tuple((i, homes[id(tensor)]) for i, tensor in enumerate(tensors) if id(tensor) in homes),
            divided=tuple(i for i, (at, key) in enumerate(places) if tensors[i] is not at[key] and is_divided(at[key])),
            _places=_columns(place for place in self._places.values() if _is_equal_to_itself_alone(place[2])),
            _numbers=_columns(place for place in self._places.values() if not _is_equal_to_itself_alone(place[2])),
            _computed=[(find, value) for find, value in self._computed if not isinstance(value, Tensor)],
            _listed=listed,
            _sized=[*sized, *(hook for hook in hooks if hook)],
            _empty=[hook for hook in hooks if not hook],
            _typed=list({**self._typed, **{id(module): module for module in modules}}.values()),
            _functions=list(self._functions.values()),
            _tensors_in=[container for container, _ in places],
            _tensor_keys=[key for _, key in places],
        )


@dataclass(frozen=True, slots=True)
class _Computed:
    """What Python computes when it is looked up, as items: the content of a cell, a property."""

    find: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        return self.find(key)


def _place_of(parent: Any, by: By, key: Any) -> tuple[Any, Any]:
    """Container and key of what lies at the end of a path."""
    if by is By.CELL:
        return _Computed(methodcaller("contents")), key
    if by is By.ATTRIBUTE:
        return find_place(parent, key) or (_Computed(functools.partial(getattr, parent)), key)
    return parent, key


def find_place(value: object, name: str) -> tuple[Any, Any] | None:
    """Dictionary and key where Python finds an attribute; None if it is not there, or computed.

    A forward is found as it is without hooks that bring weights, which run in no compiled code.
    """
    own = getattr(value, "__dict__", None)
    if own is not None and name in own:
        if name != "forward" or not isinstance(value, nn.Module):
            return own, name
        place = forward_under_hooks(value)
        if not is_own_method(value, place[0][place[1]]):  # accelerate leaves that when it removes a hook
            return place
    if isinstance(value, nn.Module):
        for part in ("_parameters", "_buffers", "_modules"):
            if name in own.get(part, ()):  # type: ignore[union-attr]
                return own[part], name  # type: ignore[index]
    for cls in value.__mro__ if isinstance(value, type) else type(value).__mro__:
        if name in vars(cls):
            return None if hasattr(type(vars(cls)[name]), "__set__") else (vars(cls), name)
    return None


def _is_equal_to_itself_alone(value: object) -> bool:
    return isinstance(value, (str, type(None), nn.Module, *FIXED)) or type(value).__eq__ is object.__eq__


def _columns(rows: Iterable[tuple[Any, Any, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    first, second, third = [], [], []
    for a, b, c in rows:
        first.append(a)
        second.append(b)
        third.append(c)
    return first, second, third


def key_of_hook(hooks: Mapping[int, Any], number: int) -> int:
    """Key of a hook, by its number among those that captures see."""
    return [key for key, hook in hooks.items() if seen_as(hook) is not None][number]


@functools.cache
def python_module(name: str) -> Any:
    """A Python module by name."""
    return sys.modules[name]


def below(path: Path, value: object, depth: int = 0) -> Iterator[tuple[Path, object]]:
    """A value and, where it is a container, everything in it."""
    yield path, value
    if depth < 6 and isinstance(value, Mapping):
        for key, item in value.items():
            yield from below(path.item(key), item, depth + 1)
    elif depth < 6 and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from below(path.item(i), item, depth + 1)
