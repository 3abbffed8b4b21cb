"""Let attention deliver the raw score of its tokens on steps that compute it.

Later steps rank tokens by what this attention saw, so the score must leave the segment while queries, keys and values
are at hand. Only [b, n] numbers leave, never a map.

Before::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)

After (value norm)::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    %10: f32[2,4,64] = aten.linalg_vector_norm.default(%8, 2, [-1])
    %11: f32[2,4,64] = aten.rsub.Scalar(%10, 1)
    %12: f32[2,64] = aten.sum.dim_IntList(%11, [1])
    return score[0] = %12

Attention itself is not touched: it stays one fused call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from dicompile.nodes import node_argument
from dicompile.ops import scores
from dicompile.passes.base import PassReport, Segment, SlotRef
from dicompile.passes.edit import Editor
from dicompile.plan import Score, ScoreBase, SlotKind


@dataclass(frozen=True)
class ScoreTokens:
    """Add the raw token score as an output of computing attention sites."""

    name: ClassVar[str] = "score-tokens"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Add the scores that the steps ask for."""
        editor, changed = Editor(segment), []
        for position, step in enumerate(segment.steps):
            if step.produces is None:
                continue
            attention = segment.sites[position].attention[0]
            with editor.before(attention.next):
                raw = raw_score(editor, attention, step.produces)
            segment.scores[position] = raw
            editor.output(SlotRef(position, SlotKind.SCORE), raw)
            changed.append(f"site {position}: {step.produces.base.value}")
        return PassReport(tuple(changed))


def raw_score(editor: Editor, attention: fx.Node, score: Score) -> fx.Node:
    """Raw score of an attention node, in front of which the editor stands.

    Args:
        editor: where the new nodes go.
        attention: a scaled_dot_product_attention node.
        score: which base, and whether entropies are for a mixture of guidance halves.
    """
    query, key, value = (node_argument(attention, i) for i in range(3))
    mask: Any = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    scale: Any = attention.kwargs.get("scale")
    if score.base is ScoreBase.VALUE_NORM:
        return editor.trace(scores.value_norm, value)
    if score.base is ScoreBase.ENTROPY:

        def entropy(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
            return scores.attention_entropy(query, key, mask, scale, shared=score.share_guidance)

        return editor.trace(entropy, query, key, mask)

    def received(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        return scores.attention_received(query, key, mask, scale)

    return editor.trace(received, query, key, mask)
