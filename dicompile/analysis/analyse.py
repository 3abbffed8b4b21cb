"""The flow of the analysis: branches, the blocks they form, their streams, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from dicompile.analysis.blocks import group_branches, make_blocks, partition
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.invariants import find_invariants
from dicompile.analysis.residual import Branch, find_branches
from dicompile.analysis.sites import make_sites
from dicompile.analysis.spans import spans_of_blocks, spans_of_trunk
from dicompile.analysis.streams import chain_streams, make_streams
from dicompile.analysis.structure import WHOLE, ModelStructure, Pace, SiteId, Trunk
from dicompile.analysis.token_work import token_axis
from dicompile.capture import Capture, Role


def analyse(capture: Capture, trunk: Trunk = WHOLE) -> ModelStructure:
    """Find streams, sites, blocks, token axes, dependence and cost of a captured model.

    Args:
        capture: the model.
        trunk: which blocks the spans of the stack cover, and what is watched.
    """
    return Analysis(capture).structure(trunk)


class Analysis:
    """What is found in a captured model: its structure for any trunk, of which only the spans of the stack differ.

    Args:
        capture: the model.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.flow = flow = Dataflow(capture.graph)
        placeholders = [node for node in flow.nodes if node.op == "placeholder"]
        by_role = {
            role: flow.bits(p for p, item in zip(placeholders, capture.inputs, strict=True) if item.role is role)
            for role in Role
        }
        self.latent, self.timestep = (
            None if position is None else placeholders[position]
            for position in map(capture.input_position, (Role.LATENT, Role.TIMESTEP))
        )
        latent = self.latent
        samples = by_role[Role.LATENT] | by_role[Role.CONDITIONING]
        self.branches = branches = find_branches(flow, latent, samples) if latent is not None else []
        self.groups, paths = group_branches(flow, branches)
        parts = partition(flow, [[branches[i] for i in group] for group in self.groups])
        streams = chain_streams(branches)
        sites = make_sites(flow, branches, self.groups, parts, streams)
        dependence = {
            node.name: frozenset(role for role, bits in by_role.items() if flow.ancestors[node] & bits)
            for node in flow.nodes
        }
        invariants = find_invariants(flow, capture, sites)
        self._without_trunk = ModelStructure(
            inputs=capture.inputs,
            streams=make_streams(flow, branches, streams, dependence),
            blocks=make_blocks(flow, self.groups, paths, parts),
            sites=sites,
            prologue=flow.names(parts.prologue),
            epilogue=flow.names(parts.epilogue),
            grid=_token_grid(latent, branches) if latent is not None and branches else None,
            flops=sum(flops for flops, _ in flow.work.values()),
            bytes=sum(size for _, size in flow.work.values()),
            dependence=dependence,
            spans=spans_of_blocks(flow, branches, sites, self.groups),
            invariants=invariants,
            invariant_flops={
                pace: sum(flops for node, (flops, _) in flow.work.items() if invariants.get(node.name) is pace)
                for pace in Pace
            },
        )
        self._structures: dict[Trunk, ModelStructure] = {}

    def structure(self, trunk: Trunk = WHOLE) -> ModelStructure:
        """All of it, with the spans of a trunk."""
        if trunk not in self._structures:
            known = self._without_trunk
            number = SiteId(len(known.everything))
            given = self.latent, self.timestep
            spans = spans_of_trunk(self.flow, self.branches, known.sites, self.groups, number, given, trunk)
            self._structures[trunk] = replace(known, spans=(*known.spans, *spans), trunk=trunk)
        return self._structures[trunk]


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
