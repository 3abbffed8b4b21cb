"""What attention tells of its tokens beside its output, as operators: no map of attention ever lies in memory.

``dicompile::attention_received`` and ``dicompile::attention_entropy`` go through the weights of attention by blocks of
queries and heads. This is the form for every device; where Triton is at hand, ``dicompile.runtime.kernels`` has the
same for CUDA under names of its own, which `operator_for` finds. A graph has one node either way.

``dicompile::attention_and_received`` and ``dicompile::attention_and_entropy`` make the output of attention of the same
weights, so that they are made once: what pays where attention is no kernel of its own to speak of, on a CPU.

Products are exact and sums are taken in float32, as tensor cores do it, whatever the model computes in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

BLOCK = 1 << 19
"""Most weights that are in memory at once, where one query of a head has not more."""
EPSILON = 1e-7
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("dicompile::attention_received", mutates_args=())
def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention that every key receives: mean over heads, sum over queries.

    A query that sees no key gives nothing.

    Args:
        query: [b, h, n, d].
        key: [b, h, m, d], or with fewer heads, each for as many of the query's that follow each other.
        mask: additive or boolean, broadcastable to [b, h, n, m], or None.
        scale: factor of the logits; None means 1 / sqrt(d).
        is_causal: whether queries see no key after their own place.
        lse: logarithm of the sum of exponentials of each query's logits, where it is known; float32, [b, h, >= n].
            Kernels read it; here it would save nothing.

    Returns:
        float32, [b, m].
    """
    del lse
    return _received(query, key, _weights(query, key, mask, scale, is_causal))


@torch.library.custom_op("dicompile::attention_entropy", mutates_args=())
def attention_entropy(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    lse: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """Entropy of every query's row of the attention map, which is the mean over heads; 0 if it sees no key.

    With `shared`, rows are weighted by one half, so that the two guidance halves of a picture add up to the entropy of
    their mixture over disjoint captions, without its constant.

    Args:
        query: see `attention_received`.
        key: see there, as for the others.
        mask: see there.
        scale: see there.
        is_causal: see there.
        lse: see there.
        shared: see above.

    Returns:
        float32, [b, n].
    """
    del lse
    return _entropy(query, key, _weights(query, key, mask, scale, is_causal), shared)


@torch.library.custom_op("dicompile::attention_and_received", mutates_args=())
def attention_and_received(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention, and what every key receives of it.

    Args:
        query: see `attention_received`, as for the others.
        key: see there.
        value: [b, h, m, e], or with as many heads as `key`.
        mask: see there.
        scale: see there.
        is_causal: see there.

    Returns:
        The output, [b, h, n, e], the heads of a query side by side in memory, and what `attention_received` returns.
    """
    output = _output_of(query, value)
    return output, _received(query, key, _attending(_weights(query, key, mask, scale, is_causal), value, output))


@torch.library.custom_op("dicompile::attention_and_entropy", mutates_args=())
def attention_and_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention, and the entropy of every query's row; see `attention_and_received` and `attention_entropy`."""
    output = _output_of(query, value)
    weights = _attending(_weights(query, key, mask, scale, is_causal), value, output)
    return output, _entropy(query, key, weights, shared)


class _Weights(NamedTuple):
    """A block of the weights of attention: float32, [heads, rows, m], in memory until the next one is asked for."""

    sample: int
    rows: slice
    heads: slice
    weights: Tensor


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> Iterator[_Weights]:
    """All weights of attention: sample by sample, rows by rows, and of these all heads before the next ones."""
    batch, heads, queries, width = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    query, key = query.float(), key.float().repeat_interleave(group, 1) if group > 1 else key.float()
    given = None if mask is None else mask.expand(batch, heads, queries, keys)
    factor = width**-0.5 if scale is None else scale
    rows_at_once = max(1, min(queries, BLOCK // max(1, keys)))
    heads_at_once = max(1, min(heads, BLOCK // max(1, rows_at_once * keys)))
    room = query.new_empty((heads_at_once, rows_at_once, keys))
    of_rows = [slice(i, min(i + rows_at_once, queries)) for i in range(0, queries, rows_at_once)]
    of_heads = [slice(i, min(i + heads_at_once, heads)) for i in range(0, heads, heads_at_once)]
    for sample, rows, some in itertools.product(range(batch), of_rows, of_heads):
        logits = room[: some.stop - some.start, : rows.stop - rows.start]
        ours, theirs = query[sample, some, rows], key[sample, some].transpose(1, 2)
        torch.baddbmm(logits, ours, theirs, beta=0, alpha=factor, out=logits)
        if is_causal:
            place = torch.arange(rows.start, rows.stop, device=logits.device)
            logits.masked_fill_(place[:, None] < torch.arange(keys, device=logits.device), float("-inf"))
        if given is None:
            weights = torch.softmax(logits, -1, out=logits)
        else:
            part = given[sample, some, rows]
            logits = logits.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else logits.add_(part)
            weights = aten._safe_softmax.default(logits, -1)
        yield _Weights(sample, rows, some, weights)


def _attending(blocks: Iterator[_Weights], value: Tensor, output: Tensor) -> Iterator[_Weights]:
    """The same weights; meanwhile the output of attention is written."""
    group = output.shape[1] // value.shape[1]
    value = value.float().repeat_interleave(group, 1) if group > 1 else value.float()
    for block in blocks:
        output[block.sample, block.heads, block.rows].copy_(torch.bmm(block.weights, value[block.sample, block.heads]))
        yield block


def _received(query: Tensor, key: Tensor, blocks: Iterator[_Weights]) -> Tensor:
    received = query.new_zeros((query.shape[0], key.shape[2]), dtype=torch.float32)
    for block in blocks:
        received[block.sample] += block.weights.sum((0, 1))
    return received / query.shape[1]


def _entropy(query: Tensor, key: Tensor, blocks: Iterator[_Weights], shared: bool) -> Tensor:
    batch, heads, queries, _ = query.shape
    entropy = query.new_empty((batch, queries), dtype=torch.float32)
    share = (0.5 if shared else 1.0) / heads
    mean = torch.empty(0)
    for block in blocks:
        total = block.weights.sum(0)
        mean = total if block.heads.start == 0 else mean.add_(total)
        if block.heads.stop == heads:
            mean *= share
            entropy[block.sample, block.rows] = -(mean * (mean + EPSILON).log()).sum(-1)
    return entropy


def _output_of(query: Tensor, value: Tensor) -> Tensor:
    """Room for the output of attention, as `torch.nn.functional.scaled_dot_product_attention` lays it out on a CPU."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


@attention_received.register_fake
def _(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@attention_entropy.register_fake
def _(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
    del key
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


@attention_and_received.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _output_of(query, value), query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@attention_and_entropy.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    del key
    return _output_of(query, value), query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


def operator_for(query: Tensor, name: str) -> OpOverload:
    """The operator of this name for such queries: by Triton, where that was registered, else by blocks.

    Args:
        query: of the attention.
        name: "attention_received" or "attention_entropy".
    """
    by_triton = f"{name}_{query.device.type}_triton"
    is_there = query.dtype in TRITON_DTYPES and hasattr(torch.ops.dicompile, by_triton)
    found: OpOverload = getattr(torch.ops.dicompile, by_triton if is_there else name).default
    return found


WITH_OUTPUT: Mapping[object, OpOverload] = {
    torch.ops.dicompile.attention_received.default: torch.ops.dicompile.attention_and_received.default,
    torch.ops.dicompile.attention_entropy.default: torch.ops.dicompile.attention_and_entropy.default,
}
"""Operators that make the output of attention, too, by those that do not."""


def is_attention_score(node: fx.Node) -> bool:
    """True for a call of an operator that makes a score, and nothing else."""
    name = node.target.name() if isinstance(node.target, OpOverload) else ""
    return name.startswith(("dicompile::attention_received", "dicompile::attention_entropy"))


def count_operations(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    """Operations of the logits, two per multiplication, as everywhere; exponentials are not counted."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * width


def count_with_output(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    """Operations of logits and output."""
    batch, heads, queries, _width = query
    return count_operations(query, key) + 2 * batch * heads * queries * key[2] * value[3]


register_flop_formula([torch.ops.dicompile.attention_received, torch.ops.dicompile.attention_entropy])(count_operations)
register_flop_formula([torch.ops.dicompile.attention_and_received, torch.ops.dicompile.attention_and_entropy])(
    count_with_output
)
