"""Compute attention by the kernel that the user chose, where it can.

Before::

    %9: bf16[2,4,64,64] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    %10: f32[2,64] = dicompile.attention_received_cuda_triton.default(%6, %7, None, None, False)

After::

    %9 = dicompile.flash_attention.default(%6, %7, %8, None, False)
    %10: bf16[2,4,64,64] = getitem(%9, 0)
    %11: f32[2,4,64] = getitem(%9, 1)
    %12: f32[2,64] = dicompile.attention_received_cuda_triton.default(%6, %7, None, None, False, lse=%11)

Attention with a mask, by torch's ``flex_attention``, whose last argument asks for the log-sum-exp that a score reads::

    %9 = dicompile.flex_attention.default(%6, %7, %8, %4, None, True)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from dicompile.ops.attention import find_attention
from dicompile.ops.attention_kernels import AttentionKernel
from dicompile.ops.attention_scores import is_attention_score
from dicompile.ops.flash import FLASH
from dicompile.ops.flex import FLEX
from dicompile.ops.kinds import ATTENTION
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor


class UseAttentionKernel:
    """Put the operator of a kernel in the place of torch's attention; what it cannot compute stays."""

    exact: ClassVar[bool] = False
    kernel: ClassVar[AttentionKernel]

    def run(self, segment: Segment) -> PassReport:
        """Replace every attention that it can compute, and let scores read its log-sum-exp."""
        editor, changed = Editor(segment), []
        scores = [(score, find_attention(score)) for score in segment.graph.nodes if is_attention_score(score)]
        for node in segment.graph.find_nodes(op="call_function", target=ATTENTION):
            if self.kernel.why_not(node) is not None:
                continue
            reads = self.kernel.makes_lse(node)
            readers = [score for score, attention in scores if attention is node and reads]
            with editor.before(node):
                both = editor.call(self.kernel.operator, *self.kernel.arguments(node, bool(readers)))
                output, lse = (editor.call(operator.getitem, both, i) for i in range(2))
            for score in readers:
                score.update_kwarg("lse", lse)
            node.replace_all_uses_with(output)
            segment.graph.erase_node(node)
            changed.append(output.name)
        return PassReport(tuple(changed))


@dataclass(frozen=True)
class UseFlashAttention(UseAttentionKernel):
    """FlashAttention of the package flash-attn."""

    name: ClassVar[str] = "use-flash-attention"
    kernel: ClassVar[AttentionKernel] = FLASH


@dataclass(frozen=True)
class UseFlexAttention(UseAttentionKernel):
    """torch's ``flex_attention``, for attention with a mask."""

    name: ClassVar[str] = "use-flex-attention"
    kernel: ClassVar[AttentionKernel] = FLEX
