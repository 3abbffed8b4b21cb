"""Analysis: captured graph -> `ModelStructure`. Reads the graph, edits nothing, knows no class or attribute names."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from dicompile.analysis.blocks import Partition, group_branches, partition, structure_key
from dicompile.analysis.cost import ATTENTION, node_bytes, node_flops
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.layout import Layout
from dicompile.analysis.residual import Branch, chain_streams, find_branches, own_keys
from dicompile.analysis.spans import find_runs, last_adds
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
from dicompile.analysis.tokens import Carried, MixesTokens, Mixing, token_layouts
from dicompile.capture import Capture, Role
from dicompile.nodes import node_argument
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
    samples = flow.bits(
        node
        for node, item in zip(placeholders, capture.inputs, strict=True)
        if item.role in (Role.LATENT, Role.CONDITIONING)
    )
    branches = find_branches(flow, placeholders[position], samples) if position is not None else []
    groups, paths = group_branches(flow, branches)
    parts = partition(flow, [[branches[i] for i in group] for group in groups])
    streams = chain_streams(flow, branches)
    work = _work_of_sites(flow, branches)
    dependence = _dependence(capture, flow, placeholders)
    stream_nodes = flow.bits(node for branch in branches for node in (branch.add, branch.source))
    blocks = _blocks(flow, groups, paths, parts)
    sites = tuple(
        _at_hand(
            _site(flow, branch, SiteId(i), BlockId(b), StreamId(streams[i]), work[i], stream_nodes),
            _names(flow, flow.bits(branch.attention) & ~parts.blocks[b]),
        )
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
        spans=_spans(flow, branches, sites, groups),
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
    flow: Dataflow, groups: Sequence[Sequence[int]], paths: Sequence[str], parts: Partition
) -> tuple[Block, ...]:
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


def _at_hand(site: Site, elsewhere: Sequence[str]) -> Site:
    """The site without its attention, where another part of the graph computes that, which cannot store it."""
    if not elsewhere:
        return site
    return replace(site, attention=(), tokens=replace(site.tokens, stored=False), keys=(0, 0))


def _site(
    flow: Dataflow, branch: Branch, number: SiteId, block: BlockId, stream: StreamId, work: Work, streams: int
) -> Site:
    region = list(flow.members(branch.region))
    heaviest = max(region, key=node_flops)
    tokens, token_flops, key_flops = _token_fact(flow, branch.source, branch.core, region)
    return Site(
        id=number,
        block=block,
        name=module_path(heaviest) or heaviest.name,
        kind=branch.kind,
        stream=stream,
        source=branch.source.name,
        core=branch.core.name,
        update=branch.update.name,
        add=branch.add.name,
        attention=tuple(node.name for node in branch.attention),
        shape=tuple(int(size) for size in branch.core.meta["val"].shape),
        itemsize=branch.core.meta["val"].element_size(),
        tokens=tokens,
        flops=round(work.core[0]),
        token_flops=min(token_flops, max(0, round(work.core[0]) - key_flops)),  # joint attention is shared work
        bytes=round(work.core[1]),
        attention_flops=round(work.attention[0]),
        attention_shape=tuple(int(size) for size in branch.attention[0].meta["val"].shape) if branch.attention else (),
        attention_itemsize=branch.attention[0].meta["val"].element_size() if branch.attention else 0,
        update_itemsize=branch.update.meta["val"].element_size(),
        key_flops=key_flops,
        keys=own_keys(flow, branch, streams),
    )


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes that a site would save: all of it, and the part up to its attention's output."""

    core: tuple[float, float]
    attention: tuple[float, float]


def _work_of_sites(flow: Dataflow, branches: Sequence[Branch]) -> list[Work]:
    cores = owned_work(flow, [branch.core for branch in branches])
    # Where a stream ends in keys, as that of text does in the last block, its last branches only serve this attention.
    ends = [branch.attention[0] if len(branch.attention) == 1 else None for branch in branches]
    attention = owned_work(flow, ends, [branch.add for branch in branches])
    return [Work(core, part) for core, part in zip(cores, attention, strict=True)]


def owned_work(
    flow: Dataflow, ends: Sequence[fx.Node | None], starts: Iterable[fx.Node] = ()
) -> list[tuple[float, float]]:
    """Operations and bytes that only serve each end; work that several ends share is split evenly between them.

    A node is owned by the ends that it feeds, and by nobody if its value also goes elsewhere, or is one of `starts`.
    """
    owned: dict[fx.Node, int] = {}
    for i, end in enumerate(ends):
        if end is not None:
            owned[end] = owned.get(end, 0) | 1 << i
    elsewhere = 1 << len(ends)
    outside = set(starts)
    owners: dict[fx.Node, int] = {}
    work = [(0.0, 0.0)] * len(ends)
    for node in reversed(flow.nodes):
        owner = owned.get(node) or _union(owners[user] for user in node.users) or elsewhere
        stops = node.op == "output" or (node in outside and node not in owned)
        owners[node] = elsewhere if stops else owner
        if owners[node] & elsewhere or node.op != "call_function":
            continue
        flops, size, count = node_flops(node), node_bytes(node), owner.bit_count()
        for i in range(len(ends)):
            if owner >> i & 1:
                work[i] = work[i][0] + flops / count, work[i][1] + size / count
    return work


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _token_fact(
    flow: Dataflow, stream: fx.Node, core: fx.Node, region: Sequence[fx.Node]
) -> tuple[TokenFact, int, int]:
    """Whether a branch is token-wise, the operations that then shrink with its tokens, and those of its keys."""
    shape = stream.meta["val"].shape
    axis = 0 if len(shape) == 2 else 1
    count = int(shape[axis])
    if len(shape) != 3 or count == 1:
        has = f"{len(shape)} axes instead of batch, token and channel" if count > 1 else "a single token"
        why = f"the stream has {has}"
        return TokenFact(TokenWise.NO, axis, count, why), 0, 0
    to_core = [node for node in region if flow.is_ancestor(node, core)]
    layout = Layout.of_stream(shape, [axis])
    axes: dict[Mixing, dict[fx.Node, Carried]] = {}
    refusals: dict[Mixing, str] = {}
    for mixing in Mixing:
        try:
            found = token_layouts(to_core, stream, layout, mixing)
        except MixesTokens as mixed:
            refusals[mixing] = str(mixed)
            continue
        if core in found and found[core].layout == layout:
            axes[mixing] = found
        else:
            refusals[mixing] = "the branch ends with its tokens on another axis"
    keys = [node_argument(node, i) for node in to_core if node.target is ATTENTION for i in (1, 2)]
    for_keys = {node for node in to_core if any(flow.is_ancestor(node, key) for key in keys)}
    stored = Mixing.STORED in axes and any(node.target is ATTENTION for node in to_core)
    if Mixing.FORBIDDEN in axes:
        fact, shrinking = TokenFact(TokenWise.YES, axis, count, stored=stored), axes[Mixing.FORBIDDEN]
        for_keys = set()
    elif Mixing.QUERIES in axes:
        fact = TokenFact(TokenWise.QUERIES, axis, count, refusals[Mixing.FORBIDDEN], stored)
        shrinking = axes[Mixing.QUERIES]
    else:
        fact = TokenFact(TokenWise.NO, axis, count, refusals[Mixing.QUERIES], stored)
        shrinking = axes.get(Mixing.STORED, {})
        for_keys = for_keys if stored else set()
    if fact.wise is TokenWise.NO and stored:
        shrinking = {node: carried for node, carried in shrinking.items() if node.target is not ATTENTION}
    token_flops = sum(
        node_flops(node) * carried.layout.token_share
        for node, carried in shrinking.items()
        if node is not stream and node not in for_keys
    )
    return fact, round(token_flops), sum(node_flops(node) for node in for_keys)


def _spans(
    flow: Dataflow, branches: Sequence[Branch], sites: Sequence[Site], groups: Sequence[Sequence[int]]
) -> tuple[Site, ...]:
    """Spans of every block, then of the stack."""
    found = [(SiteKind.BLOCK, run) for group in groups for run in find_runs(branches, sites, group)]
    found += [(SiteKind.STACK, run) for run in find_runs(branches, sites, range(len(branches)))]
    last = last_adds(flow, branches)
    result: list[Site] = []
    for kind in (SiteKind.BLOCK, SiteKind.STACK):
        runs = [run for k, run in found if k is kind]
        work = owned_work(flow, [branches[r[-1]].add for r in runs], [branches[r[0]].stream for r in runs])
        for run, own in zip(runs, work, strict=True):
            start, end = branches[run[0]].stream, branches[run[-1]].add
            region = list(flow.members(flow.between(start, end)))
            tokens, token_flops, key_flops = _token_fact(flow, start, end, region)
            if kind is SiteKind.STACK:
                why = "tokens of later blocks attend to all tokens of earlier ones"
                tokens, token_flops, key_flops = TokenFact(TokenWise.NO, tokens.axis, tokens.count, why), 0, 0
            elif any(sites[i].kind is SiteKind.JOINT_ATTENTION for i in run):
                why = "another stream needs the same attention over all tokens"
                tokens, token_flops, key_flops = TokenFact(TokenWise.NO, tokens.axis, tokens.count, why), 0, 0
            first, final = sites[run[0]], sites[run[-1]]
            result.append(
                replace(
                    final,
                    id=SiteId(len(sites) + len(result)),
                    name=" .. ".join(dict.fromkeys((first.name, final.name))),
                    kind=kind,
                    source=start.name,
                    core=end.name,
                    update=end.name,
                    add=end.name,
                    attention=(),
                    shape=tuple(int(size) for size in end.meta["val"].shape),
                    itemsize=end.meta["val"].element_size(),
                    update_itemsize=end.meta["val"].element_size(),
                    tokens=tokens,
                    flops=round(own[0]),
                    token_flops=token_flops,
                    bytes=round(own[1]),
                    attention_flops=sum(node_flops(node) for node in region if node.target is ATTENTION),
                    key_flops=key_flops,
                    keys=(0, 0),
                    inside=tuple(SiteId(i) for i in run),
                    is_last=end in last,
                )
            )
    return tuple(result)


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


def _token_grid(latent: fx.Node, branches: Sequence[Branch]) -> tuple[int, ...] | None:
    """Tokens along each axis when the latent is a picture or a film cut into square patches."""
    shape = [int(size) for size in latent.meta["val"].shape]
    axis = 0 if branches[0].stream.meta["val"].ndim == 2 else 1
    tokens = int(branches[0].stream.meta["val"].shape[axis])
    if len(shape) not in (4, 5) or not tokens:
        return None
    height, width = shape[-2:]
    frames = shape[2] if len(shape) == 5 else 1
    for group in range(1, frames + 1):
        patch = math.isqrt(frames // group * height * width // tokens)
        if patch and frames // group * (height // patch) * (width // patch) == tokens:
            picture = (height // patch, width // patch)
            return picture if len(shape) == 4 else (frames // group, *picture)
    return None


def _names(flow: Dataflow, bits: int) -> tuple[str, ...]:
    return tuple(node.name for node in flow.members(bits))
