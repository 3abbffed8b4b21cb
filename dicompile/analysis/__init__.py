"""Analysis: captured graph -> `ModelStructure`. Reads the graph, edits nothing, knows no class or attribute names."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence

from torch import fx

from dicompile.analysis.blocks import Partition, block_path, group_branches, partition, structure_key
from dicompile.analysis.cost import node_bytes, node_flops
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch, chain_streams, find_branches
from dicompile.analysis.structure import (
    Block,
    BlockId,
    ModelStructure,
    Site,
    SiteId,
    SiteKind,
    Stream,
    StreamId,
    TokenFact,
    TokenWise,
)
from dicompile.analysis.tokens import MixesTokens, token_axes
from dicompile.capture import Capture, Role
from dicompile.text import module_path

__all__ = [
    "Block",
    "BlockId",
    "Dataflow",
    "ModelStructure",
    "Site",
    "SiteId",
    "SiteKind",
    "Stream",
    "StreamId",
    "TokenFact",
    "TokenWise",
    "analyse",
    "node_flops",
]


def analyse(capture: Capture) -> ModelStructure:
    """Find streams, sites, blocks, token axes, dependence and cost of a captured model."""
    flow = Dataflow(capture.graph)
    placeholders = [node for node in flow.nodes if node.op == "placeholder"]
    position = capture.input_position(Role.LATENT)
    branches = find_branches(flow, placeholders[position]) if position is not None else []
    groups = group_branches(flow, branches)
    parts = partition(flow, [[branches[i] for i in group] for group in groups])
    streams = chain_streams(flow, branches)
    work = _work_of_sites(flow, branches)
    dependence = _dependence(capture, flow, placeholders)
    blocks = _blocks(flow, branches, groups, parts)
    sites = tuple(
        _site(flow, branch, SiteId(i), BlockId(b), StreamId(streams[i]), work[i])
        for b, group in enumerate(groups)
        for i, branch in ((i, branches[i]) for i in group)
    )
    return ModelStructure(
        inputs=capture.inputs,
        streams=_streams(flow, branches, streams, dependence),
        blocks=blocks,
        sites=sites,
        prologue=_names(flow, parts.prologue),
        epilogue=_names(flow, parts.epilogue),
        grid=_token_grid(placeholders[position], branches) if branches and position is not None else None,
        flops=sum(node_flops(node) for node in flow.nodes),
        bytes=sum(node_bytes(node) for node in flow.nodes),
        dependence=dependence,
    )


def _dependence(capture: Capture, flow: Dataflow, placeholders: Sequence[fx.Node]) -> dict[str, frozenset[Role]]:
    by_role = {
        role: flow.bits(p for p, item in zip(placeholders, capture.inputs, strict=True) if item.role is role)
        for role in Role
    }
    return {
        node.name: frozenset(role for role, bits in by_role.items() if flow.ancestors[node] & bits)
        for node in flow.nodes
    }


def _blocks(
    flow: Dataflow, branches: Sequence[Branch], groups: Sequence[Sequence[int]], parts: Partition
) -> tuple[Block, ...]:
    paths = [block_path(branches[group[0]].add) for group in groups]
    keys = [structure_key(flow.members(bits)) for bits in parts.blocks]
    families = [path.rpartition(".")[0] if path else key for path, key in zip(paths, keys, strict=True)]
    return tuple(
        Block(
            id=BlockId(b),
            path=paths[b],
            sites=tuple(SiteId(i) for i in group),
            kind=keys[b],
            nodes=_names(flow, parts.blocks[b]),
            depth=(families[:b].count(families[b]), families.count(families[b])),
        )
        for b, group in enumerate(groups)
    )


def _site(
    flow: Dataflow, branch: Branch, number: SiteId, block: BlockId, stream: StreamId, work: tuple[float, float]
) -> Site:
    region = list(flow.members(branch.region))
    heaviest = max(region, key=node_flops)
    tokens, token_flops = _token_fact(branch, region)
    shape = tuple(int(size) for size in branch.core.meta["val"].shape)
    return Site(
        id=number,
        block=block,
        name=module_path(heaviest) or heaviest.name,
        kind=branch.kind,
        stream=stream,
        source=branch.stream.name,
        core=branch.core.name,
        update=branch.update.name,
        add=branch.add.name,
        attention=tuple(node.name for node in branch.attention),
        shape=shape,
        itemsize=branch.core.meta["val"].element_size(),
        tokens=tokens,
        flops=round(work[0]),
        token_flops=token_flops,
        bytes=round(work[1]),
    )


def _work_of_sites(flow: Dataflow, branches: Sequence[Branch]) -> list[tuple[float, float]]:
    """Operations and bytes that each site would save; work that several sites share is split evenly between them.

    A node is owned by the sites whose cores it feeds, and by nobody if its value also leaves the branches.
    """
    cores = {branch.core: 1 << i for i, branch in enumerate(branches)}
    elsewhere = 1 << len(branches)
    owners: dict[fx.Node, int] = {}
    work = [(0.0, 0.0)] * len(branches)
    for node in reversed(flow.nodes):
        owner = cores.get(node) or _union(owners[user] for user in node.users) or elsewhere
        owners[node] = elsewhere if node.op == "output" else owner
        if owner & elsewhere or node.op != "call_function":
            continue
        flops, size, count = node_flops(node), node_bytes(node), owner.bit_count()
        for i in range(len(branches)):
            if owner >> i & 1:
                work[i] = work[i][0] + flops / count, work[i][1] + size / count
    return work


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _token_fact(branch: Branch, region: Sequence[fx.Node]) -> tuple[TokenFact, int]:
    """Whether the branch is token-wise, and the operations that then shrink with the number of tokens."""
    rank = branch.stream.meta["val"].ndim
    axis = 0 if rank == 2 else 1
    count = int(branch.stream.meta["val"].shape[axis])
    if rank != 3:
        why = f"the stream has {rank} axes instead of batch, token and channel"
        return TokenFact(TokenWise.NO, axis, count, why), 0
    try:
        axes = token_axes(region, branch.stream, axis)
    except MixesTokens as mixed:
        wise = TokenWise.QUERIES if branch.kind.is_attention and "keys and values" in str(mixed) else TokenWise.NO
        return TokenFact(wise, axis, count, str(mixed)), 0
    if axes.get(branch.core) != axis:
        return TokenFact(TokenWise.NO, axis, count, "the branch ends with its tokens on another axis"), 0
    return TokenFact(TokenWise.YES, axis, count), sum(node_flops(node) for node in axes if node is not branch.stream)


def _streams(
    flow: Dataflow, branches: Sequence[Branch], numbers: Sequence[int], dependence: dict[str, frozenset[Role]]
) -> tuple[Stream, ...]:
    result = []
    for number in sorted(set(numbers)):
        own = [i for i, n in enumerate(numbers) if n == number]
        origin = branches[own[0]].stream
        result.append(
            Stream(
                id=StreamId(number),
                origin=origin.name,
                roles=dependence[origin.name] - {Role.PARAMETER},
                sites=tuple(SiteId(i) for i in own),
                reaches_output=flow.is_ancestor(branches[own[-1]].add, flow.nodes[-1]),
            )
        )
    return tuple(result)


def _token_grid(latent: fx.Node, branches: Sequence[Branch]) -> tuple[int, int] | None:
    """Rows and columns of tokens when the latent is a picture cut into square patches."""
    shape = latent.meta["val"].shape
    axis = 0 if branches[0].stream.meta["val"].ndim == 2 else 1
    tokens = int(branches[0].stream.meta["val"].shape[axis])
    if len(shape) == 4:
        height, width = int(shape[2]), int(shape[3])
        patch = math.isqrt(height * width // tokens) if tokens else 0
        if patch and height // patch * (width // patch) == tokens:
            return height // patch, width // patch
    return None


def _names(flow: Dataflow, bits: int) -> tuple[str, ...]:
    return tuple(node.name for node in flow.members(bits))
