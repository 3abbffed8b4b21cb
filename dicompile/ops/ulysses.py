"""Attention among the tokens of several ranks: they exchange tokens for heads, attend, and change back (Ulysses).

A rank has all heads of its own tokens; attention needs some heads of all tokens. As one operator it is attention like
any other, from a rank's queries, keys and values to its output; `dicompile.passes.ExchangeHeads` writes it out.

Reference:
    Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from dicompile.ops.attention_scores import attention_received, count_operations


@torch.library.custom_op("dicompile::ulysses_attention", mutates_args=())
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    ranks: int,
    group: str,
    scale: float | None = None,
) -> Tensor:
    """Attention of a rank's queries to the keys of all ranks.

    Args:
        query: of its own tokens, [b, h, n, d]; every rank has as many.
        key: likewise, [b, h, m, d].
        value: likewise, [b, h, m, e].
        mask: of the keys of all ranks, additive or boolean, [b or 1, 1, 1, ranks * m]; None for none.
        ranks: how many there are, which divides h.
        group: name of their process group.
        scale: factor of the logits; None means 1 / sqrt(d).

    Returns:
        [b, h, n, e], the heads of a query side by side in memory.
    """
    queries, keys, values = (to_some_heads(each, ranks, group) for each in (query, key, value))
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return to_own_tokens(attended, ranks, group)


@torch.library.custom_op("dicompile::ulysses_received", mutates_args=())
def ulysses_received(
    query: Tensor, key: Tensor, mask: Tensor | None = None, *, ranks: int, group: str, scale: float | None = None
) -> Tensor:
    """Attention that the keys of a rank receive from the queries of all; see `attention_received`.

    Args:
        query: see `ulysses_attention`, as for the others.
        key: see there.
        mask: see there.
        ranks: see there.
        group: see there.
        scale: see there.

    Returns:
        float32, [b, m].
    """
    queries, keys = (to_some_heads(each, ranks, group) for each in (query, key))
    return mean_of_own_tokens(attention_received(queries, keys, mask, scale), ranks, group)


def to_some_heads(own: Tensor, ranks: int, group: str) -> Tensor:
    """Exchange all heads of a rank's tokens for some heads of all tokens.

    Args:
        own: [b, h, n, d].
        ranks: see `ulysses_attention`.
        group: see there.

    Returns:
        [b, h / ranks, ranks * n, d], the tokens in the order of ranks.
    """
    batch, heads, tokens, width = own.shape
    parts = own.reshape(batch, ranks, heads // ranks, tokens, width).permute(1, 3, 0, 2, 4)
    some = exchanged(parts, group).permute(2, 0, 1, 3, 4)
    return some.reshape(batch, ranks * tokens, heads // ranks, width).transpose(1, 2)


def to_own_tokens(some: Tensor, ranks: int, group: str) -> Tensor:
    """The reverse of `to_some_heads`; the heads of a token lie side by side in memory."""
    batch, heads, _, width = some.shape
    parts = some.reshape(batch, heads, ranks, -1, width).permute(2, 1, 0, 3, 4)
    own = exchanged(parts, group).permute(2, 3, 0, 1, 4)
    return own.reshape(batch, -1, ranks * heads, width).transpose(1, 2)


def mean_of_own_tokens(score: Tensor, ranks: int, group: str) -> Tensor:
    """A score of all tokens that every rank has for its heads, [b, ranks * n]: its mean for a rank's tokens, [b, n]."""
    return exchanged(score.view(score.shape[0], ranks, -1).transpose(0, 1), group).mean(0)


def exchanged(parts: Tensor, group: str) -> Tensor:
    """Give part i to rank i, and get one of every rank; [ranks, ...]."""
    sizes = [math.prod(parts.shape[1:])] * parts.shape[0]
    sent = torch.ops._c10d_functional.all_to_all_single(parts.contiguous().flatten(), sizes, sizes, group)
    received: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return received.view(parts.shape)


@ulysses_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    del key
    batch, heads, tokens, _width = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3])).transpose(1, 2)


@ulysses_received.register_fake
def _(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@register_flop_formula([torch.ops.dicompile.ulysses_received])
def _(query: tuple[int, ...], key: tuple[int, ...], *_: object, ranks: int, **__: object) -> int:
    return ranks * count_operations(query, key)


ULYSSES = torch.ops.dicompile.ulysses_attention.default
RECEIVED = torch.ops.dicompile.ulysses_received.default
