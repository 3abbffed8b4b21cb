"""The flow of the analysis: branches, the blocks they form, their streams, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from dicompile.analysis.blocks import group_branches, make_blocks, partition
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.invariants import find_invariants
from dicompile.analysis.residual import Branch, find_branches
from dicompile.analysis.sites import make_sites
from dicompile.analysis.spans import make_spans
from dicompile.analysis.streams import chain_streams, make_streams
from dicompile.analysis.structure import WHOLE, ModelStructure, Pace, Trunk
from dicompile.analysis.token_work import token_axis
from dicompile.capture import Capture, Role


def analyse(capture: Capture, trunk: Trunk = WHOLE) -> ModelStructure:
    """Find streams, sites, blocks, token axes, dependence and cost of a captured model.

    Args:
        capture: the model.
        trunk: which blocks the spans of the stack cover, and what is watched.
    """
    flow = Dataflow(capture.graph)
    placeholders = [node for node in flow.nodes if node.op == "placeholder"]
    by_role = {
        role: flow.bits(p for p, item in zip(placeholders, capture.inputs, strict=True) if item.role is role)
        for role in Role
    }
    position = capture.input_position(Role.LATENT)
    latent = placeholders[position] if position is not None else None
    samples = by_role[Role.LATENT] | by_role[Role.CONDITIONING]
    branches = find_branches(flow, latent, samples) if latent is not None else []
    groups, paths = group_branches(flow, branches)
    parts = partition(flow, [[branches[i] for i in group] for group in groups])
    streams = chain_streams(branches)
    sites = make_sites(flow, branches, groups, parts, streams)
    dependence = {
        node.name: frozenset(role for role, bits in by_role.items() if flow.ancestors[node] & bits)
        for node in flow.nodes
    }
    invariants = find_invariants(flow, capture, sites)
    return ModelStructure(
        inputs=capture.inputs,
        streams=make_streams(flow, branches, streams, dependence),
        blocks=make_blocks(flow, groups, paths, parts),
        sites=sites,
        prologue=flow.names(parts.prologue),
        epilogue=flow.names(parts.epilogue),
        grid=_token_grid(latent, branches) if latent is not None and branches else None,
        flops=sum(flops for flops, _ in flow.work.values()),
        bytes=sum(size for _, size in flow.work.values()),
        dependence=dependence,
        spans=make_spans(flow, branches, sites, groups, latent, trunk),
        invariants=invariants,
        invariant_flops={
            pace: sum(flops for node, (flops, _) in flow.work.items() if invariants.get(node.name) is pace)
            for pace in Pace
        },
        trunk=trunk,
    )


def _token_grid(latent: fx.Node, branches: Sequence[Branch]) -> tuple[int, ...] | None:
    """Tokens along each axis when the latent is a picture or a film cut into square patches."""
    shape = [int(size) for size in latent.meta["val"].shape]
    stream = branches[0].stream.meta["val"].shape
    tokens = int(stream[token_axis(stream)])
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
