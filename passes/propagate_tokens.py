"""Run a branch on one token of every cluster, and let all stored values follow what it gives.

Before::

    %2: f32[2,64,32] = aten.layer_norm.default(stream, [32])
    %3: f32[2,64,32] = aten.linear.default(%2, @mlp.weight)
    %4: f32[2,64,32] = aten.add.Tensor(stream, %3)

After (k = count[0])::

    %1: i64[2,k] = ... of the tokens with every number in labels[0], that with the highest noise[0]
    %2: f32[2,k,32] = aten.gather.default(stream, 1, %1)
    %3: f32[2,k,32] = aten.layer_norm.default(%2, [32])
    %4: f32[2,k,32] = aten.linear.default(%3, @mlp.weight)
    %5: f32[2,64,32] = aten.gather.default(%4, 1, labels[0])    # every token looks at the row of its cluster
    %6: f32[2,64,32] = ... %5 for the tokens in %1, for others value[0] + share * (%5 - value[0])
    %7: f32[2,64,32] = ... value[0]-1 + (%6 - value[0]), and so on
    %8: f32[2,64,32] = ... the weighted sum of %6, %7, ...
    %9: f32[2,64,32] = aten.add.Tensor(stream, %8)
    return value[0] = %6
    return value[0]-1 = %7

Adding one change to all stored values leaves their differences, and with them every order of a forecast but the zeroth.
A cluster without tokens computes token 0 for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dicompile.nodes import tensor_of
from dicompile.passes.base import Labels, Noise, PassReport, Segment, SlotRef
from dicompile.passes.refresh_tokens import SiteRefresh
from dicompile.passes.reuse_sites import stored_value, weighed
from dicompile.passes.rows import Rows
from dicompile.plan import SlotKind

aten = torch.ops.aten


@dataclass(frozen=True)
class PropagateTokens:
    """Compute one token of every cluster of a site, and move the stored values of all with it."""

    name: ClassVar[str] = "propagate-tokens"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Rewrite every site whose step computes tokens of clusters."""
        changed = []
        for position, step in enumerate(segment.steps):
            if step.refresh is not None and step.refresh.clusters is not None:
                _SitePropagation(segment, position, step, step.refresh).run()
                changed.append(f"site {position}: tokens of {step.refresh.clusters.count} clusters")
        return PassReport(tuple(changed))


class _SitePropagation(SiteRefresh):
    """The rewrite of one site."""

    def choose(self) -> fx.Node:
        """One token of every cluster, int64, [b, k]: its row is that of its cluster."""
        editor, stream, shape = self.editor, self.site.stream, (self.batch, self.tokens)
        labels = editor.tensor_input(Labels(self.position), shape, torch.int64, stream)
        noise = editor.tensor_input(Noise(self.position, share_guidance=False), shape, torch.float32, stream)
        device = tensor_of(stream).device
        numbers = editor.call(aten.arange.default, self.count, device=device, pin_memory=False)
        number, label, own = (editor.call(aten.unsqueeze.default, node, 1) for node in (numbers, labels, noise))
        is_member = editor.call(aten.eq.Tensor, label, number)
        drawn = editor.call(aten.where.ScalarOther, is_member, own, -1.0)  # noise is not negative
        chosen = editor.call(aten.argmax.default, drawn, 2)
        of_cluster = editor.call(aten.gather.default, chosen, 1, labels)
        everyone = editor.call(aten.arange.default, self.tokens, device=device, pin_memory=False)
        self.rows = Rows(editor.call(aten.eq.Tensor, of_cluster, everyone), labels)
        return chosen

    def value(self, rows: fx.Node) -> fx.Node:
        """The weighted sum of the stored values, after all have followed."""
        editor, clusters = self.editor, self.score.clusters
        assert clusters is not None
        newest, *older = (
            stored_value(editor, self.position, self.step, age, self.fresh) for age in range(len(self.step.weights) - 1)
        )

        def part_of_the_way(value: Tensor, row: Tensor) -> Tensor:
            return value.lerp(row, clusters.share)

        others = newest
        if clusters.share:
            others = editor.trace(part_of_the_way, newest, self.rows.taken(editor, rows, newest))
        moved = self.rows.put(editor, rows, others)
        change = editor.call(aten.sub.Tensor, moved, newest)
        self.history = [moved, *(editor.call(aten.add.Tensor, value, change) for value in older)]
        result = weighed(editor, self.position, self.step, lambda age: self.history[age])
        assert result is not None
        return result

    def stored(self, value: fx.Node, copies: dict[fx.Node, fx.Node]) -> dict[SlotRef, fx.Node]:
        """All values of the history, if any of them is read later."""
        del value, copies
        if SlotKind.VALUE not in self.step.writes:
            return {}
        return {SlotRef(self.position, SlotKind.VALUE, age): node for age, node in enumerate(self.history)}
