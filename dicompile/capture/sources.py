"""What Python code is, as text that is the same in every process, as long as the code is.

A capture is what some Python did. In this process the guards of a capture compare objects, by identity; another process
has other objects of the same names, whose code may have been edited in between. So what is compared there is the code
itself: bytecode and constants as they lie in memory (what is on disk may have been edited since it was imported),
defaults, variables of enclosing functions, attributes of classes. Only numbers of lines do not count.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path as File
from typing import Any

from dicompile.capture.guards import PLAIN
from dicompile.store import Unwritable, spelled

_OWN = str(File(__file__).parents[1])
_OF_TORCH = ("torch", "torch._dynamo")
"""Python modules of torch that are what torch's version says: the first is huge, the second is what traces."""
_NO_CODE = ("__dict__", "__weakref__", "__doc__", "__annotations__", "__module__", "_abc_impl")
_DEEPEST = 4
_WRAPPED = (
    property,
    types.DynamicClassAttribute,
    functools._lru_cache_wrapper,
    functools.partial,
    functools.cached_property,
)


class Sources:
    """Texts of code as it is now, each made once.

    Attributes:
        codes: all code that is part of a text.
    """

    def __init__(self) -> None:
        self.codes: set[types.CodeType] = set()
        self._texts: dict[int, str] = {}
        self._alive: list[object] = []  # ids are those of living objects

    def fixed(self, value: Any) -> str:
        """Exact text of a number, a name, a function, a class, or a Python module.

        Raises:
            Unwritable: it is something else, or means something in this process only.
        """
        if isinstance(value, (types.FunctionType, type)):
            return self.function(value) if isinstance(value, types.FunctionType) else self.kind(value)
        if isinstance(value, types.MethodType):
            return f"method of {self.fixed(value.__self__)}: {self.fixed(value.__func__)}"
        if isinstance(value, (classmethod, staticmethod, functools._lru_cache_wrapper)):
            return f"{type(value).__name__} {self.fixed(value.__wrapped__)}"
        if isinstance(value, property):
            return f"property {[part and self.fixed(part) for part in (value.fget, value.fset, value.fdel)]}"
        return spelled(value) if isinstance(value, PLAIN) else _built_in(value)

    def function(self, function: types.FunctionType) -> str:
        """Text of a function.

        Raises:
            Unwritable: torch runs it while it traces, and keeps the result.
        """
        if getattr(function, "_dynamo_marked_constant", False):
            raise Unwritable(f"{function.__qualname__}, which is run while the model is traced")
        return self._once(function, self._function)

    def kind(self, cls: type) -> str:
        """Text of a class and of those that it is derived from.

        Raises:
            Unwritable: it has no name by which another process finds it.
        """
        if "<locals>" in cls.__qualname__:
            raise Unwritable(f"the local class {cls.__qualname__}")
        return " ".join(self._once(base, self._class) for base in cls.__mro__)

    def module(self, name: str) -> str:
        """Text of all functions and classes of a Python module."""
        return self._once(sys.modules[name], self._module)

    def modules_of(self, codes: Iterable[types.CodeType]) -> list[str]:
        """Names of the Python modules in which code lies; that of torch's tracer, and ours, are left out.

        Raises:
            Unwritable: there is code of which it cannot be told.
        """
        by_file: dict[str, list[str]] = {}
        for name, module in list(sys.modules.items()):
            by_file.setdefault(getattr(module, "__file__", None) or "", []).append(name)
        names: set[str] = set()
        followed = [code for code in codes if not code.co_filename.startswith(_OWN)]
        for code in followed:
            found = by_file.get(code.co_filename) or _refused(code)
            names.update(found)
        names = {name for name in names if not _is_of_tracer(name)}
        for name in names:
            self.module(name)
        for code in followed:
            if code not in self.codes and not all(map(_is_of_tracer, by_file[code.co_filename])):
                raise Unwritable(f"{code.co_name}, which lies in no module")
        return sorted(names)

    def _once(self, value: Any, text: Any) -> str:
        if id(value) not in self._texts:
            self._alive.append(value)
            self._texts[id(value)] = "itself"
            self._texts[id(value)] = hashlib.sha256("\n".join(text(value)).encode()).hexdigest()[:32]
        return self._texts[id(value)]

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield f"{function.__module__}.{function.__qualname__}"
        yield self._code(function.__code__)
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()):
            yield self._loosely(part)
        for cell in function.__closure__ or ():
            try:
                yield self._loosely(cell.cell_contents)
            except ValueError:
                yield "empty"

    def _class(self, cls: type) -> Iterator[str]:
        yield f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__ != "builtins":
            yield from self._attributes(cls)

    def _attributes(self, holder: type) -> Iterator[str]:
        for name, value in sorted(vars(holder).items()):
            if name not in _NO_CODE:
                yield f"{name}: {self._loosely(value)}"

    def _module(self, module: types.ModuleType) -> Iterator[str]:
        for name, value in sorted(vars(module).items()):
            if isinstance(value, type):
                if value.__module__ == module.__name__:
                    yield f"{name}: {self._once(value, self._class)}"
            elif isinstance(value, (types.FunctionType, *_WRAPPED)):
                yield f"{name}: {self._loosely(value)}"

    def _loosely(self, value: Any, depth: int = 0) -> str:
        """Text of what belongs to a function or a class; of an object that is no code, its class."""
        text = "..."
        if isinstance(value, types.FunctionType):
            text = self._once(value, self._function)
        elif isinstance(value, type):
            is_nested = depth == 0 and "." in value.__qualname__ and "<locals>" not in value.__qualname__
            text = self._once(value, self._class) if is_nested else f"type {value.__module__}.{value.__qualname__}"
        elif isinstance(value, (classmethod, staticmethod, types.MethodType)):
            text = self._loosely(value.__func__, depth + 1)
        elif isinstance(value, _WRAPPED):
            parts = (getattr(value, part, None) for part in ("fget", "fset", "fdel", "__wrapped__", "func", "args"))
            text = str([self._loosely(part, depth + 1) for part in parts])
        elif type(value) is dict and depth < _DEEPEST:
            text = str([(self._loosely(k, depth + 1), self._loosely(v, depth + 1)) for k, v in value.items()])
        elif isinstance(value, (tuple, list)) and depth < _DEEPEST:
            text = str([self._loosely(item, depth + 1) for item in value])
        else:
            with contextlib.suppress(Unwritable):
                text = spelled(value)
        return f"{type(value).__module__}.{type(value).__qualname__} {text}"

    def _code(self, code: types.CodeType) -> str:
        self.codes.add(code)
        parts: list[object] = [
            code.co_name, code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount,
            code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_code.hex(),
            getattr(code, "co_exceptiontable", b"").hex(),
        ]  # fmt: skip
        parts += [self._code(part) if isinstance(part, types.CodeType) else _constant(part) for part in code.co_consts]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _constant(value: object) -> str:
    is_set = isinstance(value, frozenset)
    return f"{type(value).__name__} {sorted(map(repr, value)) if is_set else value!r}"  # type: ignore[call-overload]


def _built_in(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, types.BuiltinFunctionType):
        owner: Any = value.__self__
        return f"built-in {owner.__name__ if isinstance(owner, (type, types.ModuleType)) else ''}.{value.__name__}"
    if isinstance(value, (types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)):
        return f"built-in {value.__objclass__.__qualname__}.{value.__name__}"
    return str(_refused(value))


def _is_of_tracer(name: str) -> bool:
    return name in _OF_TORCH or name.startswith(f"{_OF_TORCH[1]}.")


def _refused(value: object) -> Any:
    raise Unwritable(f"a {type(value).__name__}")
