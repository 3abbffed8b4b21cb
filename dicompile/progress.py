"""Bars for what takes long: on stderr, in a terminal only, and not where the user asked for quiet."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

log = logging.getLogger("dicompile")

Item = TypeVar("Item")

_TERMINAL = threading.Lock()
"""Held by the bar that is shown: there is one at a time."""


class Update(Protocol):
    """Moves a bar on."""

    def __call__(self, *, description: str | None = None, advance: float | None = None) -> None:
        """Say what goes on, and how many items were done since."""


@contextlib.contextmanager
def progress(description: str, total: float | None = None, *, shown: bool = True) -> Iterator[Update]:
    """A bar that leaves nothing behind.

    It is shown in a terminal, unless warnings of the logger "dicompile" are off, as ``dicompile --quiet`` has it, or
    another bar is shown.

    Args:
        description: what goes on.
        total: number of items; None where nobody knows.
        shown: False for no bar.
    """
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(20)]
    columns += [MofNCompleteColumn()] if total is not None else []
    is_wanted = shown and console.is_terminal and log.isEnabledFor(logging.WARNING)
    is_shown = is_wanted and _TERMINAL.acquire(blocking=False)
    try:
        with Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, refresh_per_second=2, disable=not is_shown
        ) as bar:
            yield functools.partial(bar.update, bar.add_task(description, total=total))
    finally:
        if is_shown:
            _TERMINAL.release()


def tracked(items: Iterable[Item], description: str, total: int, *, shown: bool = True) -> Iterator[Item]:
    """Items with a bar for them."""
    with progress(description, total, shown=shown) as update:
        for item in items:
            yield item
            update(advance=1)
