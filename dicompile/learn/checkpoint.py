"""Files of a training: a checkpoint that is never half written, and a log of JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dicompile import outside
from dicompile.errors import DicompileError
from dicompile.store import written_whole


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a state of tensors and plain data; the old file stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, for_all=True) as file:
        torch.save(dict(state), file)


def load_checkpoint(path: Path, invalid: type[DicompileError]) -> Mapping[str, Any]:
    """Read a state; nothing in the file is executed.

    Args:
        path: the file.
        invalid: what is raised where it is damaged or something else.

    Raises:
        DicompileError: it is.
    """
    try:
        state = outside.read_pickle(path, most=sys.maxsize)
    except (OSError, outside.Unreadable) as error:
        state, why = None, str(error)
    else:
        why = "it is not the state of a training"
    if not isinstance(state, Mapping) or "key" not in state:
        raise invalid(
            f"{path.name} is not a checkpoint", where=str(path), why=why, fix="remove it and train from the start"
        )
    return state


def append_line(path: Path | None, content: Mapping[str, Any]) -> None:
    """Add a line of JSON to a log, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")


def forget_lines_after(path: Path | None, iteration: int) -> None:
    """Remove what a log says of later iterations: they are about to be repeated."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if _iteration_of(line) <= iteration]
    with written_whole(path, for_all=True) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def _iteration_of(line: str) -> float:
    """Iteration of a line; none at all if the line is torn, because the run was killed while it was written."""
    try:
        return float(json.loads(line)["iteration"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
