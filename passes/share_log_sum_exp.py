"""Let a score read the log-sum-exp that fused attention has made, instead of making it once more.

Which kernel runs an attention, torch decides by its operands when it traces. So the attention is traced here, by
itself, on the values that it would be traced on later, and what comes out takes its place. Where that is a kernel that
makes the log-sum-exp of every query, the score gets it.

Before::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    %10: f32[2,64] = dicompile.attention_received.default(%6, %7, None, None, False)

After::

    %9: (...) = aten._scaled_dot_product_flash_attention.default(%6, %7, %8)
    %10: f32[2,4,64,8] = getitem(%9, 0)
    %11: f32[2,4,64] = getitem(%9, 1)
    %12: f32[2,64] = dicompile.attention_received_cuda_triton.default(%6, %7, None, None, False, lse=%11)

Left alone are attention with a mask, whose queries may see no key, and attention that torch writes out as products.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import find_attention, mask_of
from dicompile.ops.attention_scores import is_attention_score
from dicompile.ops.kinds import ATTENTION
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor

aten = torch.ops.aten

KERNELS = {
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_efficient_attention.default: 4,
    aten._scaled_dot_product_cudnn_attention.default: 4,
}
"""Kernels whose second result is the log-sum-exp, and the number of the argument that has to ask for it."""


@dataclass(frozen=True)
class ShareLogSumExp:
    """Replace attention beside a score by the kernel that torch runs it as, and read its log-sum-exp."""

    name: ClassVar[str] = "share-log-sum-exp"
    exact: ClassVar[bool] = False
    """cuDNN may plan another kernel where the log-sum-exp is asked for; the others only write it down."""

    def run(self, segment: Segment) -> PassReport:
        """Share it with every score of an attention without a mask."""
        editor, changed, skipped = Editor(segment), [], []
        for score in [node for node in segment.graph.nodes if is_attention_score(node)]:
            attention = find_attention(score)
            if attention is None or mask_of(attention) is not None:
                continue
            lse = _log_sum_exp(editor, attention)
            if lse is None:
                skipped.append(f"{score.name}: torch does not run {attention.name} by a kernel that makes it")
                continue
            score.update_kwarg("lse", lse)
            changed.append(f"{score.name}: log-sum-exp of {attention.name}")
        return PassReport(tuple(changed), tuple(skipped))


def _log_sum_exp(editor: Editor, attention: fx.Node) -> fx.Node | None:
    """Log-sum-exp of an attention, which is replaced by its kernel; None where torch runs it otherwise."""
    operands = [node_argument(attention, i) for i in range(3)]
    rest: tuple[Any, ...] = attention.args[3:]

    def run(*tensors: Tensor) -> Tensor:
        attended: Tensor = ATTENTION(*tensors, *rest, **attention.kwargs)
        return attended

    traced = editor.traced(run, *operands, pre_dispatch=False)
    traced.eliminate_dead_code()  # such as a log-sum-exp that nobody has asked for yet
    kernel = next((node for node in traced.nodes if node.target in KERNELS), None)
    if kernel is None:
        return None
    asks = KERNELS[kernel.target]
    if asks is not None:
        kernel.update_arg(asks, True)
    with editor.before(attention):
        copies = editor.inlined(traced, *operands)
        lse = editor.call(operator.getitem, copies[kernel], 1)
        if tensor_of(lse).ndim > tensor_of(attention).ndim - 1:
            lse = editor.call(aten.squeeze.dim, lse, -1)
    attention.replace_all_uses_with(copies[node_argument(traced.output_node(), 0)])
    editor.graph.erase_node(attention)
    return lse
