"""flex_attention while a model is run to capture it: attention with a mask that is written out.

The operator takes functions, which a functional graph cannot hold. Evaluated on all positions at once, they become
ordinary operators; what is lost is that blocks of the mask are skipped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

Modify = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """While open, whoever imported ``flex_attention`` calls `attend`."""
    original = flex.flex_attention
    with contextlib.ExitStack() as stack:
        # Masks made meanwhile list their blocks by key, too, which only gradients need and which has to be traced else.
        stack.enter_context(mock.patch.object(flex, "_transpose_ordered", lambda counts, indices: (counts, indices)))
        for module in list(sys.modules.values()):
            if vars(module).get("flex_attention") is original:
                stack.enter_context(mock.patch.object(module, "flex_attention", attend))
        yield


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Modify | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> Tensor:
    """Attention with the signature of ``torch.nn.attention.flex_attention.flex_attention``; [b, h, n, d].

    Raises:
        NotImplementedError: the sums of the softmax are asked for too.
    """
    if return_lse:
        raise NotImplementedError("flex_attention with return_lse")
    grid = _grid(query, key)
    mask = None if block_mask is None else _mask(block_mask, grid)
    if score_mod is None:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = score_mod(scores, *grid)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def _grid(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Sample, head, query and key of every score, each along its own axis."""
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return tuple(
        torch.arange(size, device=query.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, size in enumerate(sizes)
    )


def _mask(block_mask: Any, grid: tuple[Tensor, ...]) -> Tensor:
    """True where a query sees a key: in a block that is not skipped, and by the function of the mask."""
    rows, columns = grid[2].numel(), grid[3].numel()
    blocks = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is not None:
        blocks = blocks | _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    height, width = block_mask.BLOCK_SIZE
    spread = blocks.repeat_interleave(height, -2)[..., :rows, :].repeat_interleave(width, -1)[..., :columns]
    seen: Tensor = spread & block_mask.mask_mod(*grid)
    return seen


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Blocks of keys that are listed for each block of queries: the first of the indices count."""
    size = indices.shape[-1]
    place = torch.arange(size, device=indices.device)
    listed = torch.where(place < counts.unsqueeze(-1), indices, size).long()
    marks = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter(-1, listed, torch.ones_like(listed, dtype=torch.bool))[..., :size]
