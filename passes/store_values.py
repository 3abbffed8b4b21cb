"""Let computed branch outputs leave the segment where a later step reads them.

Before::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)

After::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)
    return value[0] = %3

The fresh output tensor is the cache entry: nothing is copied. Values that are not contiguous are made so, because every
variant that reads the slot was compiled for one layout. So are parts of a larger tensor, which would keep all of it in
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.passes.base import PassReport, Segment, SlotRef
from dicompile.passes.edit import Editor
from dicompile.plan import SlotKind

aten = torch.ops.aten


@dataclass(frozen=True)
class StoreValues:
    """Add outputs for the values and token stamps that the plan stores."""

    name: ClassVar[str] = "store-values"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Add the outputs of sites that are computed for all tokens."""
        changed = []
        for position, step in enumerate(segment.steps):
            if step.refresh is not None or step.only_reuses:
                continue
            site = segment.sites[position]
            if SlotKind.VALUE in step.writes:
                _store(segment, SlotRef(position, SlotKind.VALUE), site.fresh(step.what))
            if SlotKind.ATTENTION in step.writes:
                _store(segment, SlotRef(position, SlotKind.ATTENTION), site.attention[0])
            if SlotKind.STAMP in step.writes:
                _store_stamp(segment, position)
            changed += [f"site {position}: {kind.value}" for kind in step.writes if kind is not SlotKind.SCORE]
        return PassReport(tuple(changed))


def _store(segment: Segment, reference: SlotRef, node: fx.Node) -> None:
    editor = Editor(segment)
    if not _fills_its_memory(node.meta["val"]):
        with editor.before(node.next):
            node = editor.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    editor.output(reference, node)


def _fills_its_memory(value: torch.Tensor) -> bool:
    return value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()


def _store_stamp(segment: Segment, position: int) -> None:
    editor, site = Editor(segment), segment.sites[position]
    shape = [int(site.stream.meta["val"].shape[0]), site.tokens]
    with editor.before(segment.graph.output_node()):
        zeros = editor.call(
            aten.zeros.default, shape, dtype=torch.int32, device=site.stream.meta["val"].device, pin_memory=False
        )
    editor.output(SlotRef(position, SlotKind.STAMP), zeros)
