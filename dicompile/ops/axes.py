"""Operators that move, resize, fold or reduce axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dicompile.nodes import list_argument, node_argument, tensor_of
from dicompile.ops.kinds import NORMS, RESHAPES
from dicompile.ops.layout import Layout, Part
from dicompile.ops.rules import axis_argument, check_apart, sized_as, source_layout
from dicompile.ops.tokens import CarryRule, ChosenTokens, Layouts, MixesTokens, Operator, mixes

aten = torch.ops.aten


def _norm(node: fx.Node, layouts: Layouts) -> Layout:
    layout, count = source_layout(node, layouts), len(list_argument(node, 1))
    for axis in range(len(layout.axes) - count, len(layout.axes)):
        check_apart(node, layout, axis, "normalises over tokens", "normalises over samples")
    return layout


def by_rows(node: fx.Node, layouts: Layouts) -> Layout:
    """Every row of the last axis by itself; the result may be of another width."""
    layout = source_layout(node, layouts)
    check_apart(node, layout, len(layout.axes) - 1, "works on rows of tokens", "works on rows of samples")
    return sized_as(node, layout)


def _group_norm(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    for axis in range(1, len(layout.axes)):
        check_apart(node, layout, axis, "normalises over tokens", "normalises over samples")
    return layout


def _reshape(node: fx.Node, layouts: Layouts) -> Layout:
    before, after = tensor_of(node_argument(node, 0)).shape, tensor_of(node).shape
    layout = source_layout(node, layouts).reshaped(after)
    if layout is None:
        raise MixesTokens(node, f"folds tokens into another axis ({list(before)} to {list(after)})")
    return layout


def _narrow_reshape(_: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    """Gathered values are laid out anew: what was a view of the original may have to copy."""
    return chosen.call(aten.reshape.default, args[0], chosen.shape(layout))


def _transpose(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    order = list(range(len(layout.axes)))
    first, second = axis_argument(node, 1), axis_argument(node, 2)
    order[first], order[second] = second, first
    return layout.moved(order)


def _permute(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    return layout.moved([dim % len(layout.axes) for dim in list_argument(node, 1)])


def _unsqueeze(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = source_layout(node, layouts), axis_argument(node, 1, rank=tensor_of(node).ndim)
    return Layout((*layout.axes[:dim], (), *layout.axes[dim:]))


def _squeeze(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    given = node.args[1]
    dims = {int(dim) % len(layout.axes) for dim in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[arg-type]
    return layout.moved([axis for axis in range(len(layout.axes)) if axis not in dims or layout.size(axis) != 1])


def _expand(node: fx.Node, layouts: Layouts) -> Layout:
    layout, rank = source_layout(node, layouts), tensor_of(node).ndim
    return sized_as(node, layout.moved([*[-1] * (rank - len(layout.axes)), *range(len(layout.axes))]))


def _narrow_expand(node: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    return chosen.call(node.target, args[0], chosen.shape(layout), **node.kwargs)


def _repeat(node: fx.Node, layouts: Layouts) -> Layout:
    layout, rank = source_layout(node, layouts), tensor_of(node).ndim
    layout = layout.moved([*[-1] * (rank - len(layout.axes)), *range(len(layout.axes))])
    for axis, times in enumerate(list_argument(node, 1)):
        if times != 1:
            check_apart(node, layout, axis, "repeats tokens", "repeats samples")
    return sized_as(node, layout)


def _repeat_interleave(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    if len(node.args) < 3:
        raise MixesTokens(node, "folds tokens into another axis")
    check_apart(node, layout, axis_argument(node, 2), "repeats tokens", "repeats samples")
    return sized_as(node, layout)


def _reduction(position: int) -> CarryRule:
    """A reduction whose axes are an argument, followed by whether they stay as axes of one row."""

    def rule(node: fx.Node, layouts: Layouts) -> Layout:
        layout = source_layout(node, layouts)
        rank = len(layout.axes)
        given: Any = node.args[position] if len(node.args) > position else None
        dims = [given] if isinstance(given, int) else given or range(rank)
        reduced = {int(dim) % rank for dim in dims}
        for axis in reduced:
            check_apart(node, layout, axis, "combines all tokens", "combines all samples")
        if len(node.args) > position + 1 and node.args[position + 1]:
            return sized_as(node, layout)
        return layout.moved([axis for axis in range(rank) if axis not in reduced])

    return rule


def _along(position: int, mixes: str, default: int | None = None) -> CarryRule:
    """An operator that works along one axis and may change its size."""

    def rule(node: fx.Node, layouts: Layouts) -> Layout:
        layout = source_layout(node, layouts)
        check_apart(node, layout, axis_argument(node, position, default), f"{mixes} tokens", f"{mixes} samples")
        return sized_as(node, layout)

    return rule


def _flip(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    for dim in list_argument(node, 1):
        check_apart(node, layout, dim % len(layout.axes), "reverses tokens", "reverses samples")
    return layout


def _pad(node: fx.Node, layouts: Layouts) -> Layout:
    layout, sizes = source_layout(node, layouts), list_argument(node, 1)
    for i in range(len(sizes) // 2):
        if sizes[2 * i] or sizes[2 * i + 1]:
            check_apart(node, layout, len(layout.axes) - 1 - i, "pads tokens", "pads samples")
    return sized_as(node, layout)


def _view_as_complex(node: fx.Node, layouts: Layouts) -> Layout:
    return source_layout(node, layouts).moved(range(tensor_of(node).ndim))


def _narrow_view_as_complex(node: fx.Node, args: Sequence[Any], _: Layout, chosen: ChosenTokens) -> fx.Node:
    return chosen.call(node.target, chosen.call(aten.clone.default, args[0], memory_format=torch.contiguous_format))


def _view_as_real(node: fx.Node, layouts: Layouts) -> Layout:
    layout = source_layout(node, layouts)
    return Layout.of((*layout.axes, (Part(2),)))


OPERATORS: Mapping[object, Operator] = {
    **dict.fromkeys(RESHAPES, Operator(_reshape, _narrow_reshape)),
    aten.transpose.int: Operator(_transpose),
    aten.permute.default: Operator(_permute),
    aten.unsqueeze.default: Operator(_unsqueeze),
    aten.squeeze.dim: Operator(_squeeze),
    aten.squeeze.dims: Operator(_squeeze),
    aten.expand.default: Operator(_expand, _narrow_expand),
    aten.repeat.default: Operator(_repeat),
    aten.repeat_interleave.self_int: Operator(_repeat_interleave),
    aten.flip.default: Operator(_flip),
    aten.pad.default: Operator(_pad),
    aten.constant_pad_nd.default: Operator(_pad),
    aten.view_as_complex.default: Operator(_view_as_complex, _narrow_view_as_complex),
    aten.view_as_real.default: Operator(_view_as_real),
    **dict.fromkeys(NORMS, Operator(_norm)),
    aten.group_norm.default: Operator(_group_norm),
    aten.softmax.int: Operator(_along(1, "normalises over")),
    aten._softmax.default: Operator(_along(1, "normalises over")),
    aten.index_select.default: Operator(_along(1, "picks")),
    aten.cumsum.default: Operator(_along(1, "adds up")),
    aten.mean.dim: Operator(_reduction(1)),
    aten.sum.dim_IntList: Operator(_reduction(1)),
    aten.amax.default: Operator(_reduction(1)),
    aten.amin.default: Operator(_reduction(1)),
    aten.any.dim: Operator(_reduction(1)),
    aten.linalg_vector_norm.default: Operator(_reduction(2)),
    aten.mean.default: mixes("combines all tokens"),
    aten.sum.default: mixes("combines all tokens"),
}
