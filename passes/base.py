"""What passes work on: a segment of the model's graph with typed inputs, outputs and sites.

A segment is self-contained and relative: its inputs and outputs are numbered, its sites are positions, so one rewritten
and compiled segment serves every block of the same structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.compat import lazy_graph_module
from dicompile.nodes import results_of
from dicompile.plan import Action, Context, LowBand, Score, SiteStep, SlotKind, What
from dicompile.text import graph_text


@dataclass(frozen=True, slots=True)
class Value:
    """The index-th value that enters (or leaves) the segment in the unmodified model."""

    index: int

    def __str__(self) -> str:
        return f"value{self.index}"


@dataclass(frozen=True, slots=True)
class SlotRef:
    """A slot of the site at `position` in the segment."""

    position: int
    kind: SlotKind
    age: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}[{self.position}]" + (f"-{self.age}" if self.age else "")


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Number of tokens that the site at `position` refreshes at this step (int)."""

    position: int

    def __str__(self) -> str:
        return f"count[{self.position}]"


@dataclass(frozen=True, slots=True)
class ReuseClock:
    """Reuse steps of the site at `position` since it was last computed whole (int)."""

    position: int

    def __str__(self) -> str:
        return f"clock[{self.position}]"


@dataclass(frozen=True, slots=True)
class Noise:
    """Uniform random scores for the site at `position`; float32, [b, n]."""

    position: int
    share_guidance: bool

    def __str__(self) -> str:
        return f"noise[{self.position}]"


@dataclass(frozen=True, slots=True)
class Labels:
    """Number of the cluster of every token, for the site at `position`; int64, [b, n]."""

    position: int

    def __str__(self) -> str:
        return f"labels[{self.position}]"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Indices of the tokens that the site at `position` refreshed; int64, [b, count]."""

    position: int

    def __str__(self) -> str:
        return f"chosen[{self.position}]"


@dataclass(frozen=True, slots=True)
class Partner:
    """What a guidance partner has returned at this step; like the end of the span at `position`."""

    position: int

    def __str__(self) -> str:
        return f"partner[{self.position}]"


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predicted importance of the tokens of the site at `position`; float32, [b, n]."""

    position: int

    def __str__(self) -> str:
        return f"predicted[{self.position}]"


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the site at `position`, `Action.factors`; float32, [k], or per token [k, b, n, 1]."""

    position: int

    def __str__(self) -> str:
        return f"weights[{self.position}]"


InputRef = Value | SlotRef | TokenCount | ReuseClock | Noise | Labels | Predicted | Weights | Partner
OutputRef = Value | SlotRef | Chosen


@dataclass(frozen=True, slots=True)
class LocalStep:
    """What one site of a segment does, without anything that may differ between steps sharing compiled code.

    Attributes:
        weights: weights of the action, see `dicompile.plan.Action`; if they are `variable`, only whether they are zero.
        variable: True if the weights are an input, False if they are part of the code.
        per_token: True if every token has weights of its own.
        what: which value is remembered.
        refresh: how tokens are ranked if only some are computed, else None.
        context: which attention those tokens see.
        writes: kinds of slot to write.
        produces: score that the site's attention delivers, or the clusters that are found behind the site, or None.
        goes_on: whether clusters are found from those before them.
        source: position of the site whose score slot ranks the tokens, or None; clusters are of any site, as `Labels`.
        attention: position of the first site with the same attention, which keeps its output, or None.
        dtype: values are stored in this where they are wider; None stores them as they are.
        low: what is taken of the newest stored value whatever the weights say.
        weighs_low: whether that has a weight of its own, the last one.
    """

    weights: tuple[float, ...] = (1.0,)
    variable: bool = False
    per_token: bool = False
    what: What = What.CORE
    refresh: Score | None = None
    context: Context = Context.STORED
    writes: tuple[SlotKind, ...] = ()
    produces: Score | None = None
    goes_on: bool = False
    source: int | None = None
    attention: int | None = None
    dtype: torch.dtype | None = None
    low: LowBand | None = None
    weighs_low: bool = False

    @property
    def only_reuses(self) -> bool:
        """True if the branch does not run at all."""
        return self.weights[0] == 0.0

    @property
    def slot(self) -> SlotKind:
        """Kind of slot that keeps the site's value."""
        return SlotKind.ATTENTION if self.what is What.ATTENTION else SlotKind.VALUE

    def serves(self, step: LocalStep) -> bool:
        """True if this does the same as another step, but that it keeps the value, which is computed there anyway."""
        if step.weights != (1.0,) or step.what is not What.CORE or step.dtype is not None:
            return False
        return replace(self, writes=step.writes) == step and {*self.writes} == {*step.writes, SlotKind.VALUE}

    @property
    def is_plain(self) -> bool:
        """True if the site is computed and nothing of it is kept."""
        return self.weights == (1.0,) and not self.writes and self.produces is None

    @classmethod
    def of(
        cls, step: SiteStep, positions: Mapping[int, int], attention: int | None, dtype: torch.dtype | None = None
    ) -> LocalStep:
        """The plan's entry, with sites named by position; slots of scales come with those of values."""
        action: Action = step.action
        weighs_low = action.low_weight is not None
        variable = weighs_low or any(weight not in (0.0, 1.0) for weight in action.weights)
        return cls(
            weights=tuple(float(weight != 0.0) for weight in action.weights),
            variable=variable,
            what=action.what,
            refresh=action.tokens.score if action.tokens else None,
            context=action.tokens.context if action.tokens else Context.STORED,
            writes=tuple(dict.fromkeys(slot.kind for slot in step.writes if slot.kind.is_made_here)),
            produces=step.score,
            goes_on=any(slot.kind is SlotKind.CENTROID for slot in step.reads),
            source=None if step.source is None or action.clusters else positions[step.source],
            attention=None if attention is None else positions[attention],
            dtype=dtype,
            low=action.low,
            weighs_low=weighs_low,
        )


@dataclass(frozen=True, slots=True)
class SiteNodes:
    """A site or span as nodes of the segment's graph; see `dicompile.analysis.Site`."""

    stream: fx.Node
    core: fx.Node
    update: fx.Node
    add: fx.Node
    attention: tuple[fx.Node, ...]
    token_axis: int
    tokens: int
    keys: tuple[int, int] = (0, 0)
    is_span: bool = False
    picture: tuple[int, int] = (0, 0)

    def fresh(self, what: What) -> fx.Node:
        """The value that is computed and stored: what the site adds, or its core."""
        return self.update if what.is_added else self.core


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What the value of a node was computed of.

    Attributes:
        args: arguments of the node.
        kwargs: keyword arguments of the node.
        given: values of the nodes among them.
        value: what came out.
    """

    args: object
    kwargs: object
    given: tuple[object, ...]
    value: object

    @classmethod
    def of(cls, node: fx.Node) -> Computed:
        """What a node has now."""
        given = tuple(parent.meta["val"] for parent in node.all_input_nodes)
        return cls(node.args, node.kwargs, given, node.meta["val"])

    def holds(self, node: fx.Node) -> bool:
        """True if a node has these very arguments, and they and it have these very values."""
        return (
            node.args is self.args
            and node.kwargs is self.kwargs
            and node.meta["val"] is self.value
            and all(p.meta["val"] is value for p, value in zip(node.all_input_nodes, self.given, strict=True))
        )


@dataclass
class Segment:
    """A piece of the model's graph that runs as one compiled function.

    Attributes:
        graph_module: the piece; placeholders align with `inputs`, outputs with `outputs`.
        inputs: what each placeholder receives.
        outputs: what each output is.
        sites: its sites by position.
        grid: token grid of the model, or None.
        fake_mode: mode of all ``meta["val"]``.
        steps: what each site does; empty for the unmodified segment.
        scores: node of the current raw score of a site, where this segment made one.
        layouts: strides in which the model's own values leave the segment, by number; 0 for axes of one element.
        owned: numbers of the values that are parameters and buffers, whose sizes are those of the model.
        computed: what the value of a node was computed of, for as long as that is known.
    """

    graph_module: fx.GraphModule
    inputs: list[InputRef]
    outputs: list[OutputRef]
    sites: tuple[SiteNodes, ...]
    grid: tuple[int, ...] | None
    fake_mode: FakeTensorMode
    steps: tuple[LocalStep, ...] = ()
    scores: dict[int, fx.Node] = field(default_factory=dict)
    layouts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    owned: frozenset[int] = frozenset()
    computed: dict[fx.Node, Computed] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.graph_module.graph

    @property
    def results(self) -> list[fx.Node]:
        """Nodes that leave the segment, aligned with `outputs`."""
        return results_of(self.graph)

    def redirect(self, old: fx.Node, new: fx.Node, users: Sequence[fx.Node]) -> None:
        """Let users of a value, and the sites that begin with it, take another one."""
        for user in users:
            user.replace_input_with(old, new)
        self.sites = tuple(replace(site, stream=new) if site.stream is old else site for site in self.sites)

    def copy(self, steps: Sequence[LocalStep]) -> Segment:
        """An independent copy that is to be rewritten for `steps`."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        sites = tuple(
            replace(
                site,
                stream=mapping[site.stream],
                core=mapping[site.core],
                update=mapping[site.update],
                add=mapping[site.add],
                attention=tuple(mapping[node] for node in site.attention),
            )
            for site in self.sites
        )
        return replace(
            self,
            graph_module=lazy_graph_module(self.graph_module, graph),
            inputs=[*self.inputs],
            outputs=[*self.outputs],
            sites=sites,
            steps=tuple(steps),
            scores={},
            computed={node: Computed.of(node) for node in graph.nodes if node.op == "call_function"},
        )

    def __str__(self) -> str:
        return graph_text(self.graph, [str(ref) for ref in self.inputs], [str(ref) for ref in self.outputs])


@dataclass(frozen=True, slots=True)
class PassReport:
    """What a pass did.

    Attributes:
        changed: one line per edit.
        skipped: one line per candidate that was left alone, with the reason.
    """

    changed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class Pass(Protocol):
    """A rewrite of one segment. It only edits; the pipeline verifies, dumps and times."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """True if the pass never changes a number that the plan did not ask to change."""

    def run(self, segment: Segment) -> PassReport:
        """Rewrite `segment` in place for its `steps`."""
        ...


def strides_of(value: torch.Tensor) -> tuple[int, ...]:
    """Strides of a tensor; 0 for axes of one element, where they do not matter."""
    return tuple(stride if size != 1 else 0 for size, stride in zip(value.shape, value.stride(), strict=True))


def is_dense(value: object) -> bool:
    """True for a tensor that fills its memory without gaps or overlaps."""
    if not isinstance(value, torch.Tensor):
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
