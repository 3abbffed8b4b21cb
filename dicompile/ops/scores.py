"""What makes a token worth refreshing, as plain tensor functions; what attention gives, see `attention_scores`.

Reference:
    Zou et al., ToCa, arXiv 2410.05317, section 3 (s1 attention, s2 entropy, s4 grid bonus);
    Zou et al., DuCa, arXiv 2412.18911 (value norm).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-12


def value_norm(value: Tensor) -> Tensor:
    """Sum over heads of one minus the norm of each token's value ([b, h, n, d]); float32, [b, n]."""
    norm: Tensor = value.float().norm(dim=-1)
    return (1 - norm).sum(1)


def mean_norm(vectors: Tensor) -> Tensor:
    """Mean over heads of the norm of each token's vector ([b, h, n, d]); float32, [b, n]."""
    norm: Tensor = vectors.float().norm(dim=-1)
    return norm.mean(1)


def stream_norm(stream: Tensor) -> Tensor:
    """Norm of each token of the stream ([b, n, d]), of unit length over the tokens; float32, [b, n]."""
    return unit_length(stream.float().norm(dim=-1))


def dissimilarity(stream: Tensor, stored: Tensor) -> Tensor:
    """One minus the cosine of stream and stored value ([b, n, d]), of unit length over the tokens; float32, [b, n]."""
    return unit_length(1 - torch.nn.functional.cosine_similarity(stream.float(), stored.float(), dim=-1))


def unit_length(score: Tensor) -> Tensor:
    """Divide by the Euclidean length over the tokens; [b, n]."""
    length: Tensor = score.norm(dim=-1, keepdim=True)
    return score / length.clamp_min(TINY)


def over_guidance_halves(score: Tensor, *, average: bool = True) -> Tensor:
    """Sum or mean of the two halves of the batch, given to both; [b, n]."""
    first, second = score.chunk(2)
    both = (first + second) * (0.5 if average else 1.0)
    return torch.cat([both, both])


def base_from_attention(raw: Tensor, *, shared: bool) -> Tensor:
    """Score base s1 (or value norm) from what the attention stored; [b, n]."""
    return unit_length(over_guidance_halves(raw, average=True) if shared else raw)


def base_from_entropy(raw: Tensor, *, shared: bool) -> Tensor:
    """Score base s2 from the stored entropies; [b, n]."""
    return unit_length(1 + (over_guidance_halves(raw, average=False) if shared else raw))


def places(score: Tensor) -> Tensor:
    """Place of every token by falling score, from 0 on; ties go to the earlier token; int64, [..., n].

    Tokens are counted that come first, so that it is one reduction: sorting is several kernels, or a copy of its own.
    Every place is taken once, whatever the scores: one that is no number counts as infinite.
    """
    score = score.masked_fill(score.isnan(), math.inf)
    other, own = score.unsqueeze(-2), score.unsqueeze(-1)
    number = torch.arange(score.shape[-1], device=score.device)
    is_first = (other > own) | ((other == own) & (number < number.unsqueeze(-1)))
    return is_first.sum(-1)


def places_of(order: Tensor) -> Tensor:
    """Place of every token, where tokens by their places are known; int64, [b, n]."""
    return order.scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def with_grid_bonus(score: Tensor, grid: tuple[int, ...], cell: int, bonus: float) -> Tensor:
    """Give the best token of every cell of the grid `bonus` times its score on top (s4).

    Args:
        score: [b, n], tokens in row-major order of the grid.
        grid: tokens along every axis, (rows, columns) or (frames, rows, columns).
        cell: edge of the square or cubic cells, in tokens; cells at the far edges may be cut off.
        bonus: unitless.
    """
    axes = range(len(grid))
    padded = [-(-edge // cell) * cell for edge in grid]
    whole = padded == list(grid)
    if not whole:
        margins = [margin for edge, full in zip(grid[::-1], padded[::-1], strict=True) for margin in (0, full - edge)]
        score = torch.nn.functional.pad(score.reshape(-1, *grid), margins, value=float("-inf"))
    split = [size for full in padded for size in (full // cell, cell)]
    order = [0, *[1 + 2 * axis for axis in axes], *[2 + 2 * axis for axis in axes]]
    cells = score.reshape(score.shape[0], *split).permute(order)
    flat = cells.reshape(*cells.shape[: len(grid) + 1], cell ** len(grid))
    flat = torch.where(places(flat) == 0, flat + bonus * flat, flat)
    cells = flat.reshape(cells.shape).permute([order.index(axis) for axis in range(len(order))])
    if whole:
        return cells.reshape(score.shape)
    field = cells.reshape(-1, *padded)
    for axis, edge in enumerate(grid, start=1):
        field = field.narrow(axis, 0, edge)
    return field.reshape(field.shape[0], math.prod(grid))
