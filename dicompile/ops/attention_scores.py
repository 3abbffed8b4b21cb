"""What attention tells of its tokens beside its output, as operators: no map of attention ever lies in memory.

``dicompile::attention_received`` and ``dicompile::attention_entropy`` go through the weights of attention by blocks of
queries and heads. This is the form for every device; where Triton is at hand, ``dicompile.runtime.kernels`` has the
same for CUDA under names of its own, which `operator_for` finds. A graph has one node either way.

Products are exact and sums are taken in float32, as tensor cores do it, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

BLOCK = 1 << 20
"""Most weights that are in memory at once, where one query of every sample has not more."""
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

    Returns:
        float32, [b, m].
    """
    batch, heads, _, _ = query.shape
    received = query.new_zeros((batch, 1, key.shape[2]), dtype=torch.float32)
    for rows, of_heads in _blocks(query, key, mask, scale, is_causal, lse):
        ones = received.new_ones(()).expand(batch, 1, rows.stop - rows.start)
        for weights in of_heads:
            received.baddbmm_(ones, weights)
    return received[:, 0] / heads


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
    batch, heads, queries, _ = query.shape
    entropy = query.new_empty((batch, queries), dtype=torch.float32)
    for rows, of_heads in _blocks(query, key, mask, scale, is_causal, lse):
        mean = query.new_zeros((batch, rows.stop - rows.start, key.shape[2]), dtype=torch.float32)
        for weights in of_heads:
            mean.add_(weights, alpha=(0.5 if shared else 1.0) / heads)
        entropy[:, rows] = -(mean * (mean + EPSILON).log()).sum(-1)
    return entropy


def _blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool, lse: Tensor | None
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Weights of attention: for every block of queries, where it is, and head by head [b, rows, m] in float32.

    Those of one head lie in memory until the next one's are asked for.
    """
    batch, heads, queries, width = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    query, key = query.float(), key.float()
    given = None if mask is None else mask.expand(batch, heads, queries, keys)
    factor = width**-0.5 if scale is None else scale
    size = max(1, BLOCK // max(1, batch * keys))

    def fill(logits: Tensor, weights: Tensor, head: int, rows: slice) -> Tensor:
        logits.baddbmm_(query[:, head, rows], key[:, head // group].transpose(1, 2), beta=0, alpha=factor)
        if is_causal:
            place = torch.arange(rows.start, rows.stop, device=logits.device)
            logits.masked_fill_(place[:, None] < torch.arange(keys, device=logits.device), float("-inf"))
        if given is not None:
            part = given[:, head, rows]
            logits = logits.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else logits.add_(part)
        if lse is not None:
            return torch.sub(logits, lse[:, head, rows, None], out=weights).exp_()
        return torch.softmax(logits, -1, out=weights) if given is None else aten._safe_softmax.default(logits, -1)

    for first in range(0, queries, size):
        rows = slice(first, min(first + size, queries))
        logits, weights = (query.new_empty((batch, rows.stop - first, keys)) for _ in range(2))
        yield rows, (fill(logits, weights, head, rows) for head in range(heads))


@attention_received.register_fake
def _(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@attention_entropy.register_fake
def _(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
    del key
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


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


def is_attention_score(node: fx.Node) -> bool:
    """True for a call of one of these operators."""
    return isinstance(node.target, OpOverload) and node.target.name().startswith("dicompile::attention_")


def count_operations(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    """Operations of the logits, two per multiplication, as everywhere; exponentials are not counted."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * width


register_flop_formula([torch.ops.dicompile.attention_received, torch.ops.dicompile.attention_entropy])(count_operations)
