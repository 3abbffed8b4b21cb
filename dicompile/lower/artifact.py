"""Compiled code as bytes, and back: what Inductor made, with the libraries that it runs.

torch gives all that a graph was compiled to as one artifact (``standalone_compile``, torch 2.11 to 2.14), but for the
shared libraries of C++ kernels: these are looked for in Inductor's own folder, and compiled where they are missing. So
they go with the artifact, and everything is unpacked into a folder that this process alone has, for as long as it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.standalone_compile import CacheCompiledArtifact

from dicompile.config import in_environment
from dicompile.store import Unwritable, packed, unpacked, written_whole

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
Compiled = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Artifact:
    """What Inductor made of a graph.

    Attributes:
        artifact: as torch calls it.
        kernels: names of the C++ libraries that it runs.
    """

    artifact: Any = field(repr=False)
    kernels: frozenset[str] = frozenset()

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run it."""
        results: Sequence[Any] = self.artifact(*arguments)
        return results


@dataclass(frozen=True)
class Bound:
    """Code with symbols, for some values of them."""

    function: Compiled
    values: tuple[int, ...]

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run it."""
        return self.function(*arguments, *self.values)


@dataclass(frozen=True)
class PassOn:
    """Results of a function, and between them arguments that leave as they came: a reused stream is not copied.

    Attributes:
        function: computes the other ones.
        places: for every result the number of the argument that it is, or None.
    """

    function: Compiled
    places: tuple[int | None, ...]

    def __call__(self, *arguments: Any) -> list[Any]:
        """Run it."""
        computed = iter(self.function(*arguments))
        return [next(computed) if place is None else arguments[place] for place in self.places]


def nothing(*_: Any) -> tuple[()]:
    """Code that computes nothing."""
    return ()


def _kernel_cache() -> Any:
    """Inductor's class that compiles and loads C++ kernels; a command that only looks does without its module."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return CppPythonBindingsCodeCache


def compiled_code(compile_: Callable[[], Any]) -> Artifact:
    """Compile, and note which libraries that takes."""
    kernel_cache, kernels = _kernel_cache(), set[str]()
    cache = kernel_cache.cache
    noting = _Noting(cache, kernels)
    try:
        with mock.patch.object(kernel_cache, "cache", noting):
            artifact = compile_()
    finally:
        cache.update(noting)
    return Artifact(artifact, frozenset(kernels))


class _Noting(dict[str, Any]):
    """Notes which keys are asked for."""

    def __init__(self, given: dict[str, Any], noted: set[str]) -> None:
        super().__init__(given)
        self._noted = noted

    def __getitem__(self, key: str) -> Any:
        self._noted.add(key)
        return super().__getitem__(key)


def code_bytes(function: Compiled) -> bytes:
    """Compiled code as bytes.

    Raises:
        Unwritable: torch did not make an artifact of it.
    """
    places: tuple[int | None, ...] | None = None
    values: tuple[int, ...] | None = None
    if isinstance(function, PassOn):
        places, function = function.places, function.function
    if function is nothing:
        return packed({"places": places}, {})
    if isinstance(function, Bound):
        values, function = function.values, function.function
    made = function.artifact._artifacts if isinstance(function, Artifact) else None
    if made is None or len(made[1].aot_autograd_artifacts) != 1:
        raise Unwritable("code that torch cannot save")
    head = {"places": places, "values": values, "key": made[1].aot_autograd_artifacts[0]}
    assert isinstance(function, Artifact)
    return packed(head, {"": made[0], **dict(_libraries(function.kernels))})


def _libraries(kernels: frozenset[str]) -> Iterator[tuple[str, bytes]]:
    for key in sorted(kernels):
        for root in (Path(cache_dir()), own_folder()):
            found = [path for path in (root / key[1:3]).glob(f"{key}.*") if path.suffix != ".cpp"]
            if found:
                yield from ((f"{key[1:3]}/{path.name}", path.read_bytes()) for path in found)
                break
        else:
            raise Unwritable("code whose libraries are gone")


def code_of(content: bytes) -> Compiled:
    """The reverse of `code_bytes`; nothing is compiled.

    Args:
        content: of somebody who may run code here.
    """
    head, parts = unpacked(content)
    places = head["places"] and tuple(head["places"])
    if "key" not in head:
        return nothing if places is None else PassOn(nothing, places)
    for name, part in parts.items():
        path = own_folder() / name
        if name and not path.exists():
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as file:
                file.write(part)
    with _in_own_folder():
        torch.compiler.load_cache_artifacts(parts[""])
        function: Compiled = Artifact(CacheCompiledArtifact._load_impl(contextlib.nullcontext(), head["key"]))
    if head["values"] is not None:
        function = Bound(function, tuple(head["values"]))
    return function if places is None else PassOn(function, places)


def own_folder() -> Path:
    """A folder that this process alone has."""
    return _folder_of(os.getpid())


@functools.cache
def _folder_of(process: int) -> Path:
    folder = tempfile.mkdtemp(prefix="dicompile-")  # readable and writable by us alone
    atexit.register(_remove, folder, process)
    return Path(folder)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _in_own_folder() -> Iterator[None]:
    """While open, Inductor looks for what it made in our folder, and leaves the C++ compiler alone."""
    was_asked = valid_vec_isa_list.cache_info().currsize > 0
    with (
        in_environment(_FOLDER, str(own_folder())),
        torch._inductor.config.patch({"cpp.vec_isa_ok": True}),
        mock.patch.object(VecISA, "check_build", lambda *_: True),  # of bfloat16 and VNNI, which the setting leaves out
        mock.patch.object(_kernel_cache(), "_get_uncompiled_header", lambda _: None),
    ):
        yield
    if not was_asked:  # who compiles anew asks the compiler
        valid_vec_isa_list.cache_clear()
