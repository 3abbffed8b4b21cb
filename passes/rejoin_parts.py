"""Take a value that is split and put together again as it was.

FLUX's single blocks run on text and picture in one stream, but pass them on apart, so every block copies its stream
once to join it.

Before::

    %1: f32[2,6,32] = aten.slice.Tensor(stream, 1, 0, 6)
    %2: f32[2,16,32] = aten.slice.Tensor(stream, 1, 6, 22)
    %3: f32[2,22,32] = aten.cat.default([%1, %2], 1)
    %4: f32[2,22,32] = aten.add.Tensor(%3, %0)

After::

    %4: f32[2,22,32] = aten.add.Tensor(stream, %0)

Parts in another order, or not of the whole value, are left alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.nodes import int_argument, list_argument, node_argument, tensor_of
from dicompile.passes.base import PassReport, Segment

aten = torch.ops.aten


@dataclass(frozen=True)
class RejoinParts:
    """Replace a concatenation of all parts of a value by the value."""

    name: ClassVar[str] = "rejoin-parts"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Rewrite every such concatenation, in order: what one becomes may be what the next one splits."""
        changed = []
        for cat in segment.graph.find_nodes(op="call_function", target=aten.cat.default):
            whole = _whole_of(cat)
            if whole is not None:
                cat.replace_all_uses_with(whole)
                changed.append(f"{cat.name}: {whole.name}")
        return PassReport(tuple(changed))


def _whole_of(cat: fx.Node) -> fx.Node | None:
    """The value whose parts a concatenation joins in order, all of them; None if it is something else."""
    rank = tensor_of(cat).ndim
    axis, end = int_argument(cat, 1, 0) % rank, 0
    sources: dict[fx.Node, None] = {}
    for node in list_argument(cat, 0):
        part = _part_of(node, rank)
        if part is None or part[1:] != (axis, end):
            return None
        sources[part[0]] = None
        end += tensor_of(node).shape[axis]
    (source, *others) = sources
    return source if not others and tensor_of(source).shape == tensor_of(cat).shape else None


def _part_of(node: fx.Node, rank: int) -> tuple[fx.Node, int, object] | None:
    """What a value is a part of, along which axis, and where it begins there; None if it is none."""
    if node.target is aten.slice.Tensor:
        start, step = (node.args[i] if len(node.args) > i else default for i, default in ((2, 0), (4, 1)))
        return (node_argument(node, 0), int_argument(node, 1, 0) % rank, start or 0) if step == 1 else None
    if node.target is not operator.getitem:
        return None
    split, number = node_argument(node, 0), int_argument(node, 1)
    if split.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    axis = int_argument(split, 2, 0) % rank
    return node_argument(split, 0), axis, sum(part.shape[axis] for part in split.meta["val"][:number])
