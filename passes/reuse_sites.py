"""Replace a branch by what is remembered of it, or blend the two.

Before::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)
    %4: f32[2,64,32] = aten.mul.Tensor(gate, %3)

After::

    %4: f32[2,64,32] = aten.mul.Tensor(gate, value[0])

The value is the plan's linear combination ``w0 * fresh + w1 * h1 + w2 * h2 + ...``; weights other than 0 and 1 are an
input, so that one variant serves every step. Where low frequencies over the tokens are to be reused whatever the
weights say, those of ``h1`` take the place of the sum's. The branch itself stays in the graph; drop-dead removes what
nobody reads any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.passes.base import LocalStep, PassReport, Segment, SlotRef, Weights
from dicompile.passes.edit import Editor
from dicompile.passes.low_band import low_part
from dicompile.plan import LowBand, What

aten = torch.ops.aten


@dataclass(frozen=True)
class ReuseSites:
    """Read stored values instead of computing sites."""

    name: ClassVar[str] = "reuse-sites"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Rewrite every site whose value is a combination of stored ones."""
        changed = []
        for position, step in enumerate(segment.steps):
            if len(step.weights) < 2 or step.refresh is not None:
                continue
            if step.what is What.ATTENTION and step.attention != position:
                continue  # the first site with this attention replaces it for all
            _combine(segment, position, step)
            changed.append(f"site {position}: {' + '.join(f'{w:g} h{i}' for i, w in enumerate(step.weights) if w)}")
        return PassReport(tuple(changed))


def _combine(segment: Segment, position: int, step: LocalStep) -> None:
    editor, site = Editor(segment), segment.sites[position]
    fresh = site.attention[0] if step.what is What.ATTENTION and site.attention else site.fresh(step.what)
    users = list(fresh.users)
    if not users:
        return  # somebody else's business: the span around this site is reused, too
    with editor.before(min(users, key=list(segment.graph.nodes).index)):
        stored = recalled(editor, position, step, fresh)
        result = stored
        if step.weights[0]:
            own = (
                fresh if not step.variable else editor.call(aten.mul.Tensor, fresh, _weight(editor, position, step, 0))
            )
            result = own if stored is None else editor.call(aten.add.Tensor, own, stored)
        assert result is not None
        result = result if step.weights[0] else editor.in_layout_of(fresh, result)
    segment.redirect(fresh, result, users)


def recalled(editor: Editor, position: int, step: LocalStep, like: fx.Node) -> fx.Node | None:
    """What the stored values contribute to a site: ``w1 * h1 + w2 * h2 + ...``; None if nothing."""
    result = weighed(editor, position, step, lambda age: stored_value(editor, position, step, age, like))
    if step.low is not None and result is not None:
        newest = stored_value(editor, position, step, 0, like)
        if step.weighs_low:
            newest = editor.call(aten.mul.Tensor, newest, _weight(editor, position, step, len(step.weights)))
        return _with_low_band(editor, position, step.low, result, newest)
    return result


def weighed(editor: Editor, position: int, step: LocalStep, value: Callable[[int], fx.Node]) -> fx.Node | None:
    """The sum ``w1 * value(0) + w2 * value(1) + ...`` with the weights of a site; None if there are none."""
    result = None
    for age, weight in enumerate(step.weights[1:]):
        if not weight:
            continue
        term = value(age)
        if step.variable:
            term = editor.call(aten.mul.Tensor, term, _weight(editor, position, step, age + 1))
        result = term if result is None else editor.call(aten.add.Tensor, result, term)
    return result


def stored_value(editor: Editor, position: int, step: LocalStep, age: int, like: fx.Node) -> fx.Node:
    """A value that is stored of a site, from its slot."""
    value = like.meta["val"]
    return editor.tensor_input(SlotRef(position, step.slot, age), tuple(value.shape), value.dtype, like)


def _with_low_band(editor: Editor, position: int, low: LowBand, result: fx.Node, newest: fx.Node) -> fx.Node:
    """The value with the low frequencies of the newest stored one."""
    picture, grid = editor.segment.sites[position].picture, editor.segment.grid

    def exchanged(forecast: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return forecast + low_part(stored - forecast, low, picture, grid).to(forecast.dtype)

    return editor.trace(exchanged, result, newest)


def _weight(editor: Editor, position: int, step: LocalStep, index: int) -> fx.Node:
    """One weight of a site, a number or one per token."""
    site = editor.segment.sites[position]
    shape: tuple[int, ...] = (len(step.weights) + step.weighs_low,)
    if step.per_token:
        shape = (*shape, int(site.stream.meta["val"].shape[0]), site.tokens, 1)
    weights = editor.tensor_input(Weights(position), shape, torch.float32, site.stream)
    return editor.call(aten.select.int, weights, 0, index)
