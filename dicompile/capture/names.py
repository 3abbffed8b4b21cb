"""Whose code is whose, and what code mentions by name."""

from __future__ import annotations

import dis
import functools
import importlib.util
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import torch

from dicompile.capture.guards import Path

OWN = str(File(__file__).parent.parent)
"""Folder of our code."""
_TORCH = str(File(torch.__file__).parent)
_PYTHON = str(File(dis.__file__).parent)


class Namespaces:
    """Classes and Python modules of which code may read by way of a variable, or of ``type()``.

    Python tells nobody of that: so what they hold under any name that code mentions counts as read.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Path, Any]] = {}

    def add(self, path: Path, namespace: Any) -> None:
        """Remember one.

        Args:
            path: where it is found.
            namespace: a class or a Python module; those of torch are left out, and so is None.
        """
        if namespace is not None and not is_of_torch(namespace):
            self._found.setdefault(id(namespace), (path, namespace))

    def mentioned(self, codes: Iterable[types.CodeType]) -> Iterator[tuple[Path, Any]]:
        """What they hold under a name that code mentions, but for methods and the like.

        Args:
            codes: what was run, or traced.
        """
        names = {name for code in codes for name in (*code.co_names, *code.co_consts) if type(name) is str}
        for path, namespace in list(self._found.values()):
            is_class, seen = isinstance(namespace, type), set[str]()
            for holder in namespace.__mro__ if is_class else (namespace,):
                held: Mapping[str, Any] = {} if is_of_torch(holder) else vars(holder)
                for name in sorted((names & held.keys()) - seen):
                    if not (name.startswith("__") or (is_class and hasattr(type(held[name]), "__get__"))):
                        yield path.attribute(name), held[name]
                seen |= held.keys()


def instructions_of(code: types.CodeType) -> list[dis.Instruction]:
    """What code does, one instruction after the other; a prefix for a large number belongs to the next one."""
    return [instruction for instruction in dis.get_instructions(code) if instruction.opname != "EXTENDED_ARG"]


def imported(instructions: Sequence[dis.Instruction], package: str | None) -> Iterator[str]:
    """Names of Python modules that code imports whenever it runs.

    Args:
        instructions: of a function.
        package: in which it lies.
    """
    for i, instruction in enumerate(instructions):
        if instruction.opname == "IMPORT_NAME":
            level, names = instructions[i - 2].argval, instructions[i - 1].argval
            found = importlib.util.resolve_name("." * level + instruction.argval, package)
            yield from (found, *(f"{found}.{name}" for name in names or ()))


@functools.cache
def is_of_others(file: str) -> bool:
    """True for code of torch, of Python itself, and of ours, and for what was generated."""
    if file.startswith((_TORCH, OWN, "<")):
        return True
    return file.startswith(_PYTHON) and "site-packages" not in file and "dist-packages" not in file


def is_of_torch(namespace: Any) -> bool:
    """True for a class or a Python module of torch, or of those that Python has built in."""
    name: str = namespace.__module__ if isinstance(namespace, type) else namespace.__name__
    return name.startswith(("torch", "builtins"))
