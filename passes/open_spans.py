"""Give a span a branch of its own: what its blocks add to the stream.

A block has no single node for what it adds; this pass makes one where the plan stores or reuses it.

Before::

    %9: f32[2,64,32] = aten.add.Tensor(%7, %8)          # the last add of the span

After::

    %9: f32[2,64,32] = aten.add.Tensor(%7, %8)
    %10: f32[2,64,32] = aten.sub.Tensor(%9, stream)     # the span's update
    %11: f32[2,64,32] = aten.add.Tensor(stream, %10)    # only if the update is about to be replaced

From then on the span is a site like any other. Of the whole model it may be what it adds to the output of a guidance
partner, which then is an input, in the place of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dicompile.passes.base import LocalStep, Partner, PassReport, Segment
from dicompile.passes.edit import Editor
from dicompile.plan import What

aten = torch.ops.aten


@dataclass(frozen=True)
class OpenSpans:
    """Make the update of spans a node."""

    name: ClassVar[str] = "open-spans"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Open every span whose update is stored or reused."""
        changed = []
        for position, (site, step) in enumerate(zip(segment.sites, segment.steps, strict=True)):
            if site.is_span and step.what.is_added and not step.is_plain:
                _open(segment, position, step)
                changed.append(f"span {position}")
        return PassReport(tuple(changed))


def _open(segment: Segment, position: int, step: LocalStep) -> None:
    editor, span = Editor(segment), segment.sites[position]
    end, users = span.add, list(span.add.users)
    start = span.stream
    if step.what is What.DIFFERENCE:
        start = editor.tensor_input(Partner(position), tuple(end.meta["val"].shape), end.meta["val"].dtype, end)
    with editor.before(end.next):
        update = editor.call(aten.sub.Tensor, end, start)
        after = editor.call(aten.add.Tensor, start, update) if step.weights != (1.0,) else end
    if after is not end:
        segment.redirect(end, after, users)
    opened = replace(span, core=update, update=update, add=after)
    segment.sites = tuple(opened if i == position else site for i, site in enumerate(segment.sites))
