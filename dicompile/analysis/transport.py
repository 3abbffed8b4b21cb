"""How values travel along a stream: casts, splits and joins leave them what they are, the rest computes with them."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.nodes import walk
from dicompile.ops.kinds import REDUCTIONS, is_transport


def carried(node: fx.Node, wanted: Container[fx.Node]) -> list[fx.Node]:
    """The nearest of the `wanted` nodes whose values arrive at `node` by casts, splits and joins only."""

    def parents(node: fx.Node) -> Sequence[fx.Node]:
        return node.all_input_nodes if is_transport(node) and node not in wanted else ()

    return [found for found in walk([node], parents) if found in wanted]


def nearest_streams(flow: Dataflow, node: fx.Node, streams: int) -> int:
    """Stream values that `node` has tokens of: it is computed from them without another one or a mean between."""

    def parents(node: fx.Node) -> Sequence[fx.Node]:
        return () if flow.contains(streams, node) or node.target in REDUCTIONS else node.all_input_nodes

    return flow.bits(walk([node], parents)) & streams
