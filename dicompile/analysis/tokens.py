"""Where tokens are in every node of a branch, and which operator mixes them.

Abstract interpretation: starting from the residual stream, each operator either keeps tokens apart, so that one knows
which axes count them behind it (see `Layout`), or mixes them. A branch that keeps them apart to its end can be
recomputed for a subset of its tokens. Attention mixes through keys and values; if those do not come from the stream
(cross-attention) the branch is still token-wise, otherwise its queries are, and everything is once the attention's
output is at hand. What each operator does stands in `dicompile.ops.operators`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection

from torch import fx

from dicompile.nodes import node_argument, walk
from dicompile.ops.attention import open_attention, stored_output
from dicompile.ops.kinds import is_attention
from dicompile.ops.layout import Layout
from dicompile.ops.operators import carry
from dicompile.ops.rows import taken_rows
from dicompile.ops.tokens import Carried, Layouts, MixesTokens


class Mixing(enum.Enum):
    """What is assumed of attention whose keys and values come from the stream itself."""

    FORBIDDEN = "forbidden"
    QUERIES = "queries"
    """Keys and values are there, whoever computes them: the queries alone carry tokens."""

    STORED = "stored"
    """Its output is there: tokens start from it as they do from the stream."""


def token_layouts(
    region: Collection[fx.Node], stream: fx.Node, layout: Layout, mixing: Mixing = Mixing.FORBIDDEN
) -> dict[fx.Node, Carried]:
    """What every node does that carries tokens of the stream.

    Args:
        region: nodes of the branch in graph order.
        stream: the stream value they start from.
        layout: where its tokens are.
        mixing: what is assumed of attention over the same tokens.

    Raises:
        MixesTokens: an operator mixes tokens, or is not known not to.
    """
    carried = {stream: Carried(layout)}
    layouts = {stream: layout}
    if mixing is Mixing.STORED:
        return carried | _from_stored_attention(region, layouts)
    for node in region:
        if any(parent in layouts for parent in node.all_input_nodes):
            opened = is_attention(node) and mixing is Mixing.QUERIES
            if _is_beside_tokens(node, layouts):
                continue
            carried[node] = open_attention(node, layouts) if opened else carry(node, layouts)
            layouts[node] = carried[node].layout
    return carried


def _is_beside_tokens(node: fx.Node, layouts: Layouts) -> bool:
    """True for rows that were joined with the tokens and have nothing of them: no attention is on the way."""
    taken = taken_rows(node)
    if taken is None or node_argument(node, 0) not in layouts:
        return False
    part = layouts[node_argument(node, 0)].padding(taken[0])
    if part is None or not (taken[2] <= part.before or taken[1] >= part.size - part.after):
        return False
    behind = walk([node_argument(node, 0)], lambda node: (p for p in node.all_input_nodes if p in layouts))
    return all(not is_attention(parent) for parent in behind)


def _from_stored_attention(region: Collection[fx.Node], layouts: dict[fx.Node, Layout]) -> dict[fx.Node, Carried]:
    """What nodes do that are needed for the branch's end when the output of its attention is at hand."""
    (layout,) = layouts.values()
    wanted, mixed = _behind_stored(region), set[fx.Node]()
    carried = {}
    for node in region:
        parents = node.all_input_nodes
        if not any(parent in layouts or parent in mixed for parent in parents) or _is_beside_tokens(node, layouts):
            continue
        try:
            if is_attention(node):
                carried[node] = Carried(stored_output(node, layouts, layout))
            elif any(parent in mixed for parent in parents):
                mixed.add(node)
            else:
                carried[node] = carry(node, layouts)
        except MixesTokens:
            if node in wanted:
                raise
            mixed.add(node)
        if node in carried:
            layouts[node] = carried[node].layout
    return {node: what for node, what in carried.items() if node in wanted}


def _behind_stored(region: Collection[fx.Node]) -> set[fx.Node]:
    inside = set(region)

    def parents(node: fx.Node) -> list[fx.Node]:
        return [] if is_attention(node) else [parent for parent in node.all_input_nodes if parent in inside]

    return set(walk([*region][-1:], parents))
