"""Packages that a command needs and the compiler does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dicompile.errors import DicompileError

PACKAGES = {
    "PIL": "pillow",
    "diffusers": "diffusers",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "skimage": "scikit-image",
}
"""By the name under which a package is imported, the one that pip knows."""


@contextlib.contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """While open, a package that is not installed is named.

    Args:
        what: what needs it, in words.
        extra: brings it; also the name of the command.

    Raises:
        DicompileError: one is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise DicompileError(
            f"{what} needs {PACKAGES[package]}, which is not installed",
            where=f"dicompile {extra}",
            why="the compiler itself does without it",
            fix=f"pip install 'dicompile[{extra}]'",
        ) from None
