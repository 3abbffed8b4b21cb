"""Compute only the columns of a linear layer that somebody reads.

adaLN modulation makes shift, scale and gate of all branches in one linear layer; a reuse step reads the gates only.

Before::

    %1: f32[2,192] = aten.linear.default(%0, @ada.weight, @ada.bias)
    %2: (...) = aten.split.Tensor(%1, 32, 1)
    %3: f32[2,32] = getitem(%2, 2)

After::

    %1: f32[32,32] = aten.slice.Tensor(@ada.weight, 0, 64, 96)
    %2: f32[32] = aten.slice.Tensor(@ada.bias, 0, 64, 96)
    %3: f32[2,32] = aten.linear.default(%0, %1, %2)

Slices of weights are views. Not exact: a narrower product may sum in another order, so results can differ in the last
bit. Linear layers whose parts are all read are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.nodes import int_argument, node_argument, tensor_of
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class NarrowLinear:
    """Split a linear layer whose output is split and only partly read."""

    name: ClassVar[str] = "narrow-linear"
    exact: ClassVar[bool] = False

    def run(self, segment: Segment) -> PassReport:
        """Narrow every such layer."""
        changed, skipped = [], []
        for split in [node for node in segment.graph.nodes if _splits_a_linear(node)]:
            width, total = split.args[1], split.args[0].meta["val"].shape[-1]
            parts = sorted(split.users, key=lambda node: node.args[1])
            if len({part.args[1] for part in parts}) * width >= total:
                skipped.append(f"{split.args[0].name}: all of its parts are read")
                continue
            for part in parts:
                _narrow(segment, split.args[0], part, width)
            changed.append(f"{split.args[0].name}: {len(parts)} of {total // width} parts")
        return PassReport(tuple(changed), tuple(skipped))


def _splits_a_linear(node: fx.Node) -> bool:
    if node.target is not aten.split.Tensor or not isinstance(node.args[1], int):
        return False
    linear = node_argument(node, 0)
    if linear.target is not aten.linear.default or len(linear.users) != 1:
        return False
    rank = tensor_of(linear).ndim
    return int_argument(node, 2, 0) % rank == rank - 1


def _narrow(segment: Segment, linear: fx.Node, part: fx.Node, width: int) -> None:
    editor = Editor(segment)
    first = int_argument(part, 1) * width
    last = first + tensor_of(part).shape[-1]
    source, *parameters = [argument for argument in linear.args if argument is not None]
    with editor.before(part):
        sliced = [editor.call(aten.slice.Tensor, parameter, 0, first, last) for parameter in parameters]
        narrow = editor.call(aten.linear.default, source, *sliced)
    part.replace_all_uses_with(narrow)
