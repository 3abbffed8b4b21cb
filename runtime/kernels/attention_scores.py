"""Token scores from attention, tile by tile: weights are made from queries, keys and log-sum-exp, and summed at once.

Three kernels, of which each reads queries and keys of a head once for every tile of the other (from L2, mostly) and
writes one number per token. Products run in the model's dtype on tensor cores and are summed in float32, sums too::

    log_sum_exp   lse_i = log sum_j exp(q_i k_j)          only where attention has not left it behind
    received      sum_i exp(q_i k_j - lse_i)              one number per head and key; the mean over heads is torch's
    entropy       - sum_j p_ij log(p_ij + 1e-7)           p is the mean of exp(q_i k_j - lse_i) over heads

No program adds to what another one writes, so that two runs agree bit by bit.

Roofline, in operations and bytes of a head, d numbers of s bytes wide: a product is 2 n m d operations, log_sum_exp and
received take one each, entropy one; read are (n + m) d s bytes and 4 n of log-sum-exp, written 4 n or 4 m.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula

from dicompile.ops.attention_scores import EPSILON, count_operations

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
VECTOR = 8
"""Numbers of a row that are loaded at once, where every row begins at a multiple of as many."""


class Tiles(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        kept: rows that a program keeps: queries, or the keys that receive.
        passed: rows that pass by at once.
        padded: numbers per row, a power of two.
        warps: of a program.
        stages: tiles that are on their way.
    """

    kept: int
    passed: int
    padded: int
    warps: int
    stages: int


def tiles_for(width: int, dtype: torch.dtype) -> Tiles:
    """Tiles for rows of `width` numbers; `tests/runtime/test_kernels.py` says where registers spill."""
    padded = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32 or padded > 128:
        return Tiles(32, 32, padded, warps=4, stages=2)
    return Tiles(128, 64, padded, warps=8, stages=2)


@triton.jit
def _start(matrices, batch, head, batch_stride, head_stride, VECTOR: tl.constexpr):
    """Where the matrix of a head begins. Strides count `VECTOR` numbers, so that loads may be as wide as these."""
    return matrices + (batch * batch_stride + head * head_stride) * VECTOR


@triton.jit
def _tile(start, place, size, row_stride, VECTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix, [len(place), PADDED]; zeros beyond its edges."""
    column = tl.arange(0, PADDED)
    inside = (place[:, None] < size) & (column[None, :] < WIDTH)
    return tl.load(start + place[:, None] * row_stride * VECTOR + column[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    query, key, row, column, queries, keys, mask, mask_row, mask_column,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Logits of two tiles in units of log 2, [rows, columns]; -inf where nothing is seen."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * (SCALE * 1.4426950408889634)
    seen = (row[:, None] < queries) & (column[None, :] < keys)
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None])
    if MASK != 0:
        if PER_KEY:
            given = tl.load(mask + column * mask_column, mask=column < keys, other=0)[None, :]
        else:
            place = row[:, None].to(tl.int64) * mask_row + column[None, :] * mask_column
            given = tl.load(mask + place, mask=seen, other=0)
        if MASK == 1:
            seen = seen & (given != 0)
        else:
            logits += given.to(tl.float32) * 1.4426950408889634
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def log_sum_exp(
    query, key, mask, lse, heads, group, queries, keys,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    mask_batch, mask_head, mask_row, mask_column, lse_batch, lse_head, lse_row,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
    KEPT: tl.constexpr, PASSED: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the logits of `KEPT` queries of a head; the grid is (tiles of queries, b * h)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    key = _start(key, batch, head // group, key_batch, key_head, VECTOR)
    mask += batch * mask_batch + head * mask_head
    row = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    ours = _tile(
        _start(query, batch, head, query_batch, query_head, VECTOR), row, queries, query_row, VECTOR, WIDTH, PADDED
    )
    most = tl.full([KEPT], float("-inf"), tl.float32)
    total = tl.zeros([KEPT], tl.float32)
    for start in range(0, keys, PASSED):
        column = start + tl.arange(0, PASSED)
        theirs = _tile(key, column, keys, key_row, VECTOR, WIDTH, PADDED)
        logits = _logits(
            ours, theirs, row, column, queries, keys, mask, mask_row, mask_column, SCALE, CAUSAL, MASK, PER_KEY
        )
        now = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp2(most - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        most = now
    tl.store(
        lse + batch * lse_batch + head * lse_head + row * lse_row,
        (most + tl.log2(total)) * 0.6931471805599453, mask=row < queries,
    )  # fmt: skip


@triton.jit
def _shift(lse, row, queries, lse_row):
    """What weights are told by, in units of log 2; a query that sees nothing has none, and its logits are all -inf."""
    known = tl.load(lse + row * lse_row, mask=row < queries, other=0.0)
    return tl.where(known == float("-inf"), 0.0, known * 1.4426950408889634)


@triton.jit
def received(
    query, key, mask, lse, result, heads, group, queries, keys,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    mask_batch, mask_head, mask_row, mask_column, lse_batch, lse_head, lse_row,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
    KEPT: tl.constexpr, PASSED: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What `KEPT` keys receive from the queries of a head; the grid is (tiles of keys, b * h), the result [b, h, m]."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query = _start(query, batch, head, query_batch, query_head, VECTOR)
    mask += batch * mask_batch + head * mask_head
    lse += batch * lse_batch + head * lse_head
    column = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    theirs = _tile(
        _start(key, batch, head // group, key_batch, key_head, VECTOR), column, keys, key_row, VECTOR, WIDTH, PADDED
    )
    total = tl.zeros([KEPT], tl.float32)
    for start in range(0, queries, PASSED):
        row = start + tl.arange(0, PASSED)
        ours = _tile(query, row, queries, query_row, VECTOR, WIDTH, PADDED)
        logits = _logits(
            ours, theirs, row, column, queries, keys, mask, mask_row, mask_column, SCALE, CAUSAL, MASK, PER_KEY
        )
        total += tl.sum(tl.exp2(logits - _shift(lse, row, queries, lse_row)[:, None]), 0)
    tl.store(result + tl.program_id(1).to(tl.int64) * keys + column, total, mask=column < keys)


@triton.jit
def entropy(
    query, key, mask, lse, result, heads, group, queries, keys,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    mask_batch, mask_head, mask_row, mask_column, lse_batch, lse_head, lse_row,
    SHARE: tl.constexpr, EPSILON: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
    KEPT: tl.constexpr, PASSED: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Entropy of the rows of `KEPT` queries; the grid is (tiles of queries, b), the result [b, n].

    `SHARE` is what a head's weights count, `EPSILON` is added under the logarithm.
    """
    batch = tl.program_id(1).to(tl.int64)
    mask += batch * mask_batch
    lse += batch * lse_batch
    row = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    total = tl.zeros([KEPT], tl.float32)
    for start in range(0, keys, PASSED):
        column = start + tl.arange(0, PASSED)
        weights = tl.zeros([KEPT, PASSED], tl.float32)
        of_mask, of_lse = mask, lse
        for head in range(heads):
            of_query = _start(query, batch, head, query_batch, query_head, VECTOR)
            of_key = _start(key, batch, head // group, key_batch, key_head, VECTOR)
            ours = _tile(of_query, row, queries, query_row, VECTOR, WIDTH, PADDED)
            theirs = _tile(of_key, column, keys, key_row, VECTOR, WIDTH, PADDED)
            logits = _logits(
                ours, theirs, row, column, queries, keys, of_mask, mask_row, mask_column, SCALE, CAUSAL, MASK, PER_KEY
            )
            weights += tl.exp2(logits - _shift(of_lse, row, queries, lse_row)[:, None])
            of_mask, of_lse = of_mask + mask_head, of_lse + lse_head
        weights *= SHARE
        total -= tl.sum(weights * tl.log(weights + EPSILON), 1)
    tl.store(result + batch * queries + row, total, mask=row < queries)


def launch_arguments(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool, lse: Tensor, tiles: Tiles
) -> dict[str, Any]:
    """What all three kernels are called with; see `dicompile.ops.attention_scores.attention_received`."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    query, key = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key))
    vector = VECTOR if all(step % VECTOR == 0 for rows in (query, key) for step in rows.stride()[:3]) else 1
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
    strides = {
        "query": [step // vector for step in query.stride()[:3]],
        "key": [step // vector for step in key.stride()[:3]],
        "mask": mask_strides,
        "lse": lse.stride(),
    }
    places = ("batch", "head", "row", "column")
    named = {f"{name}_{place}": n for name, steps in strides.items() for place, n in zip(places, steps, strict=False)}
    return {
        "query": query, "key": key, "lse": lse,
        "mask": query if mask is None else mask,  # one that is not there is not read
        "heads": heads, "group": heads // key.shape[1], "queries": queries, "keys": keys,
        **named,
        "SCALE": float(width**-0.5 if scale is None else scale), "CAUSAL": is_causal, "PER_KEY": mask_strides[2] == 0,
        "MASK": NO_MASK if mask is None else BOOLEAN if mask.dtype == torch.bool else ADDITIVE,
        "KEPT": tiles.kept, "PASSED": tiles.passed, "VECTOR": vector, "WIDTH": int(width), "PADDED": tiles.padded,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _with_log_sum_exp(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool, lse: Tensor | None
) -> dict[str, Any]:
    """Arguments of the kernels, with the log-sum-exp made where it is not given."""
    tiles = tiles_for(query.shape[-1], query.dtype)
    known = query.new_empty(query.shape[:3], dtype=torch.float32) if lse is None else lse
    arguments = launch_arguments(query, key, mask, scale, is_causal, known, tiles)
    if lse is None:
        batch, heads, queries, _ = query.shape
        wrap_triton(log_sum_exp)[(triton.cdiv(queries, tiles.kept), batch * heads)](**arguments)
    return arguments


@triton_op("dicompile::attention_received_cuda_triton", mutates_args=())
def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """See `dicompile.ops.attention_scores.attention_received`."""
    arguments = _with_log_sum_exp(query, key, mask, scale, is_causal, lse)
    batch, heads, _, _ = query.shape
    result = query.new_empty((batch, heads, key.shape[2]), dtype=torch.float32)
    wrap_triton(received)[(triton.cdiv(key.shape[2], arguments["KEPT"]), batch * heads)](**arguments, result=result)
    return result.mean(1)


@triton_op("dicompile::attention_entropy_cuda_triton", mutates_args=())
def attention_entropy(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    lse: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """See `dicompile.ops.attention_scores.attention_entropy`."""
    arguments = _with_log_sum_exp(query, key, mask, scale, is_causal, lse)
    batch, heads, queries, _ = query.shape
    result = query.new_empty((batch, queries), dtype=torch.float32)
    wrap_triton(entropy)[(triton.cdiv(queries, arguments["KEPT"]), batch)](
        **arguments, result=result, SHARE=(0.5 if shared else 1.0) / heads, EPSILON=EPSILON
    )
    return result


register_flop_formula([
    torch.ops.dicompile.attention_received_cuda_triton, torch.ops.dicompile.attention_entropy_cuda_triton,
])(count_operations)  # fmt: skip
