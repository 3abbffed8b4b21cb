"""What is known of every site: where it is in the graph, its tokens, its keys and its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from dicompile.analysis.blocks import Partition
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch
from dicompile.analysis.structure import BlockId, Site, SiteId, SiteKind, StreamId
from dicompile.analysis.token_work import token_work
from dicompile.analysis.transport import nearest_streams
from dicompile.analysis.work import Work, work_of_branches
from dicompile.nodes import node_argument
from dicompile.ops.collectives import find_sum, ranks_of
from dicompile.ops.cost import score_work
from dicompile.text import module_path

aten = torch.ops.aten


def make_sites(
    flow: Dataflow,
    branches: Sequence[Branch],
    groups: Sequence[Sequence[int]],
    parts: Partition,
    streams: Sequence[int],
) -> tuple[Site, ...]:
    """The sites of all blocks, in execution order.

    Args:
        flow: of the graph.
        branches: all branches of the model.
        groups: numbers of the branches of each block.
        parts: nodes of each block.
        streams: the stream of every branch.
    """
    work = work_of_branches(flow, branches)
    stream_nodes = flow.bits(node for branch in branches for node in (branch.add, branch.source))
    return tuple(
        _at_hand(
            _site(flow, branches[i], SiteId(i), BlockId(b), StreamId(streams[i]), work[i], stream_nodes),
            elsewhere=bool(flow.bits(branches[i].attention) & ~parts.blocks[b]),
        )
        for b, group in enumerate(groups)
        for i in group
    )


def _site(
    flow: Dataflow, branch: Branch, number: SiteId, block: BlockId, stream: StreamId, work: Work, streams: int
) -> Site:
    region = list(flow.members(branch.region))
    heaviest = max(region, key=lambda node: flow.work[node][0])
    tokens = token_work(flow, branch.source, branch.core, region)
    score_flops, score_bytes = score_work(branch.attention[0]) if branch.attention else (0, 0)
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
        tokens=tokens.fact,
        flops=round(work.core[0]),
        token_flops=min(tokens.flops, max(0, round(work.core[0]) - tokens.key_flops)),  # joint attention is shared work
        bytes=round(work.core[1]),
        attention_flops=round(work.attention[0]),
        attention_shape=tuple(int(size) for size in branch.attention[0].meta["val"].shape) if branch.attention else (),
        attention_itemsize=branch.attention[0].meta["val"].element_size() if branch.attention else 0,
        update_itemsize=branch.update.meta["val"].element_size(),
        key_flops=tokens.key_flops,
        keys=own_keys(flow, branch, streams),
        score_flops=score_flops,
        score_bytes=score_bytes,
        ranks=_ranks(branch, region),
    )


def _ranks(branch: Branch, region: Sequence[fx.Node]) -> int:
    """Number of ranks each of which has some heads of a branch's attention, or does their work."""
    if not branch.attention:
        return 1
    summed = find_sum(region)
    return max(map(ranks_of, branch.attention)) if summed is None else summed[0]


def _at_hand(site: Site, *, elsewhere: bool) -> Site:
    """The site without its attention, where another part of the graph computes that, which cannot store it."""
    if not elsewhere:
        return site
    return replace(site, attention=(), tokens=replace(site.tokens, stored=False), keys=(0, 0))


def own_keys(flow: Dataflow, branch: Branch, streams: int) -> tuple[int, int]:
    """First of the attention's keys that belong to the branch's own tokens, and their number; (0, 0) if none do.

    None do, either, where the attention is over some of the samples, or its own tokens are not all among the keys.

    Args:
        flow: of the graph.
        branch: its attention may join several streams.
        streams: bit set of all stream values.
    """
    if len(branch.attention) != 1 or branch.kind in (SiteKind.MLP, SiteKind.CROSS_ATTENTION):
        return 0, 0
    attended, node = branch.attention[0].meta["val"], node_argument(branch.attention[0], 1)
    value, stream = node.meta["val"], branch.source.meta["val"]
    total = int(value.shape[-2])
    samples, tokens = (1, stream.shape[0]) if stream.ndim == 2 else (stream.shape[0], math.prod(stream.shape[1:-1]))
    # Attention along one axis of a film folds the other into the batch.
    if attended.shape[-2] == total and value.shape[0] * total == samples * tokens:
        return 0, total
    own = flow.bits([branch.source])
    while node.target is not aten.cat.default or total not in node.meta["val"].shape:
        parents = [p for p in node.all_input_nodes if flow.is_ancestor(branch.source, p) and p is not branch.source]
        if not parents:
            return 0, 0
        node = parents[0]
    first = 0
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = node.args[1] if len(node.args) > 1 else 0
    for part in parts:
        size = int(part.meta["val"].shape[dim])
        if nearest_streams(flow, part, streams) & own:
            return (first, size) if (value.shape[0], size) == (samples, tokens) else (0, 0)
        first += size
    return 0, 0
