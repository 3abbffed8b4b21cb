"""Small segments for pass tests: models of a few nodes, captured, with one block outlined."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dicompile.analysis import SiteKind, analyse
from dicompile.config import DebugFolder, Settings
from dicompile.passes import (
    InputRef,
    LocalStep,
    OutputRef,
    Pass,
    PassReport,
    Segment,
    SlotRef,
    Value,
    outline,
    rewrite,
)
from dicompile.plan import Score, ScoreBase, SlotKind
from tests.models import Sample, capture, redraw

BATCH, TOKENS, WIDTH, HEADS, WORDS = 2, 16, 8, 2, 5
FULL, REUSE = LocalStep(), LocalStep(weights=(0.0, 1.0))


class Mlp(nn.Module):
    """``x + gate * mlp(norm(x))``: the smallest residual site."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Positioned(nn.Module):
    """An MLP whose branch adds a position table of its own: one row per token, with or without a batch axis."""

    def __init__(self, *leading: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.table = nn.Parameter(torch.ones(*leading, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x + self.table)))


class Modulated(nn.Module):
    """An MLP with shift, scale and gate from one linear layer, in the way of adaLN."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.ada = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.ada(c).chunk(3, dim=-1)
        return x + gate * self.down(F.gelu(self.up(x * (1 + scale) + shift)))


class Attention(nn.Module):
    """``x + attention(x)``; keys and values come from `c` where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        source = x if c is None else c
        query, key, value = self.split(self.query(x)), self.split(self.key(source)), self.split(self.value(source))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(attended.transpose(1, 2).reshape(x.shape))

    def project(self, attended: Tensor) -> Tensor:
        return self.proj(attended)


class Parallel(Attention):
    """Attention and MLP beside each other, projected as one: the single-stream block of FLUX."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def attended(self, x: Tensor, source: Tensor) -> Tensor:
        """Attention of tokens `x` to tokens `source`."""
        query, key, value = self.split(self.query(x)), self.split(self.key(source)), self.split(self.value(source))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)

    def joined(self, x: Tensor, attended: Tensor) -> Tensor:
        """The branch, given what its attention returns."""
        return self.out(torch.cat([attended, F.gelu(self.up(x))], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.joined(x, self.attended(x, x))


class Both(Parallel):
    """Attention, then an MLP, on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def through(self, x: Tensor, source: Tensor) -> Tensor:
        """The stream behind the block for tokens `x` that attend to tokens `source`."""
        x = x + self.proj(self.attended(x, source))
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.through(x, x)


class Folded(Attention):
    """Attention along one axis of a film of four frames; the other axis is folded into the batch."""

    def __init__(self, along_frames: bool) -> None:
        super().__init__()
        self.along_frames = along_frames

    def fold(self, x: Tensor) -> Tensor:
        film = x.view(BATCH, 4, TOKENS // 4, -1)
        film = film.transpose(1, 2) if self.along_frames else film
        return film.reshape(-1, film.shape[2], film.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        if self.along_frames:
            return x.reshape(BATCH, TOKENS // 4, 4, -1).transpose(1, 2).reshape(BATCH, TOKENS, -1)
        return x.reshape(BATCH, TOKENS, -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(self.fold(layer(x))) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.proj(self.unfold(attended))


class Channels(nn.Module):
    """A branch whose output is not contiguous: a convolution over the tokens, with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Chain(nn.Module):
    """Blocks one after the other on a latent that is a token sequence already, ``x: [b, n, d]``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if c is None else block(x, c)
        return x


def chain(*blocks: nn.Module, c: Tensor | None = None) -> Sample:
    """A chain of blocks with inputs for it."""
    inputs = {"x": torch.randn(BATCH, TOKENS, WIDTH)} | ({} if c is None else {"c": c})
    return Sample(redraw(Chain(*blocks)), inputs)


@dataclass(frozen=True)
class Cut:
    """A block as a segment, and the values that enter it when the model runs on its inputs."""

    segment: Segment
    arguments: dict[InputRef, Any]

    def output(self) -> Tensor:
        """The value that leaves the unmodified block."""
        return run_segment(self.segment, self.arguments)[Value(0)]

    def core(self, position: int = 0) -> Tensor:
        """Branch output of a site before its gate, everything computed."""
        return self.peek(self.segment.sites[position].core)

    def update(self, position: int = 0) -> Tensor:
        """Branch output of a site after its gate, everything computed."""
        return self.peek(self.segment.sites[position].update)

    def peek(self, wanted: fx.Node) -> Tensor:
        """Value of a node of the unmodified block."""
        placeholders = (node for node in self.segment.graph.nodes if node.op == "placeholder")
        values = {node: self.arguments[ref] for node, ref in zip(placeholders, self.segment.inputs, strict=True)}
        for node in self.segment.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
        return values[wanted]


def cut(sample: Sample, block: int = 0, *, count: int = 1, with_span: bool = False) -> Cut:
    """Outline blocks of a sample's model as one segment; with the spans of whole blocks as its last sites."""
    captured = capture(sample)
    structure = analyse(captured)
    nodes = {node.name: node for node in captured.graph.nodes}
    found = structure.blocks[block : block + count]
    numbers = [block.id for block in found]
    spans = tuple(span for span in structure.spans if span.kind is SiteKind.BLOCK and span.block in numbers)
    sites = tuple(site for block in found for site in structure.sites_of(block)) + (spans if with_span else ())
    made = outline(captured, structure, [nodes[name] for block in found for name in block.nodes], sites)
    given = {**dict(sample.model.named_parameters()), **dict(sample.model.named_buffers()), **sample.inputs}
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    values = {node: given[item.name] for node, item in zip(inputs, captured.inputs, strict=True)}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return Cut(made.segment, {Value(i): values[nodes[name]] for i, name in enumerate(made.inputs)})


@functools.cache
def mlp_block() -> Cut:
    """An MLP on its own."""
    return cut(chain(Mlp()))


@functools.cache
def modulated_block() -> Cut:
    """An MLP with modulation."""
    return cut(chain(Modulated(), c=torch.randn(BATCH, 1, WIDTH)))


@functools.cache
def self_attention_block() -> Cut:
    """Self-attention on its own."""
    return cut(chain(Attention()))


@functools.cache
def cross_attention_block() -> Cut:
    """Cross-attention that follows another block: the first one's queries are the latent's own."""
    return cut(chain(Attention(), Attention(), c=torch.randn(BATCH, WORDS, WIDTH)), 1)


def rewritten(segment: Segment, steps: Sequence[LocalStep], *passes: Pass, live: Iterable[int] = (0,)) -> Segment:
    """A copy of `segment`, rewritten by `passes` alone."""
    return reported(segment, steps, *passes, live=live)[0]


def reported(
    segment: Segment, steps: Sequence[LocalStep], *passes: Pass, live: Iterable[int] = (0,)
) -> tuple[Segment, list[PassReport]]:
    """The same, with what the passes said."""
    debug = DebugFolder(None)
    result, runs = rewrite(segment, steps, frozenset(live), passes, settings=Settings(), debug=debug, name="test")
    return result, [run.report for run in runs]


SCORE = SlotRef(0, SlotKind.SCORE)
"""Where the first site's score leaves a segment."""


def produce(base: ScoreBase, *, shared: bool = False) -> LocalStep:
    """A step that computes a site and delivers the raw score of its tokens."""
    return LocalStep(produces=Score(base, share_guidance=shared), writes=(SlotKind.SCORE,))


def run_segment(segment: Segment, values: Mapping[InputRef, Any]) -> dict[OutputRef, Tensor]:
    """Run a segment operator by operator; values that it does not ask for are ignored."""
    with torch.no_grad():
        results = segment.graph_module(*[values[ref] for ref in segment.inputs])
    return dict(zip(segment.outputs, results, strict=True))
