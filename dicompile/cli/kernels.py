"""``dicompile inspect --kernels``: what steps launch on a GPU, counted without one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text

from dicompile.capture import Capture
from dicompile.cli.show import FAINT, Candidate
from dicompile.errors import DicompileError
from dicompile.lower import Hoist
from dicompile.progress import progress
from dicompile.text import size_text

if TYPE_CHECKING:
    from dicompile.bench.deviceless import Row

VERSION = "2.13."
"""Of torch, whose internals `dicompile.bench.deviceless` knows."""


def check_can_count() -> None:
    """Check that kernels can be generated at all.

    Raises:
        DicompileError: there is no Triton, or torch is of a version whose internals are others.
    """
    if importlib.util.find_spec("triton") is None:
        raise DicompileError(
            "kernels cannot be counted without triton",
            where="--kernels",
            why="Inductor generates Triton for a GPU, and this build of torch came without it",
            fix="pip install 'dicompile[triton]'",
        )
    if not torch.__version__.startswith(VERSION):
        raise DicompileError(
            f"kernels cannot be counted with torch {torch.__version__}",
            where="--kernels",
            why=f"pretending a GPU takes internals of torch, which are known of {VERSION}*",
            fix=f"use torch {VERSION}* for this; everything else runs with others",
        )


def kernel_rows(capture: Capture, plans: Sequence[Candidate]) -> list[Row]:
    """What every kind of step launches, by policy, beside `torch.compile`; the capture is spent afterwards."""
    from dicompile.bench import deviceless

    with deviceless.pretended_cuda(), progress("lowering", len(plans) + 1) as update:
        deviceless.move_to_cuda(capture)
        steps = deviceless.Steps(capture)
        rows = [steps.uncached()]
        for item in (item for item in plans if item.plan.gate is None):
            update(advance=1, description=f"lowering {item.label}")
            rows += steps.rows(item.plan, item.label, Hoist.ALL)
    return rows


def kernel_table(rows: Sequence[Row]) -> Table:
    """One row per policy and kind of step."""
    table = Table(box=None, pad_edge=False, header_style=FAINT, padding=(0, 1, 0, 0))
    for head in ("policy", "step"):
        table.add_column(head, overflow="fold")
    for head in ("Triton", "libraries", "attention", "copies", "moved", "least"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        counts = map(str, (row.triton, row.library, row.attention, row.copies))
        table.add_row(Text(row.policy), row.step, *counts, size_text(row.bytes), size_text(row.least))
    return table
