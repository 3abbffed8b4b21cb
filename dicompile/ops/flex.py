"""Attention with a mask by torch's ``flex_attention``, as one operator that also returns the logsumexp.

Inductor makes a kernel of it that reads the mask as it is, [b, 1, 1, m] for instance, while it goes through the keys:
in Triton on a GPU, in C++ on a CPU. So no mask is ever written out for all queries and heads, nor cast, and attention
with a mask is tiled like that without. Where nothing is compiled, the operator is torch's attention.

Reference:
    Dong et al., Flex Attention, arXiv 2412.05496.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dicompile.compat import fused_attention, has_kernel_for_cpu, write_out
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import has_dropout, mask_of
from dicompile.ops.attention_kernels import AttentionKernel

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROWEST, WIDEST = 16, 256
"""Widths of heads that its kernel for a GPU takes."""


@torch.library.custom_op(
    "dicompile::flex_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale, bool has_lse) -> (Tensor, Tensor)",
)
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, has_lse: bool
) -> tuple[Tensor, Tensor]:
    """Attention with a mask; heads of keys and values may be fewer. A query that sees no key gets zeros.

    Args:
        query: [b, h, n, d].
        key: [b, k, m, d].
        value: [b, k, m, e].
        mask: additive or boolean, broadcastable to [b, h, n, m].
        scale: factor of the logits; None means 1 / sqrt(d).
        has_lse: whether the logsumexp is made; compiled for a CPU it cannot be.

    Returns:
        Output, [b, h, n, e], with heads after tokens in memory; and the logsumexp of the logits, float32, [b, h, n],
        or empty.
    """
    is_grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=is_grouped)
    lse = _log_sum_exp(query, key, mask, _factor(query, scale)) if has_lse else query.new_empty(0, dtype=torch.float32)
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse


def _log_sum_exp(query: Tensor, key: Tensor, mask: Tensor, factor: float) -> Tensor:
    """[b, h, n], sample by sample."""
    batch, heads, queries, _ = query.shape
    masks = mask.expand(batch, heads, queries, key.shape[2])
    made = []
    for ours, theirs, given in zip(query.float(), key.float(), masks, strict=True):
        logits = factor * ours @ theirs.repeat_interleave(heads // len(theirs), 0).transpose(1, 2)
        seen = logits.masked_fill(~given, float("-inf")) if given.dtype == torch.bool else logits + given
        made.append(seen.logsumexp(-1))
    return torch.stack(made)


@flex_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, has_lse: bool
) -> tuple[Tensor, Tensor]:
    del key, mask, scale
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty((batch, heads, queries) if has_lse else 0, dtype=torch.float32)


def fused_form(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, has_lse: bool
) -> tuple[Tensor, Tensor]:
    """The same by ``flex_attention``, of which Inductor makes a kernel; see `flex_attention` of this module."""
    own = [axis for axis in range(mask.ndim) if mask.shape[axis] != 1 and mask.stride(axis) != 0]
    read = mask
    for axis in reversed(range(mask.ndim)):
        read = read if axis in own else read.select(axis, 0)

    def logit(logit, sample, head, query, key, read, *_):  # type: ignore[no-untyped-def]
        place = sample, head, query, key
        given = read[tuple(place[axis - mask.ndim] for axis in own)] if own else read
        return torch.where(given, logit, float("-inf")) if given.dtype == torch.bool else logit + given

    by_token = query.transpose(1, 2).contiguous()
    if query.device.type == "cpu":
        by_token, key, read = map(copied, (by_token, key, read))
    sizes: list[Any] = [size for size in read.shape if type(size) is not int]  # as the kernel for a CPU wants to know
    output, lse = fused_attention(
        by_token.transpose(1, 2), key, value, logit, (read, *sizes), _factor(query, scale), has_lse
    )
    return output, lse if has_lse else query.new_empty(0, dtype=torch.float32)


write_out(flex_attention, fused_form)


@torch.library.custom_op("dicompile::copied", mutates_args=())
def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor, as a buffer of its own whatever Inductor fuses.

    The kernel for a CPU takes no others: a query or key that is a view of a matrix fails for its shape, and what it
    reads besides is not found unless it lies in memory (torch 2.13).
    """
    return tensor.clone(memory_format=torch.contiguous_format)


@copied.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _factor(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _arguments(node: fx.Node, has_lse: bool) -> tuple[Any, ...]:
    return *(node_argument(node, i) for i in range(3)), mask_of(node), node.kwargs.get("scale"), has_lse


def _has_mask(node: fx.Node) -> bool:
    return mask_of(node) is not None


def _why_not(node: fx.Node) -> str | None:
    query, key, value = (tensor_of(node_argument(node, i)) for i in range(3))
    device, dtype = query.device.type, str(query.dtype).removeprefix("torch.")
    widths = query.shape[-1], value.shape[-1]
    reasons = (
        (not _has_mask(node), "it has no mask"),
        (has_dropout(node), "it has dropout"),
        (query.ndim != 4 or query.shape[-1] != key.shape[-1], "queries and keys are not [b, h, n, d] of one width"),
        (device not in DEVICES, f"it is on {device}, not on {' or '.join(DEVICES)}"),
        (query.dtype not in DTYPES, f"it is in {dtype}, not in float32, float16 or bfloat16"),
        (
            device == "cuda" and (min(widths) < NARROWEST or max(widths) > WIDEST),
            f"its heads are {' and '.join(map(str, dict.fromkeys(widths)))} wide, not {NARROWEST} to {WIDEST}",
        ),
        (device == "cpu" and not has_kernel_for_cpu(), "torch's kernel for a CPU needs AVX2"),
    )
    return next((why for is_so, why in reasons if is_so), None)


FLEX = AttentionKernel(
    "flex",
    torch.ops.dicompile.flex_attention.default,
    _arguments,
    _why_not,
    is_for=_has_mask,
    makes_lse=lambda node: tensor_of(node).device.type != "cpu",  # scores there would not read it
)
"""``flex_attention`` of torch, for attention with a mask."""
