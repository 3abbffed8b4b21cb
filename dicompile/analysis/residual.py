"""Residual streams and branches from dataflow alone.

A residual add is an ``add`` of two same-shaped values, one of which is an ancestor of the other. The ancestor is the
residual stream, the nodes between are the branch. A branch counts as a site when it multiplies matrices, its result
depends on the latent, and no other site lies inside it.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from dicompile.analysis.cost import ATTENTION, is_heavy
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.structure import SiteKind
from dicompile.nodes import node_argument

aten = torch.ops.aten

ADDS = (aten.add.Tensor,)
GATES = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
TRANSPORT = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.view.default,
    aten.reshape.default,
)


@dataclass(frozen=True)
class Branch:
    """One residual branch, as nodes of the captured graph.

    Attributes:
        add: the residual add.
        stream: the stream value it adds to.
        core: branch output before the gate.
        update: branch output after the gate, the other operand of `add`.
        region: bit set of the nodes from `stream` (left out) to `update`.
        kind: what the branch does.
        attention: its attention nodes.
    """

    add: fx.Node
    stream: fx.Node
    core: fx.Node
    update: fx.Node
    region: int
    kind: SiteKind
    attention: tuple[fx.Node, ...]


def find_branches(flow: Dataflow, latent: fx.Node) -> list[Branch]:
    """All residual branches of a graph that depend on `latent`, in graph order."""
    heavy, attention = flow.select(is_heavy), flow.select(lambda node: node.target is ATTENTION)
    found = []
    for add in flow.nodes:
        if add.target not in ADDS or not flow.is_ancestor(latent, add):
            continue
        operands = _residual_operands(flow, add)
        if operands is None:
            continue
        stream, update = operands
        region = flow.between(stream, update)
        if region & heavy:
            found.append((add, stream, update, region))
    adds = flow.bits(add for add, *_ in found)
    leaves = [item for item in found if not item[3] & adds]
    streams = flow.bits(node for add, stream, *_ in leaves for node in (add, stream))
    branches = []
    for add, stream, update, region in leaves:
        inside = tuple(flow.members(region & attention))
        branches.append(
            Branch(
                add=add,
                stream=stream,
                core=branch_core(flow, stream, update),
                update=update,
                region=region,
                kind=_kind(flow, stream, update, inside, streams, heavy),
                attention=inside,
            )
        )
    return branches


def branch_core(flow: Dataflow, stream: fx.Node, update: fx.Node) -> fx.Node:
    """Walk back from the update while the node is a gate: element-wise with exactly one operand from the stream."""
    node = update
    while node.target in GATES:
        from_stream = [parent for parent in node.all_input_nodes if flow.is_ancestor(stream, parent)]
        if len(from_stream) != 1 or from_stream[0].meta["val"].shape != update.meta["val"].shape:
            break
        node = from_stream[0]
    return node


def chain_streams(flow: Dataflow, branches: list[Branch]) -> list[int]:
    """Number the streams: a branch continues the stream whose last add reaches it by casts, splits and joins only."""
    owner: dict[fx.Node, int] = {}
    numbers: list[int] = []
    count = 0
    for branch in branches:
        number = _stream_behind(branch.stream, owner)
        if number is None:
            number, count = count, count + 1
        owner[branch.stream] = owner[branch.add] = number
        numbers.append(number)
    return numbers


def own_keys(flow: Dataflow, branch: Branch, streams: int) -> tuple[int, int]:
    """First of the attention's keys that belong to the branch's own stream, and their number; (0, 0) if none do.

    Args:
        flow: of the graph.
        branch: its attention may join several streams.
        streams: bit set of all stream values.
    """
    if len(branch.attention) != 1 or branch.kind in (SiteKind.MLP, SiteKind.CROSS_ATTENTION):
        return 0, 0
    node = node_argument(branch.attention[0], 1)
    value, stream = node.meta["val"], branch.stream.meta["val"]
    total = int(value.shape[-2])
    # Attention along one axis of a film folds the other into the batch.
    if value.shape[0] * total == math.prod(stream.shape[:-1]):
        return 0, total
    own = flow.bits([branch.stream])
    while node.target is not aten.cat.default or total not in node.meta["val"].shape:
        parents = [p for p in node.all_input_nodes if flow.is_ancestor(branch.stream, p) and p is not branch.stream]
        if not parents:
            return 0, 0
        node = parents[0]
    first = 0
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = node.args[1] if len(node.args) > 1 else 0
    for part in parts:
        size = int(part.meta["val"].shape[dim])
        if _nearest_streams(flow, part, streams) & own:
            return first, size
        first += size
    return 0, 0


def _stream_behind(node: fx.Node, owner: dict[fx.Node, int]) -> int | None:
    """Number of the stream carried by `node`; of several that were joined, the last one."""
    return max((owner[found] for found in carried(node, owner)), default=None)


def carried(node: fx.Node, wanted: Container[fx.Node]) -> list[fx.Node]:
    """The nearest of the `wanted` nodes whose values arrive at `node` by casts, splits and joins only."""
    queue, seen, found = [node], {node}, []
    while queue:
        current = queue.pop()
        if current in wanted:
            found.append(current)
        elif current.target in TRANSPORT or (current.op == "call_function" and "getitem" in str(current.target)):
            parents = [parent for parent in current.all_input_nodes if parent not in seen]
            seen.update(parents)
            queue += parents
    return found


def _residual_operands(flow: Dataflow, add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    left, right = add.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if add.kwargs.get("alpha", 1) != 1:
        return None
    shape = add.meta["val"].shape
    if len(shape) < 2 or left.meta["val"].shape != shape or right.meta["val"].shape != shape:
        return None
    if flow.is_ancestor(left, right):
        return left, right
    return (right, left) if flow.is_ancestor(right, left) else None


def _kind(
    flow: Dataflow, stream: fx.Node, update: fx.Node, attention: tuple[fx.Node, ...], streams: int, heavy: int
) -> SiteKind:
    if not attention:
        return SiteKind.MLP
    if _bypasses(flow, stream, update, attention, heavy):
        return SiteKind.PARALLEL
    from_itself = from_others = False
    for node in attention:
        key = node_argument(node, 1)
        from_itself |= flow.is_ancestor(stream, key)
        from_others |= bool(_nearest_streams(flow, key, streams) & ~flow.bits([stream]))
    if not from_itself:
        return SiteKind.CROSS_ATTENTION
    return SiteKind.JOINT_ATTENTION if from_others else SiteKind.SELF_ATTENTION


def _nearest_streams(flow: Dataflow, node: fx.Node, streams: int) -> int:
    """Stream values that `node` is computed from without passing through another one."""
    result, queue, seen = 0, [node], {node}
    while queue:
        current = queue.pop()
        bit = 1 << flow.position[current]
        if streams & bit:
            result |= bit
            continue
        parents = [parent for parent in current.all_input_nodes if parent not in seen]
        seen.update(parents)
        queue += parents
    return result


def _bypasses(flow: Dataflow, stream: fx.Node, update: fx.Node, attention: tuple[fx.Node, ...], heavy: int) -> bool:
    """True if a path with a matrix product leads around attention: an MLP beside it in the same branch."""
    blocked = set(attention)
    forward, queue = {stream}, [stream]
    while queue:
        found = [u for u in queue.pop().users if u not in forward | blocked and flow.is_ancestor(u, update)]
        forward.update(found)
        queue += found
    backward, queue = {update}, [update]
    while queue:
        found = [p for p in queue.pop().all_input_nodes if p in forward and p not in backward]
        backward.update(found)
        queue += found
    return bool(flow.bits(forward & backward) & heavy)
