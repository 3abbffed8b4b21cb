"""Routers as files: our own, safetensors with facts in the header, and the published checkpoints.

A published checkpoint is a pickle. It is read by torch's restricted unpickler, which knows tensors, containers and, for
the training options beside them, ``argparse.Namespace``; nothing in the file is executed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dicompile import outside
from dicompile.errors import InvalidRouter
from dicompile.policies.router import Grid, Router, RouterFacts
from dicompile.store import save_tensors, written_whole

HEADER = "dicompile.router"
PUBLISHED_THRESHOLD: dict[Grid, float] = {"ddim": 0.1, "dpm-solver-2": 0.9}
"""Thresholds of the published results."""


@dataclass(frozen=True, slots=True)
class _Header:
    """Everything but the logits."""

    grid: Grid
    threshold: float
    facts: RouterFacts = field(default_factory=RouterFacts)
    format: int = 1


_HEADERS = TypeAdapter(_Header)


def save_router(router: Router, path: str | Path) -> None:
    """Write a router as safetensors, and what people want to know of it as JSON beside it.

    Args:
        router: the router.
        path: of the safetensors file; the JSON file has the same name but for its suffix.
    """
    path = Path(path)
    header = _Header(router.grid, router.threshold, router.facts)
    save_tensors(path, {"logits": router.logits.contiguous()}, {HEADER: _HEADERS.dump_json(header).decode()})
    about = {"summary": router.summary(), "cached": router.cached(), **asdict(header)}
    with written_whole(path.with_suffix(".json"), for_all=True) as file:
        file.write((json.dumps(about, indent=1) + "\n").encode())


def load_router(path: str | Path) -> Router:
    """Read a router from our own safetensors file or from a published checkpoint (.pt, .pth).

    Raises:
        InvalidRouter: there is no such file, or it is damaged, hostile, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidRouter(
            f"there is no router {path}",
            where="load_router",
            fix="give the file that `dicompile train-router` wrote, or a published checkpoint",
        )
    return _load_own(path) if path.suffix == ".safetensors" else _load_published(path)


def _load_own(path: Path) -> Router:
    try:
        metadata, tensors = outside.read_safetensors(path)
        header = _HEADERS.validate_python(outside.from_json(metadata.get(HEADER, "")))
    except (outside.Unreadable, ValidationError, OSError) as error:
        raise _damaged(path, str(error)) from None
    if "logits" not in tensors:
        raise _damaged(path, "it holds no logits")
    return Router(tensors["logits"], header.grid, header.threshold, header.facts, str(path))


def _load_published(path: Path) -> Router:
    try:
        content = outside.read_pickle(path, [argparse.Namespace])
    except (outside.Unreadable, OSError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, Mapping):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    grid: Grid = "ddim" if "routers" in content else "dpm-solver-2"
    logits = _logits(content.get("routers", content), path)
    return Router(logits, grid, PUBLISHED_THRESHOLD[grid], _facts(content.get("args"), logits), str(path))


def _logits(rows: object, path: Path) -> Tensor:
    """Stack ``"k.prob"`` -> [sites], for k = 0 .. T-1, to [T, sites]."""
    if not isinstance(rows, Mapping) or set(rows) != {f"{k}.prob" for k in range(len(rows))} or not rows:
        raise _damaged(path, "its keys are not 0.prob, 1.prob, ... without a gap")
    values = [rows[f"{k}.prob"] for k in range(len(rows))]
    if not all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
        raise _damaged(path, "its rows are not tensors of one shape")
    try:
        outside.check_tensors(values, path)
    except outside.Unreadable as error:
        raise _damaged(path, str(error)) from None
    return torch.stack(values)


def _facts(options: object, logits: Tensor) -> RouterFacts:
    """Facts from the training options; both published models alternate between attention and MLP."""
    kinds = ("self-attention", "mlp")
    sites = tuple(f"{i // 2}.{kinds[i % 2]}" for i in range(logits.shape[-1]))
    known = vars(options) if isinstance(options, argparse.Namespace) else {}

    def option(name: str, kind: type[Any]) -> Any:
        return known[name] if isinstance(known.get(name), kind) else None

    return RouterFacts(
        sites=sites,
        model=option("model", str) or "",
        penalty=option("l1", float),
        batch=option("global_batch_size", int),
        seed=option("global_seed", int),
    )


def _damaged(path: Path, complaint: str) -> InvalidRouter:
    return InvalidRouter(
        f"{path.name} is not a router",
        where=str(path),
        why=complaint.partition("\n")[0],
        fix="give the file that `dicompile train-router` wrote, or a published checkpoint",
    )
