"""Let every value leave the segment in the memory layout that its readers were compiled for.

A rewritten branch may order its axes in memory as the model did not: sums of a transposed stream and a stored
value, gathered rows. Later segments of the model rely on the layout of the original, readers of slots on contiguous
tensors.

Before::

    %4: f32[2,64,32] = aten.add.Tensor(stream, value[0])     # contiguous
    return value0 = %4                                       # the model has axes 1 and 2 the other way round in memory

After::

    %4: f32[2,64,32] = aten.add.Tensor(stream, value[0])
    %5: f32[2,32,64] = aten.permute.default(%4, [0, 2, 1])
    %6: f32[2,32,64] = aten.clone.default(%5, memory_format=torch.contiguous_format)
    %7: f32[2,64,32] = aten.permute.default(%6, [0, 2, 1])
    return value0 = %7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.passes.base import PassReport, Segment, SlotRef, Value, strides_of
from dicompile.passes.edit import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepLayout:
    """Copy outputs whose layout is not the expected one."""

    name: ClassVar[str] = "keep-layout"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Compute all values anew, then copy where an output's strides differ."""
        editor = Editor(segment)
        editor.propagate()
        changed, results = [], segment.results
        for i, (reference, node) in enumerate(zip(segment.outputs, results, strict=True)):
            expected = _expected(segment, reference, node)
            if expected is None or strides_of(node.meta["val"]) == expected:
                continue
            with editor.before(segment.graph.output_node()):
                results[i] = editor.with_strides(node, expected)
            changed.append(f"{reference}: {list(node.meta['val'].stride())} to {list(expected)}")
        segment.graph.output_node().args = (results,)
        return PassReport(tuple(changed))


def _expected(segment: Segment, reference: object, node: fx.Node) -> tuple[int, ...] | None:
    """Strides that the readers of an output rely on; None if any will do."""
    if isinstance(reference, Value):
        return segment.layouts.get(reference.index)
    if isinstance(reference, SlotRef):
        return strides_of(torch.empty(node.meta["val"].shape, device="meta"))
    return None
