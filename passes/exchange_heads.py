"""Write out attention among several ranks: its exchanges, and torch's attention between them.

Before::

    %9: f32[1,2,11,16] = dicompile.ulysses_attention.default(%6, %7, %8, ranks=2, group='0')
    %10: f32[1,11] = dicompile.ulysses_received.default(%6, %7, ranks=2, group='0')

After::

    %11: f32[352] = _c10d_functional.all_to_all_single.default(..., [176, 176], [176, 176], '0')   # queries
    ... likewise keys and values
    %19: f32[1,1,22,16] = aten.scaled_dot_product_attention.default(%12, %15, %18)
    %20: f32[1,22] = dicompile.attention_received.default(%12, %15, None, None, False)
    %22: f32[352] = _c10d_functional.all_to_all_single.default(..., [176, 176], [176, 176], '0')   # the output
    %24: f32[22] = _c10d_functional.all_to_all_single.default(..., [11, 11], [11, 11], '0')        # the score

What attention and its score have in common is exchanged once. Later passes see torch's attention, so whatever is done
to that is done here, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention_scores import operator_for
from dicompile.ops.kinds import ATTENTION
from dicompile.ops.ulysses import RECEIVED, ULYSSES, mean_of_own_tokens, to_own_tokens, to_some_heads
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor


@dataclass(frozen=True)
class ExchangeHeads:
    """Write out attention among ranks, and the scores of it."""

    name: ClassVar[str] = "exchange-heads"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Write out every one."""
        editor, changed = Editor(segment), []
        exchanged: dict[fx.Node, fx.Node] = {}
        for node in list(segment.graph.nodes):
            if node.target not in (ULYSSES, RECEIVED):
                continue
            with editor.before(node):
                written = _written_out(editor, node, exchanged)
            node.replace_all_uses_with(written)
            segment.graph.erase_node(node)
            changed.append(f"{written.name}: among {node.kwargs['ranks']} ranks")
        return PassReport(tuple(changed))


def _written_out(editor: Editor, node: fx.Node, exchanged: dict[fx.Node, fx.Node]) -> fx.Node:
    among: dict[str, Any] = {"ranks": node.kwargs["ranks"], "group": node.kwargs["group"]}
    count = 3 if node.target is ULYSSES else 2
    operands = [node_argument(node, i) for i in range(count)]
    for operand in operands:
        if operand not in exchanged:
            exchanged[operand] = editor.trace(functools.partial(to_some_heads, **among), operand)
    some, scale = [exchanged[operand] for operand in operands], node.kwargs.get("scale")
    mask = node.args[count] if len(node.args) > count else None
    if node.target is RECEIVED:
        score = editor.call(operator_for(tensor_of(some[0]), "attention_received"), *some, mask, scale, False)
        return editor.trace(functools.partial(mean_of_own_tokens, **among), score)
    given = {} if scale is None else {"scale": scale}
    attended = editor.call(ATTENTION, *some, *([] if mask is None else [mask]), **given)
    return editor.trace(functools.partial(to_own_tokens, **among), attended)
