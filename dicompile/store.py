"""What another process may use again, in a folder of our own: captures and compiled code, one file each.

What is loaded from there is run, so nothing is loaded that we did not write: folder and files belong to the user,
nobody else may write to them, and every file begins with the hash of the rest. A file goes to its place in one step,
whole, so that processes need no lock. Whatever is wrong with the folder (full, read-only, somebody else's), it is left
alone, and one log line says so: a cache that cannot be used costs time, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

log = logging.getLogger("dicompile")

_SUFFIX = ".dicompile"
_HASH = hashlib.sha256
_BEGINS = b"dicompile 1\n"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SPELLED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format,
            torch.layout)  # fmt: skip
_ItemT = TypeVar("_ItemT")


class Unwritable(Exception):
    """Something that cannot be written down exactly, so that it stays in this process."""


@dataclass(frozen=True)
class Entry:
    """A file of the store.

    Attributes:
        path: where it lies.
        size: bytes.
        used: when it was written, or last of use; seconds since the epoch.
    """

    path: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        """What it is an entry of, "capture" or "code"."""
        return self.path.name.partition("-")[0]


@dataclass(frozen=True)
class Kept:
    """What was kept under a key.

    Attributes:
        content: as it was handed in.
        path: of its file.
    """

    content: bytes
    path: Path

    def used(self) -> None:
        """Note that it was of use: what was not for longest goes first, and is looked at last."""
        with contextlib.suppress(OSError):
            os.utime(self.path)


class Store:
    """Files by kind and key.

    Args:
        folder: where they lie; made when the first one is written.
        most_bytes: of all files together; those that were not used for longest go.
    """

    def __init__(self, folder: Path | None, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._complained = False

    @classmethod
    def of(cls, folder: Path | None, most_bytes: int) -> Store:
        """The store of a folder, the same one for everybody in the process; one without a folder keeps nothing."""
        return _store_of(folder, most_bytes)

    @property
    def is_open(self) -> bool:
        """True if something may be found or kept."""
        return self.folder is not None

    def get(self, kind: str, key: str) -> Iterator[Kept]:
        """What was kept under a key, what was of use last first; files that are damaged or not ours are left out."""
        folder = self._checked()
        found = [] if folder is None else sorted(folder.glob(f"{kind}-{key}-*{_SUFFIX}"), key=_last_used, reverse=True)
        for path in found:
            content = self._read(path)
            if content is not None:
                yield Kept(content, path)

    def put(self, kind: str, key: str, content: bytes) -> None:
        """Keep something under a key, besides what is kept there already."""
        folder = self._checked(make=True)
        if folder is None:
            return
        digest = _HASH(content).hexdigest()
        path = folder / f"{kind}-{key}-{digest[:16]}{_SUFFIX}"
        try:
            with written_whole(path) as file:
                file.write(_BEGINS + digest.encode() + b"\n" + content)
            self._shrink()
        except OSError as error:
            self._complain(f"cannot be written to: {error.strerror or error}")

    def entries(self) -> list[Entry]:
        """All files of ours, of all versions, those that were used last first."""
        return sorted(self._entries(), key=lambda entry: entry.used, reverse=True)

    def clear(self) -> list[Entry]:
        """Remove all of them; returns what was removed."""
        return [entry for entry in self.entries() if _removed(entry.path)]

    def _entries(self) -> Iterator[Entry]:
        for path in self.folder.glob(f"*/*{_SUFFIX}") if self.folder is not None and self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # somebody else removed it
                about = path.stat()
                yield Entry(path, about.st_size, about.st_mtime)

    def _shrink(self) -> None:
        total = 0
        for entry in self.entries():
            total += entry.size
            if total > self.most_bytes:
                _removed(entry.path)

    def _checked(self, *, make: bool = False) -> Path | None:
        """The folder of this version, if nobody else can have put anything there."""
        if self.folder is None:
            return None
        folder = self.folder / version()
        try:
            if make:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                for made in (self.folder, folder):  # by themselves: whatever the umask, nobody else may write there
                    made.mkdir(mode=0o700, exist_ok=True)
            wrong = next(filter(None, map(_not_ours, (self.folder.stat(), folder.stat()))), None)
        except FileNotFoundError:
            return None
        except OSError as error:
            wrong = f"cannot be used: {error.strerror or error}"
        if wrong is not None:
            self._complain(wrong)
        return folder if wrong is None else None

    def _read(self, path: Path) -> bytes | None:
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
                wrong = _not_ours(os.fstat(file.fileno()))
                content = file.read()
            begins, digest, rest = content[: len(_BEGINS)], content[len(_BEGINS) :][:64], content[len(_BEGINS) + 65 :]
            if wrong is None and (begins != _BEGINS or _HASH(rest).hexdigest().encode() != digest):
                wrong = "is damaged"
                _removed(path)
            if wrong is None:
                return rest
            log.warning("%s %s, so it is not used", path, wrong)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(f"cannot be read: {error.strerror or error}")
        return None

    def _complain(self, wrong: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the cache folder %s %s; it is left unused where that matters", self.folder, wrong)


_store_of = functools.cache(Store)


def _not_ours(about: os.stat_result) -> str | None:
    """Why somebody else may have written to a file or folder; None if nobody can have."""
    if hasattr(os, "geteuid") and about.st_uid != os.geteuid():
        return "belongs to another user"
    if os.name == "posix" and about.st_mode & _OTHERS_WRITE:
        return "may be written to by other users (chmod go-w makes it safe, if its content is yours)"
    return None


@contextlib.contextmanager
def written_whole(path: Path, *, for_all: bool = False) -> Iterator[Any]:
    """A file that is there whole, or not at all; readable and writable by us alone, or by whom the user wants.

    Args:
        path: of the file.
        for_all: others may read it, as the process's mask says.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-", suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        if for_all:
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        _removed(Path(name))
        raise


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file that is there whole, or not at all, and the folder that it is to lie in.

    Args:
        path: of the file.
        tensors: by name; contiguous.
        about: what its header says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, for_all=True) as file:
        file.write(safetensors.torch.save(dict(tensors), metadata=dict(about)))


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@functools.cache
def version() -> str:
    """Name of the folder of everything that was made by the same programs on a machine of the same kind."""
    digest = _HASH()
    for path in _sources():
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    about = (
        sys.version, torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip,
        _version_of("triton"), str(torch.accelerator.current_accelerator()),
        torch.backends.cpu.get_cpu_capability(), _processor(), digest.hexdigest(),
    )  # fmt: skip
    return f"torch{torch.__version__}-{_HASH(repr(about).encode()).hexdigest()[:16]}"


def _sources() -> list[Path]:
    """All code of ours, in the source tree as where it is installed."""
    root = Path(__file__).parent
    return sorted(
        path for folder in (root, root.parent / "passes", root.parent / "runtime") for path in folder.rglob("*.py")
    )


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """What the processor can do: C++ is compiled for this very kind of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def device_text(device: torch.device) -> str:
    """A device, and what kind of accelerator it is: code for one kind does not run on another."""
    if device.type in ("cpu", "meta"):
        return str(device)
    about = torch.get_device_module(device).get_device_properties(device)
    return f"{device} {about.name} {getattr(about, 'major', '')}.{getattr(about, 'minor', '')}"


def key_of(*parts: object) -> str:
    """A hash of values that is the same in every process.

    Raises:
        Unwritable: one of them may be another one in another process, and look the same.
    """
    return _HASH(spelled(parts).encode()).hexdigest()[:32]


def spelled(value: object) -> str:
    """Exact text of a value that means the same in every process.

    Raises:
        Unwritable: it has none.
    """
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name} = {spelled(value.value)}"
    if type(value) in _SPELLED:
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (frozenset, set)):
        return f"{type(value).__name__}{sorted(map(spelled, value))}"
    if isinstance(value, (tuple, list)):  # named tuples and sizes among them
        return f"{_name(type(value))}[{', '.join(map(spelled, value))}]"
    if isinstance(value, type):
        return f"type {_name(value)}"
    if dataclasses.is_dataclass(value):
        return f"{_name(type(value))}({', '.join(spelled(getattr(value, f.name)) for f in dataclasses.fields(value))})"
    raise Unwritable(f"a {type(value).__name__}")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def packed(head: object, parts: dict[str, bytes]) -> bytes:
    """Plain data and named bytes as bytes."""
    sizes = {name: len(part) for name, part in parts.items()}
    line = json.dumps([head, sizes], separators=(",", ":")).encode()
    return line + b"\n" + b"".join(parts.values())


def unpacked(content: bytes) -> tuple[Any, dict[str, bytes]]:
    """The reverse of `packed`."""
    line, _, rest = content.partition(b"\n")
    head, sizes = json.loads(line)
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = rest[start : start + size]
        start += size
    return head, parts
