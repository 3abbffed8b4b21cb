"""Which tokens are computed anew: age, bonus of the best of a cell, places by score, and new stamps, in one kernel.

A program keeps a tile of tokens and lets all tokens of the sample pass by; it counts those that come first. That is n^2
comparisons and no sort: up to some thousand tokens a few microseconds, and no program waits for another one. A
token's place is its own, so each program writes where no other one does.

Roofline, of b samples of n tokens: b n^2 comparisons; read are 8 n bytes a sample for every tile (from L2 but for the
first), written 12 n and 8 k.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 64
"""Tokens of a program, and tokens that pass by at once."""


@triton.jit
def _comparable(score):
    """The score; infinite where it is no number."""
    return tl.where(score <= float("inf"), score, float("inf"))


@triton.jit
def _aged(score, stamp, clock, AGE: tl.constexpr):
    """The score with what the token has gained by age."""
    return _comparable(score + AGE * (clock - stamp).to(tl.float32) if AGE != 0 else score)


@triton.jit
def selection(
    score, stamp, chosen, places, stamped, tokens, count, clock, frames, rows, columns,
    AGE: tl.constexpr, BONUS: tl.constexpr, CELL: tl.constexpr, DEPTH: tl.constexpr, STAMPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Places of the `TILE` tokens of a program; the grid is (tiles, b).

    All loads are in this function: torch follows what a store's address is made of up to them, but not into another
    function, whose pointers it would take for written.
    """
    sample = tl.program_id(1).to(tl.int64)
    score += sample * tokens
    stamp += sample * tokens
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = own < tokens
    ours = tl.zeros([TILE], tl.float32)
    before = tl.zeros([TILE], tl.int32)
    for step in range(-1, tl.cdiv(tokens, TILE)):  # first its own tile, then all of them
        token = tl.where(step < 0, tl.program_id(0), step) * TILE + tl.arange(0, TILE)
        there = token < tokens
        since = tl.load(stamp + token, mask=there & (AGE != 0), other=0)
        theirs = _aged(tl.load(score + token, mask=there, other=float("-inf")), since, clock, AGE)
        if BONUS != 0:
            column, row, frame = token % columns, token // columns % rows, token // (columns * rows)
            better = tl.zeros([TILE], tl.int32)
            for member in range(DEPTH * CELL * CELL):
                of_column = column // CELL * CELL + member % CELL
                of_row = row // CELL * CELL + member // CELL % CELL
                of_frame = frame // DEPTH * DEPTH + member // (CELL * CELL)
                other = (of_frame * rows + of_row) * columns + of_column
                exists = there & (of_column < columns) & (of_row < rows) & (of_frame < frames)
                since = tl.load(stamp + other, mask=exists & (AGE != 0), other=0)
                rival = _aged(tl.load(score + other, mask=exists, other=float("-inf")), since, clock, AGE)
                is_better = (rival > theirs) | ((rival == theirs) & (other < token))
                better += (exists & is_better).to(tl.int32)
            theirs = tl.where(better == 0, _comparable(theirs + BONUS * theirs), theirs)
        ours = tl.where(step < 0, theirs, ours)
        is_first = (theirs[None, :] > ours[:, None]) | (
            (theirs[None, :] == ours[:, None]) & (token[None, :] < own[:, None])
        )
        before += tl.sum((is_first & there[None, :] & (step >= 0)).to(tl.int32), 1)
    tl.store(places + sample * tokens + own, before.to(tl.int64), mask=inside)
    is_chosen = inside & (before < count)
    tl.store(chosen + sample * count + before, own.to(tl.int64), mask=is_chosen)
    if STAMPS:
        old = tl.load(stamp + own, mask=inside, other=0)
        tl.store(stamped + sample * tokens + own, tl.where(is_chosen, clock + 1, old).to(tl.int32), mask=inside)


def launch_arguments(
    score: Tensor,
    stamp: Tensor | None,
    count: int,
    clock: int,
    age_weight: float,
    grid: list[int],
    cell: int,
    bonus: float,
) -> dict[str, Any]:
    """What the kernel is called with but for its results; see `select_tokens`."""
    has_bonus = bool(cell and bonus)
    frames, rows, columns = ([1, 1, 1, *grid][-3:]) if has_bonus else (1, 1, 1)
    return {
        "score": score.contiguous(),
        "stamp": score if stamp is None else stamp.contiguous(),  # one that is not there is not read
        "tokens": score.shape[1], "count": count, "clock": clock,
        "frames": frames, "rows": rows, "columns": columns,
        "AGE": 0.0 if stamp is None else float(age_weight), "BONUS": float(bonus) if has_bonus else 0.0,
        "CELL": cell if has_bonus else 1, "DEPTH": cell if has_bonus and len(grid) == 3 else 1,
        "STAMPS": stamp is not None, "TILE": TILE,
    }  # fmt: skip


@triton_op("dicompile::select_tokens_cuda_triton", mutates_args=())
def select_tokens(
    score: Tensor,
    stamp: Tensor | None,
    count: int,
    clock: int,
    age_weight: float,
    grid: list[int],
    cell: int,
    bonus: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dicompile.ops.select_tokens.operator_for`; the stamps are empty where none are given."""
    batch, tokens = score.shape
    chosen = score.new_empty((batch, count), dtype=torch.int64)
    places = score.new_empty((batch, tokens), dtype=torch.int64)
    stamped = score.new_empty((batch, tokens) if stamp is not None else (0,), dtype=torch.int32)
    arguments = launch_arguments(score, stamp, count, clock, age_weight, grid, cell, bonus)
    wrap_triton(selection)[(triton.cdiv(tokens, TILE), batch)](
        **arguments, chosen=chosen, places=places, stamped=stamped
    )
    return chosen, places, stamped
