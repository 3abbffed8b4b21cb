"""Choosing tokens in one kernel, where there is one: ``dicompile.runtime.kernels`` has it for CUDA, by Triton."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

MOST = 8192
"""Tokens whose pairs are compared to rank them. Films have more; there the square of them costs more than a sort."""


def operator_for(device: torch.device, tokens: int) -> OpOverload | None:
    """The operator that ranks so many tokens on a device; None where sorting is left.

    It takes ``(score, stamp, count, clock, age_weight, grid, cell, bonus)``: scores (float32, [b, n]), the reuse step
    after which every token was last computed (int32, [b, n], or None), how many tokens are chosen, reuse steps since
    all were computed, what a step of age counts, and the grid, cell and bonus of `scores.with_grid_bonus` (a cell of 0
    for none). It returns the chosen tokens (int64, [b, k]), the place of every token (int64, [b, n]) and
    new stamps (int32, [b, n]).
    """
    name = f"select_tokens_{device.type}_triton"
    if tokens > MOST or not hasattr(torch.ops.dicompile, name):
        return None
    found: OpOverload = getattr(torch.ops.dicompile, name).default
    return found
