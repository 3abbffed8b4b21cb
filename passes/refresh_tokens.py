"""Run a branch on the tokens that need it most, and take the stored value for the others.

Before::

    %2: f32[2,64,32] = aten.layer_norm.default(stream, [32])
    %3: f32[2,64,32] = aten.linear.default(%2, @mlp.weight)
    %4: f32[2,64,32] = aten.add.Tensor(stream, %3)

After (k = count[0])::

    %1: i64[2,64] = ... the place of every token by its score
    %2: i64[2,k] = ... the tokens in the first k places
    %4: f32[2,k,32] = aten.gather.default(stream, 1, %3)
    %5: f32[2,k,32] = aten.layer_norm.default(%4, [32])
    %6: f32[2,k,32] = aten.linear.default(%5, @mlp.weight)
    %8: f32[2,64,32] = aten.gather.default(%6, 1, %7)       # every token looks at its place
    %9: f32[2,64,32] = aten.where.self(%1 < k, %8, value[0])
    %10: f32[2,64,32] = aten.add.Tensor(stream, %9)

Nothing is scattered: what is read by place is part of the kernel that adds, while a scatter needs a copy of the stored
value first.

The number of tokens is an input of the compiled code, so one variant serves every ratio. Operands with one value per
token, such as position tables, are gathered too. Where a branch attends to its own tokens, the output of attention is
read from a slot and gathered, or only the queries are restricted, or keys and values, too; see `Context`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from dicompile.analysis import Dataflow
from dicompile.analysis.tokens import Mixing, token_layouts
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops import scores, select_tokens
from dicompile.ops.kinds import is_attention
from dicompile.ops.layout import Layout
from dicompile.ops.tokens import Carried, MixesTokens
from dicompile.passes.base import (
    Chosen,
    LocalStep,
    Noise,
    PassReport,
    Predicted,
    ReuseClock,
    Segment,
    SiteNodes,
    SlotRef,
    TokenCount,
)
from dicompile.passes.edit import Editor
from dicompile.passes.narrow import Narrow
from dicompile.passes.reuse_sites import recalled
from dicompile.passes.rows import Rows
from dicompile.passes.score_tokens import over_ranks, raw_score
from dicompile.plan import Context, Score, ScoreBase, SlotKind

aten = torch.ops.aten


@dataclass(frozen=True)
class RefreshTokens:
    """Compute some tokens of a site, and take its stored value for the others."""

    name: ClassVar[str] = "refresh-tokens"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Rewrite every site whose step refreshes tokens."""
        changed = []
        for position, step in enumerate(segment.steps):
            if step.refresh is not None and step.refresh.clusters is None:
                SiteRefresh(segment, position, step, step.refresh).run()
                changed.append(f"site {position}: tokens by {step.refresh.base.value}")
        return PassReport(tuple(changed))


class Selection(NamedTuple):
    """Which tokens are computed.

    Attributes:
        chosen: the tokens with the highest scores, of equals the earlier one; int64, [b, k].
        places: place of every token by its score; int64, [b, n].
        stamps: as `SlotKind.STAMP` after this step, where that is kept; int32, [b, n].
    """

    chosen: fx.Node
    places: fx.Node
    stamps: fx.Node | None


class SiteRefresh:
    """The rewrite of one site."""

    def __init__(self, segment: Segment, position: int, step: LocalStep, score: Score) -> None:
        self.segment, self.position, self.step, self.score = segment, position, step, score
        self.site: SiteNodes = segment.sites[position]
        self.fresh = self.site.fresh(step.what)
        self.editor = Editor(segment)
        self.batch, self.tokens, self.width = (int(size) for size in self.site.stream.meta["val"].shape)
        self.count = self.editor.int_input(TokenCount(position), below=self.tokens)

    def run(self) -> None:
        """Choose tokens, run the branch on them, put them in their places, and store what the plan keeps."""
        core, editor = self.fresh, self.editor
        users = list(core.users)
        with editor.before(min(users, key=list(self.segment.graph.nodes).index)):
            chosen = self.choose()
            copies = self.branch_on(chosen)
            value = self.value(copies[core])
            placed = editor.in_layout_of(core, value)
            stored = self.stored(value, copies)
        for user in users:
            user.replace_input_with(core, placed)
        end = self.segment.graph.output_node()
        end.replace_input_with(core, placed)
        editor.output(Chosen(self.position), chosen)
        for slot, node in stored.items():
            editor.output(slot, node)

    def choose(self) -> fx.Node:
        """The tokens that are computed; where their rows go is known then."""
        selection = self.select()
        self.rows, self.stamps = Rows.of(self.editor, selection.places, self.count), selection.stamps
        return selection.chosen

    def value(self, rows: fx.Node) -> fx.Node:
        """The site's value of what was computed of the chosen tokens."""
        others = recalled(self.editor, self.position, self.step, self.fresh)
        assert others is not None
        return self.rows.put(self.editor, rows, others)

    def stored(self, value: fx.Node, copies: dict[fx.Node, fx.Node]) -> dict[SlotRef, fx.Node]:
        """What leaves the segment for later steps."""
        raw = self.raw_score_after(copies) if SlotKind.SCORE in self.step.writes else None
        nodes = {SlotKind.VALUE: value, SlotKind.STAMP: self.stamps, SlotKind.SCORE: raw}
        kept = {}
        for kind in self.step.writes:
            node = nodes[kind]
            assert node is not None
            kept[SlotRef(self.position, kind)] = node
        return kept

    def select(self) -> Selection:
        """Rank the tokens by everything that counts: in one kernel where there is one, else by sorting."""
        editor, score, base = self.editor, self.score, self.base()
        keeps_stamps = SlotKind.STAMP in self.step.writes
        select = select_tokens.operator_for(tensor_of(base).device, self.tokens)
        if select is None:
            return self.sorted(self.ranked(base), keeps_stamps)
        stamp, clock = (self.stamp(), self.clock()) if score.age_weight or keeps_stamps else (None, 0)
        of_grid = list(self.segment.grid or ()), score.grid_cell, score.grid_bonus
        call = editor.call(select, base, stamp, self.count, clock, score.age_weight, *of_grid)
        chosen, places, stamps = (editor.call(operator.getitem, call, i) for i in range(3))
        return Selection(chosen, places, stamps if keeps_stamps else None)

    def sorted(self, ranked: fx.Node, keeps_stamps: bool) -> Selection:
        """Selection by score; float32, [b, n]."""
        editor = self.editor
        order = editor.trace(lambda score: score.argsort(dim=-1, descending=True, stable=True), ranked)
        chosen = editor.call(aten.slice.Tensor, order, 1, 0, self.count)
        places = editor.trace(scores.places_of, order)
        if not keeps_stamps:
            return Selection(chosen, places, None)
        now = editor.call(
            aten.mul.Tensor,
            editor.call(aten.ones_like.default, self.stamp()),
            editor.call(operator.add, self.clock(), 1),
        )
        is_chosen = editor.call(aten.lt.Scalar, places, self.count)
        return Selection(chosen, places, editor.call(aten.where.self, is_chosen, now, self.stamp()))

    def ranked(self, base: fx.Node) -> fx.Node:
        """Scores with everything that counts; float32, [b, n]."""
        if self.score.age_weight:
            age = self.editor.call(aten.rsub.Scalar, self.stamp(), self.clock())
            base = self.editor.call(aten.add.Tensor, base, age, alpha=self.score.age_weight)
        if self.score.grid_cell:
            grid, cell, bonus = self.segment.grid, self.score.grid_cell, self.score.grid_bonus
            assert grid is not None
            base = self.editor.trace(lambda score: scores.with_grid_bonus(score, grid, cell, bonus), base)
        return base

    def base(self) -> fx.Node:
        """Normalised score base; [b, n]."""
        shared, stream = self.score.share_guidance, self.site.stream
        if self.score.base is ScoreBase.RANDOM:
            noise = Noise(self.position, shared)
            return self.editor.tensor_input(noise, (self.batch, self.tokens), torch.float32, stream)
        if self.score.base is ScoreBase.PREDICTED:
            given = self.editor.tensor_input(Predicted(self.position), (self.batch, self.tokens), torch.float32, stream)
            return self.editor.trace(scores.over_guidance_halves, given) if shared else given
        if self.score.base is ScoreBase.NORM:
            return over_ranks(self.editor, self.editor.trace(scores.stream_norm, stream))
        if self.score.base is ScoreBase.SIMILARITY:
            value = recalled(self.editor, self.position, self.step, self.fresh)
            return over_ranks(self.editor, self.editor.trace(scores.dissimilarity, stream, value))
        source = self.step.source
        assert source is not None
        raw = self.segment.scores.get(source)
        if raw is None:
            reference = SlotRef(source, SlotKind.SCORE)
            raw = self.editor.tensor_input(reference, (self.batch, self.tokens), torch.float32, stream)
        function = scores.base_from_entropy if self.score.base is ScoreBase.ENTROPY else scores.base_from_attention

        def base(raw: Tensor) -> Tensor:
            return function(raw, shared=shared)

        return self.editor.trace(base, raw)

    def stamp(self) -> fx.Node:
        """Reuse step after which every token was last refreshed; int32, [b, n]."""
        reference = SlotRef(self.position, SlotKind.STAMP)
        return self.editor.tensor_input(reference, (self.batch, self.tokens), torch.int32, self.site.stream)

    def clock(self) -> fx.Node:
        """Reuse steps since the site was computed whole; int."""
        return self.editor.int_input(ReuseClock(self.position))

    def raw_score_after(self, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """The site's own raw score (cross-attention entropy) with the rows of the chosen tokens replaced."""
        fresh = raw_score(self.editor, copies[self.site.attention[0]], self.score.base, self.score.share_guidance)
        reference = SlotRef(self.position, SlotKind.SCORE)
        old = self.editor.tensor_input(reference, (self.batch, self.tokens), torch.float32, self.site.stream)
        self.segment.scores[self.position] = self.rows.put(self.editor, fresh, old)
        return self.segment.scores[self.position]

    def branch_on(self, chosen: fx.Node) -> dict[fx.Node, fx.Node]:
        """Copy the branch for the chosen tokens; maps every node that carries tokens to its copy.

        Rows that were joined with the tokens, as text with a picture, are left out: another site computes them. They
        stay as keys and values beside those of the chosen tokens.
        """
        flow, stream = Dataflow(self.segment.graph), self.site.stream
        found = self.carried(list(flow.members(flow.between(stream, self.fresh))))
        kept = self.mixing is Mixing.QUERIES and self.step.context is Context.KEPT
        narrow = Narrow(self.editor, chosen, self.count, self.batch, self.tokens, alone=not kept)
        copies = {stream: narrow.gather(stream, found.pop(stream).layout)}
        for node, carried in found.items():
            if is_attention(node) and self.mixing is Mixing.STORED:
                copies[node] = narrow.gather(self.stored_attention(node), carried.layout)
                continue
            given, what = dict(copies), carried
            if is_attention(node) and self.mixing is Mixing.QUERIES and self.step.context is Context.ALL:
                for of_keys in (node_argument(node, 1), node_argument(node, 2)):
                    given.pop(of_keys, None)
                per_query = {operand: own for operand, own in carried.operands.items() if not own.counts(-1)}
                what = Carried(carried.layout, per_query)
            copies[node] = narrow.copied(node, what, given)
            if "nn_module_stack" in node.meta:
                copies[node].meta["nn_module_stack"] = node.meta["nn_module_stack"]
        return copies

    def carried(self, region: list[fx.Node]) -> dict[fx.Node, Carried]:
        """What the branch's operators do to tokens; decides what becomes of attention over the same tokens."""
        layout = Layout.of_stream(tensor_of(self.site.stream).shape, [self.site.token_axis])
        stored = Mixing.STORED if self.step.context is Context.STORED else Mixing.QUERIES
        for self.mixing in (Mixing.FORBIDDEN, stored):
            try:
                return token_layouts(region, self.site.stream, layout, self.mixing)
            except MixesTokens:
                if self.mixing is stored:
                    raise
        raise AssertionError("one of the two returns or raises")

    def stored_attention(self, attention: fx.Node) -> fx.Node:
        """The stored output of an attention node, or the node itself where another site runs it at this step."""
        value, owner = attention.meta["val"], self.step.attention
        assert owner is not None
        if self.segment.steps[owner].weights == (1.0,):
            return attention
        return self.editor.tensor_input(
            SlotRef(owner, SlotKind.ATTENTION), tuple(value.shape), value.dtype, self.site.stream
        )
