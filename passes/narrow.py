"""Chosen tokens in the place of all: sizes and operands of a branch's operators for `k` tokens per sample.

What `dicompile.ops.layout.Layout` says of a value, that its axes count samples, tokens and other things, is enough for
all of it: the outermost part of tokens becomes `k`, the other parts of tokens become 1.
How each operator runs on them stands in `dicompile.ops.operators`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dicompile.nodes import tensor_of
from dicompile.ops.kinds import FILLS
from dicompile.ops.layout import Layout, Of, Part
from dicompile.ops.operators import narrowed
from dicompile.ops.tokens import Carried
from dicompile.passes.edit import Editor

aten = torch.ops.aten


class Narrow:
    """Makes nodes for chosen tokens.

    Args:
        editor: where they go; it stands before the branch's end.
        chosen: indices of the tokens; int64, [b, k].
        count: their number `k`.
        samples: `b`.
        tokens: number of all tokens.
        alone: True if rows that were joined with the tokens, which lie around them then, are left out.
    """

    def __init__(
        self, editor: Editor, chosen: fx.Node, count: fx.Node, samples: int, tokens: int, *, alone: bool = False
    ) -> None:
        self.editor, self.chosen, self.count = editor, chosen, count
        self.samples, self.tokens, self.alone = samples, tokens, alone
        self._sizes: dict[tuple[int, int], fx.Node] = {}
        self._indices: dict[tuple[int, int], fx.Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator on nodes and constants."""
        return self.editor.call(target, *args, **kwargs)

    def size(self, times: int = 1, plus: int = 0) -> fx.Node:
        """``times * (k + plus)``."""
        if (times, plus) not in self._sizes:
            size = self.call(operator.add, self.count, plus) if plus else self.count
            self._sizes[times, plus] = self.call(operator.mul, size, times) if times != 1 else size
        return self._sizes[times, plus]

    def shape(self, layout: Layout) -> list[Any]:
        """Sizes of a value for chosen tokens."""
        return [self._axis(parts, layout) for parts in layout.axes]

    def _axis(self, parts: Sequence[Part], layout: Layout) -> int | fx.Node:
        lead = layout.of_tokens[0]
        fixed = math.prod(part.size for part in parts if part.of is not Of.TOKENS)
        return self.size(fixed, self._around(lead)) if lead in parts else fixed

    def _around(self, part: Part) -> int:
        """Rows around the chosen tokens."""
        return 0 if self.alone else part.before + part.after

    def index(self, before: int, after: int) -> fx.Node:
        """Rows to take of an axis with other rows around the tokens; int64, [b, before + k + after], or [b, k]."""
        if self.alone:
            after = 0
        if not before and not after:
            return self.chosen
        if (before, after) not in self._indices:
            moved = self.call(aten.add.Tensor, self.chosen, before) if before else self.chosen
            if not self.alone:
                first = [self._others(0, before)] if before else []
                last = [self._others(before + self.tokens, after)] if after else []
                moved = self.call(aten.cat.default, [*first, moved, *last], 1)
            self._indices[before, after] = moved
        return self._indices[before, after]

    def _others(self, first: int, size: int) -> fx.Node:
        device = tensor_of(self.chosen).device
        rows = self.call(aten.arange.start, first, first + size, device=device, pin_memory=False)
        return self.call(aten.expand.default, rows, [self.samples, size])

    def gather(self, node: fx.Node, layout: Layout) -> fx.Node:
        """The chosen tokens of a value that holds all; axes that it is broadcast along may be of one row or missing."""
        if node.target in FILLS:
            return self.call(node.target, self.shape(layout), *node.args[1:], **node.kwargs)
        missing = len(layout.axes) - tensor_of(node).ndim
        node = self._viewed(node, [*[1] * missing, *tensor_of(node).shape])
        node = self._expanded(node, [layout.size(axis) for axis in range(len(layout.axes))])
        parts = [part for axis in layout.axes for part in axis]
        node = self._viewed(node, [part.size for part in parts])
        samples, tokens = layout.of_samples, layout.of_tokens
        if len(tokens) == 1 and len(samples) == (self.samples > 1):
            lead, axis = tokens[0], parts.index(tokens[0])
            if self.samples == 1:
                node = self._viewed(node, [1, *tensor_of(node).shape])
                return self._viewed(self._taken(node, axis + 1, 0, lead), self.shape(layout))
            return self._viewed(self._taken(node, axis, parts.index(samples[0]), lead), self.shape(layout))
        order = [parts.index(part) for part in (*samples, *tokens)]
        order += [axis for axis in range(len(parts)) if axis not in order]
        others = [parts[axis].size for axis in order[len(samples) + len(tokens) :]]
        node = self.call(aten.permute.default, node, order)
        node = self._viewed(node, [self.samples, self.tokens, *others])
        node = self._taken(node, 1, 0, Part(self.tokens, Of.TOKENS, 1))
        inner = [part.size for part in samples] + [self.count] + [1] * (len(tokens) - 1)
        node = self._viewed(node, [*inner, *others])
        node = self.call(aten.permute.default, node, [order.index(axis) for axis in range(len(order))])
        return self._viewed(node, self.shape(layout))

    def _taken(self, node: fx.Node, axis: int, samples: int, part: Part) -> fx.Node:
        return self.call(aten.gather.default, node, axis, self.rows(node, axis, samples, part))

    def rows(self, like: fx.Node, axis: int = 1, samples: int = 0, part: Part | None = None) -> fx.Node:
        """Indices expanded to gather or scatter whole rows of `like`; int64, its shape with chosen tokens."""
        part = part or Part(self.tokens, Of.TOKENS, 1)
        size = self.size(plus=self._around(part))
        shape: list[Any] = list(tensor_of(like).shape)
        view: list[Any] = [1] * len(shape)
        shape[samples] = view[samples] = self.samples
        shape[axis] = view[axis] = size
        index = self.index(part.before, part.after)
        if samples > axis:
            index = self.call(aten.transpose.int, index, 0, 1)
        index = self.call(aten.view.default if samples < axis else aten.reshape.default, index, view)
        return self.call(aten.expand.default, index, shape)

    def _viewed(self, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
        # Sizes are compared as text: `==` of a symbolic one would bind it to the example it was traced with.
        known = [str(size.meta["val"] if isinstance(size, fx.Node) else size) for size in shape]
        if known == [str(size) for size in tensor_of(node).shape]:
            return node
        return self.call(aten.reshape.default, node, list(shape))

    def _expanded(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        if list(tensor_of(node).shape) == list(shape):
            return node
        return self.call(aten.expand.default, node, list(shape))

    def copied(self, node: fx.Node, carried: Carried, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A node of the branch for chosen tokens.

        Args:
            node: the original.
            carried: what it does to tokens.
            copies: its operands for chosen tokens, those that come from the stream.
        """
        replaced = {**copies, **{operand: self.gather(operand, own) for operand, own in carried.operands.items()}}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: replaced.get(operand, operand))
        return narrowed(node, args, kwargs, carried.layout, self)
