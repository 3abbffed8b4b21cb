"""Latents to train on, from one safetensors file.

| tensor | meaning |
|---|---|
| ``latents`` | clean latents, [n, c, ...], scaled as the model expects them |
| NAME | conditioning, [n, ...], by the name of the forward argument, ``class_labels`` |
| ``null.NAME`` | what the conditioning is replaced by where it is dropped, [...]; optional |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicompile import outside
from dicompile.errors import InvalidTrainingData

LATENTS = "latents"
_NULL = "null."
Data = Callable[[torch.Generator], Mapping[str, Any]]
"""Draws a batch: clean latents under "latents", [b, c, ...], and conditioning by the names of forward arguments."""


@dataclass(frozen=True)
class Latents:
    """A set of clean latents with their conditioning.

    Attributes:
        rows: tensors of n rows each, "latents" and conditioning by the names of forward arguments.
        null: what conditioning is replaced by where it is dropped.
    """

    rows: dict[str, Tensor]
    null: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Latents:
        """Read a file.

        Raises:
            InvalidTrainingData: it is missing or damaged, has no latents, or its tensors differ in length.
        """
        try:
            _, tensors = outside.read_safetensors(path, sys.maxsize)  # as many as somebody trains on
        except (OSError, outside.Unreadable) as error:
            raise _unusable(path, str(error)) from None
        rows = {name: value for name, value in tensors.items() if not name.startswith(_NULL)}
        null = {name.removeprefix(_NULL): value for name, value in tensors.items() if name.startswith(_NULL)}
        if LATENTS not in rows or not rows[LATENTS].ndim:
            raise _unusable(path, f"it holds {', '.join(tensors) or 'nothing'}")
        lengths = {name: len(value) if value.ndim else 0 for name, value in rows.items()}
        other = next((name for name, length in lengths.items() if length != lengths[LATENTS]), None)
        if other:
            raise _unusable(path, f"{lengths[LATENTS]} latents, but {lengths[other]} rows of {other}")
        if stray := [name for name in null if name not in rows or name == LATENTS]:
            raise _unusable(path, f"{_NULL}{stray[0]} replaces nothing that is there")
        return cls(rows, null)

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows drawn with replacement."""
        chosen = torch.randint(len(self.rows[LATENTS]), (batch,), generator=generator)
        return {name: value[chosen] for name, value in self.rows.items()}


def _unusable(path: Path, why: str) -> InvalidTrainingData:
    return InvalidTrainingData(
        f"cannot train on {path.name}",
        where=str(path),
        why=why,
        fix="write a safetensors file with latents [n, c, ...] and conditioning [n, ...] by forward argument",
    )
