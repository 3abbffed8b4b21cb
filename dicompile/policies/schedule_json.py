"""Schedules as JSON: per branch one 0 (reuse) or 1 (compute) for every call of the model.

The format is SmoothCache's, in which learned schedules are passed around::

    {"attn-0": [1, 0, 1, 0, ...], "mlp-0": [1, 1, 1, 0, ...], ...}

Reference:
    Liu et al., SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers, arXiv 2411.10510.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from dicompile import outside
from dicompile.errors import InvalidRouter

BRANCHES = {
    "attn": "self-attention",
    "cross-attn": "cross-attention",
    "joint-attn": "joint-attention",
    "mlp": "mlp",
    "parallel": "parallel",
}
"""Their name for a kind of site -> ours, in the order in which a block runs them."""
_KEY = re.compile(rf"({'|'.join(BRANCHES)})-([0-9]{{1,6}})")


def schedule_to_json(compute: Tensor, sites: Sequence[str]) -> str:
    """A schedule as JSON text.

    Args:
        compute: bool [steps, sites], in calling order.
        sites: labels of the sites, "3.mlp".

    Raises:
        InvalidRouter: a block has two sites of one kind, which the format cannot tell apart.
    """
    theirs = {ours: name for name, ours in BRANCHES.items()}
    keys = [f"{theirs[kind]}-{block}" for block, _, kind in (label.partition(".") for label in sites)]
    twice = next((label for label, key in zip(sites, keys, strict=True) if keys.count(key) > 1), None)
    if twice:
        raise InvalidRouter(
            f"this schedule has more than one site {twice}",
            where="schedule_to_json",
            why="the format names a site by its block and kind",
            fix="keep the router's own file",
        )
    columns = compute.to(torch.int64).T.tolist()
    lines = (f'"{key}": {json.dumps(column)}' for key, column in zip(keys, columns, strict=True))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def schedule_from_json(text: str | bytes, source: str = "JSON") -> tuple[Tensor, tuple[str, ...]]:
    """A schedule and the labels of its sites from JSON text.

    Returns:
        bool [steps, sites] in calling order, and the labels in execution order.

    Raises:
        InvalidRouter: the text is something else.
    """
    try:
        data = outside.from_json(text)
    except outside.Unreadable as error:
        raise _no_schedule(source, str(error)) from None
    if not isinstance(data, dict) or not data:
        raise _no_schedule(source, "it is not an object with one list per branch")
    columns: dict[tuple[int, int], Sequence[int]] = {}
    for key, column in data.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise _no_schedule(source, f"{outside.shown(key)} is not attn-0, mlp-0, ...")
        if not is_column(column):
            raise _no_schedule(source, f"{outside.shown(key)} is not a list of 0 and 1")
        columns[int(match[2]), list(BRANCHES).index(match[1])] = column
    if len({len(column) for column in columns.values()}) > 1:
        raise _no_schedule(source, "its lists have different lengths")
    order = sorted(columns)
    compute = torch.tensor([columns[key] for key in order], dtype=torch.bool).T.contiguous()
    return compute, tuple(f"{block}.{list(BRANCHES.values())[kind]}" for block, kind in order)


def is_column(value: object) -> TypeGuard[Sequence[int]]:
    """True for 0 or 1 for every step."""
    return isinstance(value, Sequence) and bool(value) and all(entry in (0, 1) for entry in value)


def _no_schedule(source: str, why: str) -> InvalidRouter:
    return InvalidRouter(
        "this is not a schedule",
        where=source,
        why=why,
        fix='write {"attn-0": [1, 0, ...], "mlp-0": [1, 1, ...], ...} with one entry per call of the model',
    )
