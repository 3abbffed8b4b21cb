"""How values travel along a stream: casts, splits and joins leave them what they are, the rest computes with them."""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
from torch import fx

from dicompile.analysis.dataflow import Dataflow

aten = torch.ops.aten

REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
TRANSPORT = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.pad.default,
    aten.expand.default,
)


def is_transport(node: fx.Node) -> bool:
    """True for casts, splits and joins, which move a stream without computing with it."""
    return node.target in TRANSPORT or node.target is operator.getitem


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
