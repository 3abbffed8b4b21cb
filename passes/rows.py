"""Rows of some tokens in the place of those of all.

Every token reads the row at its own place, if it has one: a kernel that goes on with the result does so on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.passes.edit import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Which tokens have a row of their own, and where.

    Attributes:
        is_chosen: bool, [b, n].
        place: of a token's row, any one where it has none; int64, [b, n].
    """

    is_chosen: fx.Node
    place: fx.Node

    @classmethod
    def of(cls, editor: Editor, places: fx.Node, count: fx.Node) -> Rows:
        """The tokens in the first places.

        Args:
            editor: where nodes go.
            places: of all tokens; int64, [b, n].
            count: how many are chosen.
        """
        last = editor.call(operator.add, count, -1)
        return cls(editor.call(aten.lt.Scalar, places, count), editor.call(aten.clamp_max.default, places, last))

    def put(self, editor: Editor, rows: fx.Node, value: fx.Node) -> fx.Node:
        """A value ([b, n, ...]) with rows ([b, k, ...]) in the place of those of the chosen tokens."""
        is_chosen = self.is_chosen
        for axis in range(2, tensor_of(value).ndim):
            is_chosen = editor.call(aten.unsqueeze.default, is_chosen, axis)
        return editor.call(aten.where.self, is_chosen, self.taken(editor, rows, value), value)

    def taken(self, editor: Editor, rows: fx.Node, like: fx.Node) -> fx.Node:
        """The row at every token's place, whether it is its own or not; like a value ([b, n, ...])."""
        place = self.place
        for axis in range(2, tensor_of(like).ndim):
            place = editor.call(aten.unsqueeze.default, place, axis)
        place = editor.call(aten.expand.default, place, list(tensor_of(like).shape))
        return editor.call(aten.gather.default, rows, 1, place)


def is_put(node: fx.Node, values: Container[fx.Node]) -> bool:
    """True if a node is one of some values with rows of its own for chosen tokens."""
    return node.target is aten.where.self and node.args[2] in values and _gathered(node).target is aten.gather.default


def rows_of(node: fx.Node) -> fx.Node:
    """The rows that were put into a value."""
    return node_argument(_gathered(node), 0)


def put_alike(editor: Editor, node: fx.Node, rows: fx.Node, value: fx.Node) -> fx.Node:
    """Other rows in the same places of another value, whose last axis may be shorter."""
    place = editor.call(aten.slice.Tensor, _gathered(node).args[2], -1, 0, tensor_of(value).shape[-1])
    return editor.call(aten.where.self, node.args[0], editor.call(aten.gather.default, rows, 1, place), value)


def _gathered(node: fx.Node) -> fx.Node:
    return node_argument(node, 1)
