"""Residual streams and branches from dataflow alone.

A residual add is an ``add`` of two same-shaped values, one of which is an ancestor of the other. The ancestor is the
residual stream, the nodes between are the branch. A branch counts as a site when it multiplies matrices, its result
depends on the latent, and no other site lies inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.structure import SiteKind
from dicompile.analysis.transport import nearest_streams
from dicompile.nodes import node_argument, walk
from dicompile.ops.kinds import ADDS, GATES, PRODUCTS, is_attention, is_heavy, is_transport
from dicompile.ops.registry import is_unknown, said_of
from dicompile.text import block_path, module_path

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """One residual branch, as nodes of the captured graph.

    Attributes:
        add: the residual add.
        stream: the stream value it adds to.
        source: the stream value it reads: `stream` itself, or, where several branches leave one value (a second
            attention beside the first) or the stream is split before the add, the value these come from.
        core: branch output before the gate.
        update: branch output after the gate, the other operand of `add`.
        region: bit set of the nodes from `source` (left out) to `update`.
        kind: what the branch does.
        attention: its attention nodes, where it has them as one operator.
    """

    add: fx.Node
    stream: fx.Node
    source: fx.Node
    core: fx.Node
    update: fx.Node
    region: int
    kind: SiteKind
    attention: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Candidate:
    add: fx.Node
    stream: fx.Node
    source: fx.Node
    update: fx.Node
    region: int


def find_branches(flow: Dataflow, latent: fx.Node, samples: int) -> list[Branch]:
    """All residual branches of a graph, in graph order.

    Those of streams that do not come from the latent (refiners of the text) count where they have a token axis.

    Args:
        flow: of the graph.
        latent: the input that is denoised.
        samples: bit set of the inputs that hold tokens: the latent and conditioning.
    """
    heavy = flow.select(is_heavy)
    candidates: dict[fx.Node, _Candidate] = {}
    for add in flow.nodes:
        if add.target not in ADDS or not _carries_tokens(flow, add, latent):
            continue
        operands = _residual_operands(flow, add, candidates)
        if operands is None:
            continue
        stream, source, update = operands
        region = flow.between(source, update)
        if region & heavy:
            candidates[add] = _Candidate(add, stream, source, update, region)
    chosen = _innermost(flow, candidates.values())
    streams = flow.bits(node for item in chosen for node in (item.add, item.source))
    mixers = {node: mixed for node in flow.nodes if (mixed := _mixed_operands(flow, node, samples))}
    branches = []
    for item in chosen:
        inside = {node: mixed for node, mixed in mixers.items() if flow.contains(item.region, node)}
        branches.append(
            Branch(
                add=item.add,
                stream=item.stream,
                source=item.source,
                core=branch_core(flow, item.source, item.update),
                update=item.update,
                region=item.region,
                kind=_kind(flow, item, inside, streams, heavy),
                attention=tuple(node for node in inside if is_attention(node)),
            )
        )
    return branches


def _carries_tokens(flow: Dataflow, add: fx.Node, latent: fx.Node) -> bool:
    shape = add.meta["val"].shape
    return flow.is_ancestor(latent, add) or (len(shape) >= 3 and shape[1] > 1)


def _innermost(flow: Dataflow, candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """Candidates, in graph order, without another one inside; of two that only make up one branch, the outer one."""
    chosen: dict[fx.Node, _Candidate] = {}
    for outer in candidates:
        inside = [inner for inner in chosen.values() if flow.contains(outer.region, inner.add)]
        if all(_only_serves(flow, inner, outer) for inner in inside):
            for inner in inside:
                del chosen[inner.add]
            chosen[outer.add] = outer
    return list(chosen.values())


def _only_serves(flow: Dataflow, inner: _Candidate, outer: _Candidate) -> bool:
    """True if the sum inside is no stream, but a step of the outer branch.

    That is a sum with the very value that the outer branch adds to, ``x + mlp(norm(x + attention(x)))``, and what a
    block sums up in other shapes than that of its stream: the state of a linear attention.
    """
    if not all(flow.contains(outer.region, user) for user in inner.add.users):
        return False
    path = block_path(module_path(outer.add))
    same_block = bool(path) and block_path(module_path(inner.add)) == path
    return inner.stream is outer.stream or (same_block and inner.add.meta["val"].shape != outer.add.meta["val"].shape)


def _mixed_operands(flow: Dataflow, node: fx.Node, samples: int) -> tuple[fx.Node, ...]:
    """What a node lets tokens see of each other: keys of attention, or both factors of a product of two activations."""
    if is_attention(node):
        return (node_argument(node, 1),)
    said = said_of(node.target)
    if said is not None and said.tokens == "mixes":
        return tuple(parent for parent in node.all_input_nodes if flow.ancestors[parent] & samples)
    if node.target not in PRODUCTS:
        return ()
    factors = [parent for parent in node.all_input_nodes if parent.meta["val"].ndim >= 2][-2:]
    return tuple(factors) if len(factors) == 2 and all(flow.ancestors[f] & samples for f in factors) else ()


def branch_core(flow: Dataflow, stream: fx.Node, update: fx.Node) -> fx.Node:
    """Walk back from the update while the node is a gate: element-wise with exactly one operand from the stream."""
    node = update
    while node.target in GATES:
        from_stream = [parent for parent in node.all_input_nodes if flow.is_ancestor(stream, parent)]
        if len(from_stream) != 1 or from_stream[0].meta["val"].shape != update.meta["val"].shape:
            break
        node = from_stream[0]
    return node


def _residual_operands(
    flow: Dataflow, add: fx.Node, known: Mapping[fx.Node, _Candidate]
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Stream, source and update of a residual add; see `Branch`."""
    left, right = add.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if add.kwargs.get("alpha", 1) != 1:
        return None
    shape = add.meta["val"].shape
    if len(shape) < 2 or left.meta["val"].shape != shape or right.meta["val"].shape != shape:
        return None
    for stream, update in ((left, right), (right, left)):
        if flow.is_ancestor(stream, update):
            return stream, stream, update
    for stream, update in ((left, right), (right, left)):
        source = _source_behind(flow, stream, update, known)
        if source is not None:
            return stream, source, update
    return None


def _source_behind(
    flow: Dataflow, stream: fx.Node, update: fx.Node, known: Mapping[fx.Node, _Candidate]
) -> fx.Node | None:
    """The latest value that the stream comes from, by earlier adds or split off, and that the update is made of."""

    def origins(node: fx.Node) -> Sequence[fx.Node]:
        if node in known:
            return [known[node].stream]
        return node.all_input_nodes if is_transport(node) else ()

    behind = walk([stream], origins)
    return next((node for node in behind if node is not stream and flow.is_ancestor(node, update)), None)


def _kind(
    flow: Dataflow, branch: _Candidate, mixers: Mapping[fx.Node, Sequence[fx.Node]], streams: int, heavy: int
) -> SiteKind:
    if any(is_unknown(node) for node in flow.members(branch.region)):
        return SiteKind.UNKNOWN
    if not mixers:
        return SiteKind.MLP
    source = branch.source
    if _bypasses(flow, source, branch.update, set(mixers), heavy):
        return SiteKind.PARALLEL
    from_itself = from_others = False
    for operands in mixers.values():
        from_itself |= all(flow.is_ancestor(source, operand) for operand in operands)
        near = [nearest_streams(flow, operand, streams) for operand in operands]
        from_others |= any(bits & ~flow.bits([source]) for bits in near)
    if not from_itself:
        return SiteKind.CROSS_ATTENTION
    return SiteKind.JOINT_ATTENTION if from_others else SiteKind.SELF_ATTENTION


def _bypasses(flow: Dataflow, source: fx.Node, update: fx.Node, mixers: Set[fx.Node], heavy: int) -> bool:
    """True if a path with a matrix product leads around attention: an MLP beside it in the same branch.

    A factor on the attention's output (gated attention) is none, however it was computed.
    """
    attended = flow.bits(mixers)

    def factors(node: fx.Node) -> Iterable[fx.Node]:
        parents = node.all_input_nodes
        attending = [parent for parent in parents if flow.ancestors[parent] & attended]
        followed = attending if attending and node.target is aten.mul.Tensor else parents
        return (parent for parent in followed if parent in forward)

    forward = set(
        walk([source], lambda node: (u for u in node.users if u not in mixers and flow.is_ancestor(u, update)))
    )
    backward = set(walk([update], factors))
    around = set(walk([source], lambda node: (user for user in node.users if user in backward)))
    return update in around and bool(flow.bits(around) & heavy)
