"""What the logger "dicompile" says on stderr while a command runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("dicompile")


@contextlib.contextmanager
def logged(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """While open, log lines go to stderr: warnings, or errors only, or everything that is worth a line.

    Whoever set up logging before (``TORCH_LOGS="+dicompile"``) keeps it, unless he asks here.

    Args:
        quiet: errors only; bars follow this level, too (`dicompile.progress`).
        verbose: what is captured and compiled as well.
    """
    level, handlers = log.level, log.handlers
    if quiet or verbose:
        log.setLevel(logging.ERROR if quiet else logging.INFO)
    if not handlers:
        console = Console(stderr=True)
        log.handlers = [RichHandler(console=console, show_time=False, show_path=False, markup=False, highlighter=None)]
    try:
        yield
    finally:
        log.handlers = handlers
        log.setLevel(level)
