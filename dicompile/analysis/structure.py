"""What a model is, as frozen printable data: the contract between analysis and everything after it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import NewType

from dicompile.capture import Input, Role

SiteId = NewType("SiteId", int)
BlockId = NewType("BlockId", int)
StreamId = NewType("StreamId", int)


class SiteKind(enum.Enum):
    """What a residual branch does."""

    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    JOINT_ATTENTION = "joint-attention"
    MLP = "mlp"
    PARALLEL = "parallel"
    UNKNOWN = "unknown"
    """It has an operator of another library of which nobody said what it does; see `dicompile.register_operator`."""

    BLOCK = "block"
    """A span: everything one block adds to a stream."""

    STACK = "stack"
    """A span: everything all blocks add to a stream, or those of a `Trunk`."""

    MODEL = "model"
    """A span: everything the model adds to its latent; only where a `Trunk` asks for it."""

    PROBE = "probe"
    """A span that is only watched, see `Trunk`."""

    TRACE = "trace"
    """A span that is only held against itself at earlier steps, see `Trunk`."""

    @property
    def is_attention(self) -> bool:
        """True if the branch contains attention."""
        return self in (SiteKind.SELF_ATTENTION, SiteKind.CROSS_ATTENTION, SiteKind.JOINT_ATTENTION, SiteKind.PARALLEL)

    @property
    def is_span(self) -> bool:
        """True for runs of sites."""
        return self in _SPANS

    @property
    def is_watched(self) -> bool:
        """True for spans that are never recalled."""
        return self in (SiteKind.PROBE, SiteKind.TRACE)


_SPANS = frozenset({SiteKind.BLOCK, SiteKind.STACK, SiteKind.MODEL, SiteKind.PROBE, SiteKind.TRACE})


class Pace(enum.Enum):
    """How often a value that does not depend on the latent changes."""

    GENERATION = "once per generation"
    STEP = "once per step of the schedule"


class Probe(enum.Enum):
    """A value early in the model, from which it is told how far everything after it has drifted."""

    RESIDUAL = "residual"
    """What the first blocks add to the latent's stream."""

    STREAM = "stream"
    """That stream behind them."""

    MODULATED = "modulated"
    """What enters the first product of the first branch on the latent's stream: normalised and modulated tokens."""

    MODULATION = "modulation"
    """The product that makes scale and shift of that input of the timestep, and of what else goes into it."""

    EMBEDDING = "embedding"
    """What goes into that product, before its activation: the embedding of the timestep."""

    LATENT = "latent"
    """The latent itself: nothing of the model runs before a gate has decided."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """Which blocks the spans of the stack cover, and what is watched to tell whether they have to run.

    Attributes:
        before: blocks at the start that are no part of them.
        after: blocks at the end that are not.
        probe: see `Probe`; None where nothing is watched.
        model: whether there is a span of the whole model.
        watched: how many blocks at the start the probe goes through; 0 for those that are no part of the stack.
        traces: whether what these blocks add is kept from one full step to the next.
    """

    before: int = 0
    after: int = 0
    probe: Probe | None = None
    model: bool = False
    watched: int = 0
    traces: bool = False


WHOLE = Trunk()


class TokenWise(enum.Enum):
    """Which part of a branch can be recomputed for a subset of its tokens."""

    YES = "yes"
    QUERIES = "queries only"
    NO = "no"


@dataclass(frozen=True, slots=True)
class TokenFact:
    """Whether a branch can be refreshed token by token, and what forbids it otherwise.

    Attributes:
        wise: see `TokenWise`.
        axis: token axis of the residual stream.
        count: number of tokens.
        reason: operator and module path that mixes tokens; empty when nothing does.
        stored: True if it can, too, while the output of its attention is read from a slot.
    """

    wise: TokenWise
    axis: int
    count: int
    reason: str = ""
    stored: bool = False

    def __str__(self) -> str:
        return self.wise.value + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Site:
    """One cacheable residual branch, ``stream + gate * core``. Node names refer to the captured graph.

    Attributes:
        id: number in execution order.
        block: block it belongs to.
        name: module path of the heaviest operator of the branch.
        kind: see `SiteKind`.
        stream: residual stream it adds to.
        source: node of the stream value that the branch reads.
        core: node of the branch output before its gate.
        update: node of the branch output after its gate.
        add: node of the residual add.
        attention: attention nodes inside the branch.
        shape: shape of the core, for example ``(b, n, d)``.
        itemsize: bytes per element of the core.
        tokens: see `TokenFact`.
        flops: operations that only serve the core; work that several sites share (joint attention) is split evenly.
        token_flops: the part of `flops` that shrinks with the number of tokens when the site is refreshed.
        bytes: memory traffic of the same nodes, nothing fused.
        attention_flops: the part of `flops` up to the output of its attention.
        attention_shape: shape of its attention's output.
        attention_itemsize: bytes per element of that.
        update_itemsize: bytes per element of the branch output after its gate.
        key_flops: the part of `flops` that makes keys and values.
        keys: first of the attention's keys that belong to the site's own tokens, and their number.
        score_flops: operations of a score of all tokens from the logits of its attention.
        score_bytes: memory traffic of that.
        ranks: of which each has some heads of its attention, as under context or tensor parallelism; else 1.
    """

    id: SiteId
    block: BlockId
    name: str
    kind: SiteKind
    stream: StreamId
    source: str
    core: str
    update: str
    add: str
    attention: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    tokens: TokenFact
    flops: int
    token_flops: int
    bytes: int
    attention_flops: int = 0
    attention_shape: tuple[int, ...] = ()
    attention_itemsize: int = 0
    update_itemsize: int = 0
    key_flops: int = 0
    keys: tuple[int, int] = (0, 0)
    score_flops: int = 0
    score_bytes: int = 0
    ranks: int = 1

    @property
    def label(self) -> str:
        """Short unique name, ``3.mlp``: block, then kind."""
        return f"{self.block}.{self.kind.value}"

    @property
    def core_bytes(self) -> int:
        """Bytes of the cached branch output."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Span(Site):
    """A run of branches on one stream, which takes the actions of a site; its core is the stream at its end.

    Attributes:
        inside: its sites, in execution order.
        is_last: whether the model's output reads its end without passing through another site, or, of the stack,
            through another one but those of the blocks after it.
        picture: first of the tokens at its end that the model's output reads, and their number; (0, 0) if unknown.
    """

    inside: tuple[SiteId, ...] = ()
    is_last: bool = False
    picture: tuple[int, int] = (0, 0)

    @property
    def is_given(self) -> bool:
        """True if its value is an input of the model, which no code has to compute."""
        return self.core == self.source


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block: a run of sites that belong together.

    Attributes:
        id: number in execution order.
        path: module path, or an empty string when the graph has none.
        sites: its sites in execution order.
        kind: blocks with equal `kind` have the same graph up to parameters.
        nodes: names of its nodes in graph order.
        depth: position among the blocks of the same list, and the length of that list; policies scale ratios by it.
    """

    id: BlockId
    path: str
    sites: tuple[SiteId, ...]
    kind: str
    nodes: tuple[str, ...] = field(repr=False)
    depth: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class Stream:
    """One residual stream: where it starts and how often it is added to.

    Attributes:
        id: number in order of first use.
        origin: node that starts the stream.
        roles: what its start depends on.
        sites: sites that add to it.
        reaches_output: whether the model's output depends on it through a residual add.
    """

    id: StreamId
    origin: str
    roles: frozenset[Role]
    sites: tuple[SiteId, ...]
    reaches_output: bool


@dataclass(frozen=True)
class ModelStructure:
    """Everything later stages need to know about one captured model.

    Attributes:
        inputs: inputs of the graph with their roles.
        streams: residual streams.
        blocks: transformer blocks in execution order.
        sites: cacheable branches in execution order.
        prologue: nodes before the first block (embeddings and whatever several blocks share).
        epilogue: nodes after the last block.
        grid: token grid of the latent, ``(height, width)`` or ``(frames, height, width)``, or None when it cannot be
            told from shapes.
        flops: operations of one call of the model.
        bytes: memory traffic of one call of the model, nothing fused.
        dependence: for each node, what it depends on.
        spans: runs of sites on one stream, per block and over the whole stack; their numbers follow those of the sites.
        invariants: values that do not depend on the latent, and are worth computing outside of the steps; by node.
        invariant_flops: the part of `flops` that leads to them, by how often they change.
        trunk: what the spans of the stack cover.
    """

    inputs: tuple[Input, ...]
    streams: tuple[Stream, ...]
    blocks: tuple[Block, ...]
    sites: tuple[Site, ...]
    prologue: tuple[str, ...] = field(repr=False)
    epilogue: tuple[str, ...] = field(repr=False)
    grid: tuple[int, ...] | None
    flops: int
    bytes: int
    dependence: dict[str, frozenset[Role]] = field(repr=False, compare=False)
    spans: tuple[Span, ...] = field(repr=False, default=())
    invariants: dict[str, Pace] = field(repr=False, compare=False, default_factory=dict)
    invariant_flops: dict[Pace, int] = field(default_factory=dict, compare=False)
    trunk: Trunk = WHOLE

    @property
    def stack(self) -> tuple[Span, ...]:
        """The spans of the stack, one for each stream; may be none."""
        return tuple(span for span in self.spans if span.kind is SiteKind.STACK)

    @property
    def probe(self) -> Span | None:
        """What is watched, if the trunk asks for it and the model has it."""
        return next((span for span in self.spans if span.kind is SiteKind.PROBE), None)

    @property
    def trace(self) -> Span | None:
        """What the watched blocks add, if the trunk asks for it and the model has it."""
        return next((span for span in self.spans if span.kind is SiteKind.TRACE), None)

    @property
    def whole(self) -> Span | None:
        """The whole model as a span, if the trunk asks for it and the model's output can be added to its latent."""
        return next((span for span in self.spans if span.kind is SiteKind.MODEL), None)

    @property
    def last(self) -> Span | None:
        """What the last block adds to the one stream that the model's output reads; None where there are several."""
        ends = [span for span in self.spans if span.kind is SiteKind.BLOCK and span.is_last]
        return ends[0] if len(ends) == 1 and ends[0].block == len(self.blocks) - 1 else None

    @property
    def everything(self) -> tuple[Site, ...]:
        """Sites and spans, by number."""
        return self.sites + self.spans

    @property
    def block_kinds(self) -> int:
        """Number of structurally different blocks."""
        return len({block.kind for block in self.blocks})

    def sites_of(self, block: Block) -> tuple[Site, ...]:
        """The sites of a block."""
        return tuple(self.sites[i] for i in block.sites)

    def runs(self) -> list[list[Block]]:
        """Adjacent blocks of one list whose sites are alike."""

        def likeness(block: Block) -> tuple[object, ...]:
            sites = tuple((s.kind, s.stream, s.shape, s.tokens.wise) for s in self.sites_of(block))
            return block.path.rpartition(".")[0], sites

        runs: list[list[Block]] = []
        for block in self.blocks:
            if runs and likeness(runs[-1][-1]) == likeness(block):
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    def _repr_html_(self) -> str:
        """The structure in a notebook."""
        from dicompile.analysis.html import structure_html

        return structure_html(self)

    def __str__(self) -> str:
        roles = ", ".join(f"{i.name}: {i.role.value}" for i in self.inputs if i.role.is_given)
        lines = [
            f"inputs   {roles}",
            f"streams  {len(self.streams)}   blocks {len(self.blocks)} of {self.block_kinds} kinds   "
            f"sites {len(self.sites)}   {self.flops / 1e9:.3f} GFLOP a call"
            + (f"   token grid {'x'.join(map(str, self.grid))}" if self.grid else ""),
        ]
        for block in self.blocks:
            lines.append(f"block {block.id:<3} {block.path or '-'}  [{block.kind[:8]}]")
            lines += [
                f"  site {site.id:<3} {site.kind.value:<16} stream {site.stream}  {'x'.join(map(str, site.shape)):<12} "
                f"{site.flops / self.flops:6.2%}  token-wise: {site.tokens}  # {site.name}"
                for site in self.sites_of(block)
            ]
        return "\n".join(lines)
