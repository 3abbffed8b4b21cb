"""Which branches form a block, which nodes belong to it, and which blocks are alike.

Grouping: by module path where it has an index, else by the shortest repeating pattern of branch fingerprints
(Weisfeiler-Lehman hashes). Membership: a block owns what its adds need and no earlier block computed; values that
several blocks share without belonging to any (timestep embedding, caption projection) go to the prologue.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx

from dicompile.analysis.dataflow import Dataflow, union
from dicompile.analysis.residual import Branch
from dicompile.analysis.structure import Block, BlockId, SiteId, SiteKind
from dicompile.nodes import walk
from dicompile.ops.kinds import is_heavy
from dicompile.text import block_path, layout_text, module_path, operator_text, tensor_text


@dataclass(frozen=True)
class Partition:
    """Nodes of the graph by the part of the model they belong to; inputs and output left out.

    Attributes:
        prologue: bit set of nodes before or beside the blocks.
        blocks: one bit set per group of branches.
        epilogue: bit set of nodes after the last block.
    """

    prologue: int
    blocks: tuple[int, ...]
    epilogue: int


def group_branches(flow: Dataflow, branches: Sequence[Branch]) -> tuple[list[list[int]], list[str]]:
    """Positions of the branches of each block, in execution order, and the module path of each block."""
    paths = _merge_layers(branches, [_path_of(flow, branch) for branch in branches])
    groups: list[list[int]] = []
    for path, run in itertools.groupby(range(len(branches)), key=paths.__getitem__):
        members = list(run)
        if path[-1:].isdigit():
            groups.append(members)
        else:
            repeats = _repeats([branch_fingerprint(flow, branches[i]) for i in members])
            groups += [[members[i] for i in repeat] for repeat in repeats]
    return groups, [paths[group[0]] for group in groups]


def _path_of(flow: Dataflow, branch: Branch) -> str:
    """Path of the block that adds; where its parent's forward does, of the block that holds the last matrix product."""
    own = module_path(branch.add)
    last = module_path(next(node for node in reversed(list(flow.members(branch.region))) if is_heavy(node)))
    inner = block_path(last.rpartition(".")[0]) if last.startswith(own) else ""
    return block_path(own) or inner or own or last.split(".")[0]


def _merge_layers(branches: Sequence[Branch], paths: Sequence[str]) -> list[str]:
    """Blocks that are lists of unlike layers, ``decoders.0.layer.2``, are taken whole."""
    kinds: dict[str, dict[str, list[SiteKind]]] = {}
    for branch, path in zip(branches, paths, strict=True):
        outer = _outer_block(path)
        if outer:
            kinds.setdefault(outer, {}).setdefault(path, []).append(branch.kind)
    whole = {
        outer for outer, layers in kinds.items()
        if len(layers) > 1 and len({tuple(layer) for layer in layers.values()}) == len(layers)
    }  # fmt: skip
    return [outer if (outer := _outer_block(path)) in whole else path for path in paths]


def _outer_block(path: str) -> str:
    """``decoders.0`` for ``decoders.0.layer.2``; empty where nothing is nested."""
    match = re.match(r"^(.*\d)\.(\D[^.]*\.)?\d+$", path)
    return match[1] if match else ""


def branch_fingerprint(flow: Dataflow, branch: Branch) -> str:
    """Weisfeiler-Lehman hash of a branch: equal for isomorphic branches."""
    import networkx as nx  # 300 modules, for models without paths with numbers only

    graph = nx.DiGraph()
    members = list(flow.members(branch.region))
    for node in members:
        graph.add_node(node.name, label=f"{operator_text(node.target)} {tensor_text(node.meta['val'])}")
    for node in members:
        graph.add_edges_from((parent.name, node.name) for parent in node.all_input_nodes if parent in set(members))
    with warnings.catch_warnings():
        # networkx 3.5 warns that its hashes of directed graphs changed; here only hashes of one run are compared.
        warnings.simplefilter("ignore", UserWarning)
        return str(nx.weisfeiler_lehman_graph_hash(graph, node_attr="label"))


def _repeats(fingerprints: Sequence[str]) -> list[list[int]]:
    """Cut a sequence into blocks: greedily the shortest pattern that repeats at each position."""
    groups, start, total = [], 0, len(fingerprints)
    while start < total:
        length = next(
            (
                size
                for size in range(1, (total - start) // 2 + 1)
                if fingerprints[start : start + size] == fingerprints[start + size : start + 2 * size]
            ),
            total - start,
        )
        pattern = fingerprints[start : start + length]
        while fingerprints[start : start + length] == pattern:
            groups.append(list(range(start, start + length)))
            start += length
    return groups


def partition(flow: Dataflow, groups: Sequence[Sequence[Branch]]) -> Partition:
    """Split the nodes of a graph into prologue, one part per group of branches, and epilogue."""
    calls = flow.select(lambda node: node.op == "call_function")
    adds = [[branch.add for branch in group] for group in groups]
    streams = flow.bits(add for group in adds for add in group)
    starts = [b.source for group in groups for b in group if not flow.ancestors[b.source] & streams]
    latent_free = ~union(flow.descendants[start] for start in starts)

    once = twice = 0
    for ends in [*adds, [flow.nodes[-1]]]:
        bits = _private_ancestors(flow, ends, streams)
        twice |= once & bits
        once |= bits
    shared = union(flow.ancestors[node] for node in flow.members(twice & latent_free))
    prologue = _with_items(flow, (shared | union(flow.ancestors[start] for start in starts)) & calls)
    taken, parts = prologue, []
    for group in adds:
        new = union(flow.ancestors[add] for add in group) & calls & ~taken  # a list is taken with all its items
        bits = _with_items(flow, new) & ~taken
        parts.append(bits)
        taken |= bits
    return Partition(prologue, tuple(parts), flow.ancestors[flow.nodes[-1]] & calls & ~taken)


def make_blocks(
    flow: Dataflow, groups: Sequence[Sequence[int]], paths: Sequence[str], parts: Partition
) -> tuple[Block, ...]:
    """Blocks in execution order.

    Args:
        flow: of the graph.
        groups: numbers of the branches of each block.
        paths: module path of each block.
        parts: nodes of each block.
    """
    keys = [structure_key(flow.members(bits)) for bits in parts.blocks]
    families = [path.rpartition(".")[0] if path else key for path, key in zip(paths, keys, strict=True)]
    return tuple(
        Block(
            id=BlockId(b),
            path=paths[b],
            sites=tuple(SiteId(i) for i in group),
            kind=keys[b],
            nodes=flow.names(parts.blocks[b]),
            depth=(families[:b].count(families[b]), families.count(families[b])),
        )
        for b, group in enumerate(groups)
    )


def _with_items(flow: Dataflow, bits: int) -> int:
    """The same nodes with everything taken out of the lists that some of them return: no list leaves a part."""
    lists = (node for node in flow.members(bits) if not isinstance(node.meta["val"], torch.Tensor))
    return bits | flow.bits(user for node in lists for user in node.users if user.target is operator.getitem)


def _private_ancestors(flow: Dataflow, ends: Sequence[fx.Node], streams: int) -> int:
    """What `ends` are computed from without passing through a residual add of another block."""
    return flow.bits(walk(ends, lambda node: (p for p in node.all_input_nodes if not flow.contains(streams, p))))


def structure_key(nodes: Iterable[fx.Node], given: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Hash of a piece of graph up to names and parameters: equal keys can share compiled code.

    Part of the key are operators, constants, wiring, and shape, stride, dtype and device of every value that comes in.

    Args:
        nodes: the piece.
        given: what comes in otherwise than the captured graph says, by name.
    """
    number: dict[fx.Node, int] = {}
    lines = []
    members = list(nodes)
    inside = set(members)

    def name(node: fx.Node) -> str:
        if node not in number:
            number[node] = len(number)
            if node not in inside:
                value = given.get(node.name, node.meta.get("val"))
                lines.append(f"%{number[node]} = input {layout_text(value)}")
        return f"%{number[node]}"

    for node in members:
        arguments = fx.node.map_arg((node.args, node.kwargs), name)
        lines.append(f"{name(node)} = {operator_text(node.target)} {arguments}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
