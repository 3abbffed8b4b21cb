"""Let attention and its score share the weights that both are made of, on a CPU.

There attention is two products and an exponential, and a score makes the first product and the exponential once more:
two thirds of the attention's time again, or all of it. An operator that makes both of the same weights needs a tenth to
a third more than attention alone.

Before::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    %10: f32[2,64] = dicompile.attention_received.default(%6, %7, None, None, False)

After::

    %9: (...) = dicompile.attention_and_received.default(%6, %7, %8, None, None, False)
    %10: f32[2,4,64,8] = getitem(%9, 0)
    %11: f32[2,64] = getitem(%9, 1)

On a GPU attention is one kernel that keeps its weights to itself; see `dicompile.passes.share_log_sum_exp`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import find_attention
from dicompile.ops.attention_scores import WITH_OUTPUT
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor


@dataclass(frozen=True)
class ShareWeights:
    """Replace attention and the score of it by one operator."""

    name: ClassVar[str] = "share-weights"
    exact: ClassVar[bool] = False
    """Sums are taken in another order than within torch's kernel."""

    def run(self, segment: Segment) -> PassReport:
        """Replace every pair on a CPU, whose attention drops no weights."""
        editor, changed = Editor(segment), []
        for score in [node for node in segment.graph.nodes if node.target in WITH_OUTPUT]:
            attention = find_attention(score)
            if attention is not None and tensor_of(attention).device.type == "cpu":
                changed.append(f"{score.name}: weights of {attention.name}")
                _join(editor, attention, score)
        return PassReport(tuple(changed))


def _join(editor: Editor, attention: fx.Node, score: fx.Node) -> None:
    query, key, *rest = score.args
    operands = query, key, node_argument(attention, 2), *rest
    with editor.before(attention):
        both = editor.call(WITH_OUTPUT[score.target], *operands, **score.kwargs)
        output, made = (editor.call(operator.getitem, both, i) for i in range(2))
        strides = tensor_of(attention).stride()
        if tensor_of(output).stride() != strides:
            output = editor.with_strides(output, strides)
    for before, after in ((attention, output), (score, made)):
        before.replace_all_uses_with(after)
        editor.graph.erase_node(before)
