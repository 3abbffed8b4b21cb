"""Replace a branch by what is remembered of it, or blend the two.

Before::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)
    %4: f32[2,64,32] = aten.mul.Tensor(gate, %3)

After::

    %4: f32[2,64,32] = aten.mul.Tensor(gate, value[0])

The value is the plan's linear combination ``w0 * fresh + w1 * h1 + w2 * h2 + ...``. The branch itself stays in the
graph; drop-dead removes what nobody reads any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.passes.base import LocalStep, PassReport, Segment, SlotRef
from dicompile.passes.edit import Editor
from dicompile.plan import SlotKind, What

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
            if len(step.weights) > 1:
                _combine(segment, position, step)
                changed.append(f"site {position}: {' + '.join(f'{w:g} h{i}' for i, w in enumerate(step.weights) if w)}")
        return PassReport(tuple(changed))


def _combine(segment: Segment, position: int, step: LocalStep) -> None:
    editor, site = Editor(segment), segment.sites[position]
    fresh = site.core if step.what is What.CORE else site.update
    value = fresh.meta["val"]
    users = list(fresh.users)
    stored = [
        (weight, editor.tensor_input(SlotRef(position, SlotKind.VALUE, age), tuple(value.shape), value.dtype, fresh))
        for age, weight in enumerate(step.weights[1:])
        if weight
    ]
    terms = ([(step.weights[0], fresh)] if step.weights[0] else []) + stored
    with editor.before(min(users, key=list(segment.graph.nodes).index)):
        result = _sum(editor, terms)
        result = result if step.weights[0] else editor.in_layout_of(fresh, result)
    for user in users:
        user.replace_input_with(fresh, result)


def _sum(editor: Editor, terms: list[tuple[float, fx.Node]]) -> fx.Node:
    scaled = [node if weight == 1.0 else editor.call(aten.mul.Tensor, node, weight) for weight, node in terms]
    result = scaled[0]
    for term in scaled[1:]:
        result = editor.call(aten.add.Tensor, result, term)
    return result
