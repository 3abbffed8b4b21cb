"""Pieces: where the steps of a plan cut a captured model into segments."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from dicompile.analysis import Block, ModelStructure, Site, SiteKind, Span
from dicompile.analysis.blocks import structure_key
from dicompile.capture import Capture
from dicompile.lower.hoist import Hoist, Invariants
from dicompile.nodes import results_of, walk
from dicompile.ops.kinds import is_heavy
from dicompile.passes import Outline, outline
from dicompile.plan import SiteStep, Slot, SlotKind, StepPlan
from dicompile.text import layout_text

RUNS = (8, 4, 2, 1)
"""Numbers of blocks of a short run that only reuse, and run as one segment; no segment is longer than the first."""
_MOST_WAYS = 8
"""Ways to cut what lies before a block that are followed at once."""


@dataclass(frozen=True)
class Piece:
    """A segment of the unmodified model.

    Attributes:
        name: for reports.
        key: under which it shares variants.
        outline: what it computes, and of what.
        sites: that it has.
        block: number of its first block; None where it has none.
    """

    name: str
    key: tuple[object, ...]
    outline: Outline
    sites: tuple[Site, ...]
    block: int | None = None


class Part(NamedTuple):
    """What a part of a step runs.

    Attributes:
        step: what its sites do.
        pieces: in order.
    """

    step: StepPlan
    pieces: list[Piece]


class Pieces:
    """Pieces of one captured model, whatever the policy; made when a step asks for them.

    Args:
        capture: the model.
        structure: its structure.
        hoist: what is no part of them, since it is computed outside of the steps.
    """

    def __init__(self, capture: Capture, structure: ModelStructure, hoist: Hoist = Hoist.NOTHING) -> None:
        self.capture, self.structure = capture, structure
        self.invariants = Invariants(capture, structure, hoist)
        self._nodes = {node.name: node for node in capture.graph.nodes}
        self._order = {node: i for i, node in enumerate(capture.graph.nodes)}
        self._prologue, self._epilogue = frozenset(structure.prologue), frozenset(structure.epilogue)
        sites = (name for s in structure.everything for name in (s.source, s.core, s.update, s.add, *s.attention))
        results = [node for node in results_of(capture.graph) if isinstance(node, fx.Node)]
        self._steps = self.invariants.left([*results, *(self._nodes[name] for name in sites)])
        self._streams = _token_by_token(capture, structure, self.invariants.paces)
        self._before = {block.id: found for block in structure.blocks if (found := self._made_for(block))}
        self._cut = functools.cache(_cut)
        self._pieces: dict[object, Piece] = {}
        self._segments: dict[object, Outline] = {}

    def of_step(self, step: StepPlan) -> list[Piece]:
        """Pieces that a step runs, in order: prologue, blocks, epilogue."""
        structure = self.structure
        active = [span for span in structure.spans if not self.is_at_hand(span) and not _is_idle(step.sites[span.id])]

        def reuses(block: Block) -> bool:
            spans = [span.id for span in active if span.kind is SiteKind.BLOCK and span.block == block.id]
            return not any(step.sites[i].action.computes for i in (*block.sites, *spans))

        verified = None if step.verified is None else structure.everything[step.verified].block
        runs: list[list[int]] = []
        for (is_reused, _), alike in itertools.groupby(structure.blocks, lambda b: (reuses(b), b.id == verified)):
            numbers = [int(block.id) for block in alike]
            lengths = self._cut(tuple(self._kinds[i] for i in numbers)) if is_reused else [1] * len(numbers)
            ends = itertools.accumulate(lengths)
            runs += [numbers[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        at_the_start, at_the_end = (
            tuple(span for span in active if span.add in nodes) for nodes in (self._prologue, self._epilogue)
        )
        of_blocks = [span for span in active if span not in (*at_the_start, *at_the_end)]
        pieces = [self._piece("prologue", structure.prologue, at_the_start)]
        for run in runs:
            blocks = [structure.blocks[i] for i in run]
            name = f"block{run[0]}" if len(run) == 1 else f"blocks{run[0]}-{run[-1]}"
            sites = tuple(site for block in blocks for site in structure.sites_of(block))
            sites += tuple(span for span in of_blocks if span.block in run)
            nodes = tuple(node for block in blocks for node in block.nodes)
            if len(run) == 1 and (before := self._before.get(blocks[0].id)):
                pieces.append(self._piece(f"before-{name}", before, (), run[0]))
                nodes = tuple(node for node in nodes if node not in before)
            pieces.append(self._piece(name, nodes, sites, run[0]))
        pieces.append(self._piece("epilogue", structure.epilogue, at_the_end))
        return [piece for piece in pieces if piece.outline.outputs]

    @functools.cached_property
    def _kinds(self) -> tuple[str, ...]:
        """What code each block has, as a part of a step."""
        members = ([self._nodes[n] for n in block.nodes if n in self._steps] for block in self.structure.blocks)
        return tuple(structure_key(nodes, self._streams) for nodes in members)

    def is_at_hand(self, span: Span) -> bool:
        """True if no piece computes the value of a probe: it is an input, or made outside of the steps."""
        return span.is_given or (span.kind is SiteKind.PROBE and span.core in self.invariants.paces)

    def around_gate(self, step: StepPlan) -> tuple[Part, Part, Part]:
        """What a gated step runs before its gate decides, where it recalls, and where it does not.

        What is watched leaves the first part, and no other.
        """
        probe = self.structure.probe
        assert step.full is not None
        watched, ways = step.full, [step, step.full]
        for span in filter(None, (probe, self.structure.trace)):
            watched = watched.writing(span.id, (Slot.of(span.id, SlotKind.VALUE),))
            ways = [way.writing(span.id, ()) for way in ways]
        recalled, full = ((way, self.of_step(way)) for way in ways)
        if probe is None or self.is_at_hand(probe):
            return Part(watched, []), Part(*recalled), Part(*full)
        if probe.inside:
            pieces = self.of_step(watched)
            later = (i for i, piece in enumerate(pieces) if piece.block is not None and piece.block > probe.block)
            before = pieces[: next(later)]
            rest = [
                Part(way, [p for i, p in enumerate(pieces) if i >= len(before) or _ends_recalled(way, p)])
                for way, pieces in (recalled, full)
            ]
        else:
            before = [self._piece("probe", (*self.structure.prologue, *self._leading_to(probe.core)), (probe,))]
            rest = [
                Part(way, [piece for piece in pieces if piece.name != "prologue"]) for way, pieces in (recalled, full)
            ]
        return Part(watched, before), rest[0], rest[1]

    def _made_for(self, block: Block) -> tuple[str, ...]:
        """Nodes of a block that only make the stream that its branches are added to, as FLUX joins its two.

        Without them the block is like those after it.
        """
        sites, inside = self.structure.sites_of(block), set(block.nodes)
        own = {name for site in sites for name in (site.core, site.update, site.add)}
        sources = [self._nodes[site.source] for site in sites if site.source in inside - own]
        found = list(walk(sources, lambda node: [n for n in node.all_input_nodes if n.name in inside]))
        names = {node.name for node in found}
        return () if names & own or any(map(is_heavy, found)) else tuple(n for n in block.nodes if n in names)

    def _leading_to(self, name: str) -> list[str]:
        """Calls that a value is computed by."""
        return [node.name for node in walk([self._nodes[name]]) if node.op == "call_function"]

    def _piece(self, name: str, nodes: tuple[str, ...], sites: tuple[Site, ...], block: int | None = None) -> Piece:
        cut = (nodes, tuple(site.id for site in sites))
        if cut not in self._pieces:
            members = sorted((self._nodes[n] for n in nodes if n in self._steps), key=self._order.__getitem__)
            made = outline(self.capture, self.structure, members, sites, self._streams)
            number = {node.name: i for i, node in enumerate(members)}
            entry = number | {name: ~i for i, name in enumerate(made.inputs)}
            key = (
                structure_key(members, self._streams),
                tuple(layout_text(self._streams.get(name, self._nodes[name].meta["val"])) for name in made.inputs),
                tuple(number[name] for name in made.outputs),
                tuple(made.segment.layouts.items()),
                tuple(
                    (
                        site.kind, entry[site.source], number[site.core], number[site.update], number[site.add],
                        *(number[name] for name in site.attention), site.keys, site.tokens.axis, site.tokens.count,
                        site.picture if isinstance(site, Span) else (0, 0),
                    )
                    for site in sites
                ),
                self.structure.grid,
            )  # fmt: skip
            shared = self._segments.setdefault(key, made)
            made = Outline(shared.segment, made.inputs, made.outputs)
            self._pieces[cut] = Piece(name, key, made, sites, block)
        return self._pieces[cut]


def _token_by_token(capture: Capture, structure: ModelStructure, hoisted: Container[str]) -> dict[str, Tensor]:
    """Streams that lie in memory in another order, as pieces hand them over: token by token.

    What a convolution makes of patches lies channel by channel. The first block would need code of its own for that, of
    every kind, where it costs nothing to write it down like all other streams.
    """
    named = {node.name: node for node in capture.graph.nodes}
    shapes = {named[site.source].meta["val"].shape for site in structure.sites}
    parts = (structure.prologue, *(block.nodes for block in structure.blocks), structure.epilogue)
    part = {name: number for number, names in enumerate(parts) for name in names}
    results = results_of(capture.graph)  # whoever called the model gets them as it makes them
    found = {}
    for name, node in named.items():
        value = node.meta.get("val")
        is_made_here = name in part and name not in hoisted and node not in results
        if not is_made_here or not isinstance(value, Tensor) or value.shape not in shapes:
            continue
        if not value.is_contiguous() and any(part.get(user.name) != part[name] for user in node.users):
            with capture.fake_mode:
                found[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
    return found


def _cut(kinds: tuple[str, ...]) -> tuple[int, ...]:
    """Lengths of the parts of a run of blocks, so that runs of any length share a few variants.

    A short run is cut into `RUNS`. A long one has as few parts as can be, and then as few different ones; among those
    parts of lengths in `RUNS` go first, since other runs have them, and then short ones. They are found block by block:
    of all ways to cut what lies before, the best few are looked at.

    Args:
        kinds: of its blocks; blocks of a kind have equal code.
    """
    longest = RUNS[0]
    if len(kinds) <= longest:
        lengths, rest = [], len(kinds)
        while rest:
            lengths.append(next(length for length in RUNS if length <= rest))
            rest -= lengths[-1]
        return tuple(lengths)

    def rank(way: _Way) -> tuple[object, ...]:
        fewest = len(way.lengths) + math.ceil((len(kinds) - sum(way.lengths)) / longest)
        others = sum(len(part) not in RUNS for part in way.parts)
        return fewest, len(way.parts), others, sum(map(len, way.parts)), way.lengths

    ways = {0: [_Way((), frozenset())]}
    for end in range(1, len(kinds) + 1):
        found = {
            _Way((*way.lengths, end - start), way.parts | {kinds[start:end]})
            for start in range(max(0, end - longest), end)
            for way in ways[start]
        }
        ways[end] = sorted(found, key=rank)[:_MOST_WAYS]
    return ways[len(kinds)][0].lengths


class _Way(NamedTuple):
    """How a run may be cut: lengths of its parts, and the different parts among them."""

    lengths: tuple[int, ...]
    parts: frozenset[tuple[str, ...]]


def _ends_recalled(step: StepPlan, piece: Piece) -> bool:
    """True if a span ends in a piece that is recalled, although what it covers may have run to be watched."""
    actions = (step.sites[site.id].action for site in piece.sites if site.kind.is_span)
    return any(not (action.computes or action.is_skip) for action in actions)


def _is_idle(step: SiteStep) -> bool:
    """True for a span of which nothing is reused or stored: its sites say it all."""
    return (step.action.is_full or step.action.is_skip) and not step.writes
