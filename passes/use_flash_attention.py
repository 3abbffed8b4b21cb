"""Compute attention by the flash-attn package, where its kernels can.

Before::

    %9: bf16[2,4,64,64] = aten.scaled_dot_product_attention.default(%6, %7, %8)

After::

    %9 = dicompile.flash_attention.default(%6, %7, %8, None, False)
    %10: bf16[2,4,64,64] = getitem(%9, 0)
    %11: f32[2,4,64] = getitem(%9, 1)  # if a score reads it
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch

from dicompile.ops.attention import find_attention
from dicompile.ops.attention_scores import is_attention_score
from dicompile.ops.flash import arguments_of, why_not
from dicompile.ops.kinds import ATTENTION
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor


@dataclass(frozen=True)
class UseFlashAttention:
    """Put FlashAttention in the place of torch's attention; what it cannot compute stays."""

    name: ClassVar[str] = "use-flash-attention"
    exact: ClassVar[bool] = False

    def run(self, segment: Segment) -> PassReport:
        """Replace every attention that it can compute, and let scores read its log-sum-exp."""
        editor, changed = Editor(segment), []
        scores = [(score, find_attention(score)) for score in segment.graph.nodes if is_attention_score(score)]
        for node in segment.graph.find_nodes(op="call_function", target=ATTENTION):
            if why_not(node) is not None:
                continue
            with editor.before(node):
                both = editor.call(torch.ops.dicompile.flash_attention.default, *arguments_of(node))
                output, lse = (editor.call(operator.getitem, both, i) for i in range(2))
            for score in (score for score, attention in scores if attention is node):
                score.update_kwarg("lse", lse)
            node.replace_all_uses_with(output)
            segment.graph.erase_node(node)
            changed.append(output.name)
        return PassReport(tuple(changed))
