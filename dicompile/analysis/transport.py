"""How values travel along a stream: casts, splits and joins leave them what they are, the rest computes with them."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.ops.kinds import REDUCTIONS, is_transport


def carried(node: fx.Node, wanted: Container[fx.Node]) -> list[fx.Node]:
    """The nearest of the `wanted` nodes whose values arrive at `node` by casts, splits and joins only."""
    queue, seen, found = [node], {node}, []
    while queue:
        current = queue.pop()
        if current in wanted:
            found.append(current)
        elif is_transport(current):
            parents = [parent for parent in current.all_input_nodes if parent not in seen]
            seen.update(parents)
            queue += parents
    return found


def nearest_streams(flow: Dataflow, node: fx.Node, streams: int) -> int:
    """Stream values that `node` has tokens of: it is computed from them without another one or a mean between."""
    result, queue, seen = 0, [node], {node}
    while queue:
        current = queue.pop()
        bit = 1 << flow.position[current]
        if streams & bit:
            result |= bit
        if streams & bit or current.target in REDUCTIONS:
            continue
        parents = [parent for parent in current.all_input_nodes if parent not in seen]
        seen.update(parents)
        queue += parents
    return result
