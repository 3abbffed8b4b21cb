"""FlashAttention of the flash-attn package, as one operator that also returns the logsumexp.

Among its own kernels torch chooses by itself; this one it does not have. The package is optional: it is imported when
the operator runs.

Reference:
    Dao, FlashAttention-2, arXiv 2307.08691; Shah et al., FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dicompile.errors import InvalidSetting
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import has_dropout, is_causal, mask_of
from dicompile.ops.attention_kernels import AttentionKernel

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
WIDEST, EVERY = 256, 8
"""The widest head that its kernels take, and what its width has to be a multiple of."""


@torch.library.custom_op(
    "dicompile::flash_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float? scale, bool is_causal) -> (Tensor, Tensor)",
)
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention without a mask; heads of keys and values may be fewer.

    Args:
        query: [b, h, n, d], float16 or bfloat16.
        key: [b, k, m, d].
        value: [b, k, m, d].
        scale: factor of the logits; None means 1 / sqrt(d).
        is_causal: every token sees those before it alone.

    Returns:
        Output, [b, h, n, d], with heads after tokens in memory; and the logsumexp of the logits, float32, [b, h, n].

    Raises:
        InvalidSetting: flash-attn is not installed.
    """
    output, lse, *_ = _kernel()(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)), softmax_scale=scale, causal=is_causal
    )
    return output.transpose(1, 2), lse


@flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    samples, heads, tokens, _ = query.shape
    output = query.new_empty(samples, tokens, heads, value.shape[-1])
    return output.transpose(1, 2), query.new_empty(samples, heads, tokens, dtype=torch.float32)


def check_installed() -> None:
    """Raise if flash-attn is not installed.

    Raises:
        InvalidSetting: it is not.
    """
    _kernel()


@functools.cache
def _kernel() -> Callable[..., Any]:
    """FlashAttention-3 where it is installed, on a GPU that runs it, else FlashAttention-2; with the logsumexp."""
    runs_3 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    names = (["flash_attn_interface"] if runs_3 else []) + ["flash_attn"]
    name = next((name for name in names if _is_installed(name)), None)
    if name is None:
        raise InvalidSetting(
            "attention 'flash-attn' needs the package flash-attn",
            where="attention",
            why="it is not installed",
            fix="pip install flash-attn, or leave attention out: torch has FlashAttention of its own",
        )
    attend: Callable[..., Any] = importlib.import_module(name).flash_attn_func
    if "return_attn_probs" not in inspect.signature(attend).parameters:
        return attend
    return functools.partial(attend, return_attn_probs=True)  # probabilities themselves come with dropout only


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _arguments(node: fx.Node, has_lse: bool) -> tuple[Any, ...]:
    del has_lse  # its kernels always make the logsumexp
    return *(node_argument(node, i) for i in range(3)), node.kwargs.get("scale"), is_causal(node)


def _why_not(node: fx.Node) -> str | None:
    query, key, value = (tensor_of(node_argument(node, i)) for i in range(3))
    dtype, width = str(query.dtype).removeprefix("torch."), query.shape[-1]
    alike = query.ndim == 4 and width == key.shape[-1] == value.shape[-1]
    reasons = (
        (mask_of(node) is not None, "it has a mask"),
        (has_dropout(node), "it has dropout"),
        (not alike, "queries, keys and values are not [b, h, n, d] of one width"),
        (query.device.type != DEVICE, f"it is on {query.device.type}, not on {DEVICE}"),
        (query.dtype not in DTYPES, f"it is in {dtype}, not in float16 or bfloat16"),
        (width > WIDEST or width % EVERY != 0, f"its heads are {width} wide, not a multiple of {EVERY} up to {WIDEST}"),
    )
    return next((why for is_so, why in reasons if is_so), None)


FLASH = AttentionKernel("flash-attn", torch.ops.dicompile.flash_attention.default, _arguments, _why_not)
"""FlashAttention of the package flash-attn."""
