"""Everything that the environment decides, read in one place; and the whole of it, where a model reads of it.

| variable | meaning |
|---|---|
| ``DICOMPILE_DEBUG`` | folder for numbered text files of every stage, and an index.html; unset: nothing is written |
| ``DICOMPILE_CHECK`` | ``1``: every read of a stored value is held against the plan, and a stale one raises |
| ``DICOMPILE_PASSES`` | passes to leave out, each with a minus: ``-narrow-linear,-drop-dead`` |
| ``DICOMPILE_CACHE_DIR`` | folder of what the next process uses again; ``off``: none; unset: ``~/.cache/dicompile`` |
| ``DICOMPILE_CACHE_MIB`` | most that this folder holds, in MiB; unset: 2048 |
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch._logging import trace_structured  # type: ignore[attr-defined]

from dicompile.debug import INDEX, index_page
from dicompile.errors import InvalidSetting
from dicompile.store import Store, written_whole

READING_ENVIRONMENT = frozenset({os.environ.encodekey.__code__, os.environ.decodevalue.__code__})
"""Code that runs whenever an environment variable is looked up, wherever the look-up begins."""
_SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def environment() -> int:
    """What tells environments apart, but for variables that torch sets when it first compiles; no values are kept."""
    return hash(frozenset(item for item in os.environ.items() if item[0] not in _SET_BY_TORCH))


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment variables said."""

    debug: Path | None = None
    disabled_passes: frozenset[str] = frozenset()
    check: bool = False
    cache: Path | None = None
    cache_bytes: int = 2**31

    @property
    def store(self) -> Store:
        """What other processes left, and get."""
        return Store.of(self.cache, self.cache_bytes)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables listed in the module docstring.

        Raises:
            InvalidSetting: an item of ``DICOMPILE_PASSES`` does not start with a minus, ``DICOMPILE_CHECK`` is
                neither 0 nor 1, or ``DICOMPILE_CACHE_MIB`` is no number of MiB.
        """
        check = environment.get("DICOMPILE_CHECK", "") or "0"
        if check not in ("0", "1"):
            raise InvalidSetting(
                f"DICOMPILE_CHECK cannot be {check!r}",
                where="environment",
                fix="DICOMPILE_CHECK=1 checks every read of a stored value, 0 checks none",
            )
        items = [item.strip() for item in environment.get("DICOMPILE_PASSES", "").split(",") if item.strip()]
        for item in items:
            if not item.startswith("-"):
                raise InvalidSetting(
                    f"DICOMPILE_PASSES has the item {item!r}",
                    where="environment",
                    why="passes run by default, so an item can only leave one out",
                    fix=f"DICOMPILE_PASSES=-{item}",
                )
        most = environment.get("DICOMPILE_CACHE_MIB", "") or "2048"
        if not most.isdecimal():
            raise InvalidSetting(
                f"DICOMPILE_CACHE_MIB cannot be {most!r}",
                where="environment",
                fix="DICOMPILE_CACHE_MIB=2048 lets the cache folder hold 2 GiB",
            )
        debug = environment.get("DICOMPILE_DEBUG")
        return cls(
            debug=Path(debug) if debug else None,
            disabled_passes=frozenset(item[1:] for item in items),
            check=check == "1",
            cache=_cache_folder(environment),
            cache_bytes=int(most) * 2**20,
        )


def environment_with(more: Mapping[str, str]) -> dict[str, str]:
    """The environment for another process, with more variables, or other values."""
    return {**os.environ, **more}


@contextlib.contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    """While open, a variable has another value: some libraries can be told in no other way."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _cache_folder(environment: Mapping[str, str]) -> Path | None:
    said = environment.get("DICOMPILE_CACHE_DIR")
    if said:
        return None if said == "off" else Path(said).absolute()
    above = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(above) if above else Path.home() / ".cache") / "dicompile"
    except RuntimeError:  # a user without a home
        return None


class DebugFolder:
    """Writes stages as numbered text files in reading order, and to torch's structured trace.

    Without a folder and a trace (``TORCH_TRACE=folder``, shown by tlparse) nothing is even made into text.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @property
    def is_open(self) -> bool:
        """True if stages are written to a folder, so that every one has to be made."""
        return self.folder is not None

    def write(self, name: str, content: object) -> None:
        """Write the text of `content` as the next file, ``NNN-name.txt``, and as artifact ``dicompile-name``.

        What is in the folder already is kept; ``index.html`` links all of it.
        """
        text = functools.cache(lambda: f"{content}\n")
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"dicompile-{name}", "encoding": "string"},
            payload_fn=text,
            expect_trace_id=False,
        )
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self.folder.glob("*.txt")]
        names.append(f"{len(names):03d}-{name}.txt")
        for file, written in ((names[-1], text()), (INDEX, index_page(names))):
            with written_whole(self.folder / file, for_all=True) as stream:
                stream.write(written.encode())
