"""Files that commands write: whole, or not at all, so that ctrl-C leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

from dicompile.errors import DicompileError
from dicompile.store import written_whole


def make_folder(file: Path, where: str) -> None:
    """Make the folder of a file, so that work does not end in a missing one.

    Raises:
        DicompileError: it cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DicompileError(
            f"cannot write to {file}", where=where, why=str(error), fix="name a file in a folder that can be made"
        ) from None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole, or not at all.

    Raises:
        DicompileError: it cannot be written.
    """
    try:
        with written_whole(file, for_all=True) as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise DicompileError(
            f"cannot write {file}", where="file name", why=str(error), fix="name a file that can be written"
        ) from None
