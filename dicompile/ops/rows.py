"""Operators that take, join or write rows of an axis."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dicompile.nodes import int_argument, list_argument, node_argument, tensor_of
from dicompile.ops.kinds import SPLITS
from dicompile.ops.layout import Layout, Of, Part
from dicompile.ops.rules import Axes, axis_argument, check_apart, combine, sized_as, source_layout
from dicompile.ops.tokens import Carried, ChosenTokens, Layouts, MixesTokens, Operator, mixes

aten = torch.ops.aten


def _split(node: fx.Node, layouts: Layouts) -> Layout:
    """Of parts of the token axis, too: each of them says by itself which tokens it takes."""
    layout, dim = source_layout(node, layouts), _split_axis(node)
    if layout.counts(dim) and layout.padding(dim) is None:
        raise MixesTokens(node, f"splits the {'token' if layout.counts(dim, Of.TOKENS) else 'sample'} axis")
    return layout


def _narrow_split(node: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    """Parts of the token axis are slices of what is split."""
    if layout.counts(_split_axis(node)):
        whole: fx.Node = args[0]
        return whole
    return chosen.call(node.target, *args, **node.kwargs)


def _split_axis(node: fx.Node) -> int:
    """The axis that a split takes apart."""
    return axis_argument(node, 2, 0)


def _getitem(node: fx.Node, layouts: Layouts) -> Layout:
    source = node_argument(node, 0)
    layout, taken = layouts[source], taken_rows(node)
    if taken is not None and layout.padding(taken[0]) is not None:
        return _rows(node, layout, *taken)
    return sized_as(node, layout)


def taken_rows(node: fx.Node) -> tuple[int, int, int] | None:
    """Axis, first and last + 1 row of what a slice or a part of a split takes; None for other nodes."""
    if node.target is aten.slice.Tensor:
        dim = axis_argument(node, 1, 0)
        size = tensor_of(node_argument(node, 0)).shape[dim]
        start, _, _ = slice(*(node.args[2:4] if len(node.args) > 3 else (*node.args[2:3], None))).indices(int(size))
        return dim, start, start + int(tensor_of(node).shape[dim])
    source = node_argument(node, 0) if node.target is operator.getitem else node
    if source.target not in SPLITS or source is node:
        return None
    dim = _split_axis(source)
    sizes = [int(part.shape[dim]) for part in source.meta["val"]]
    first = sum(sizes[: int_argument(node, 1)])
    return dim, first, first + sizes[int_argument(node, 1)]


def _narrow_taken(node: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    """Chosen tokens with the other rows around them that are taken, too."""
    taken = taken_rows(node)
    if taken is None or not layout.counts(taken[0]):
        return chosen.call(node.target, *args, **node.kwargs)
    if chosen.alone:
        tokens: fx.Node = args[0]
        return tokens
    axis, first, last = taken
    return chosen.call(aten.slice.Tensor, args[0], axis, first, chosen.size(plus=last - chosen.tokens))


def _slice(node: fx.Node, layouts: Layouts) -> Layout:
    layout, taken = source_layout(node, layouts), taken_rows(node)
    assert taken is not None
    axis, first, last = taken
    if (first, last) == (0, layout.size(axis)):
        return layout
    if layout.padding(axis) is not None and (len(node.args) < 5 or node.args[4] == 1):
        return _rows(node, layout, axis, first, last)
    check_apart(node, layout, axis, "takes a range of tokens", "takes a range of samples")
    return sized_as(node, layout)


def _rows(node: fx.Node, layout: Layout, axis: int, first: int, last: int) -> Layout:
    """Some rows of an axis with other rows around the tokens."""
    (part,) = layout.axes[axis]
    if first > part.before or last < part.size - part.after:
        raise MixesTokens(node, "takes rows beside the tokens, or a range of them")
    kept = replace(part, size=last - first, before=part.before - first, after=last - part.size + part.after)
    return sized_as(node, layout.with_axis(axis, (kept,)))


def _select(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = source_layout(node, layouts), axis_argument(node, 1)
    check_apart(node, layout, dim, "picks one token", "picks one sample")
    return layout.moved([axis for axis in range(len(layout.axes)) if axis != dim])


def _unbind(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = source_layout(node, layouts), axis_argument(node, 1, 0)
    check_apart(node, layout, dim, "takes tokens apart", "takes samples apart")
    return layout.moved([axis for axis in range(len(layout.axes)) if axis != dim])


def _cat(node: fx.Node, layouts: Layouts) -> Carried:
    parts, rank = list_argument(node, 0), tensor_of(node).ndim
    dim = int_argument(node, 1, 0) % rank
    carriers = [part for part in parts if part in layouts]
    if layouts[carriers[0]].counts(dim):
        return Carried(_between_others(node, parts, carriers, dim, layouts))
    axes = [None if axis == dim else axis for axis in range(rank)]
    return combine(node, layouts, dict.fromkeys(parts, axes), "joins tokens with others")


def _between_others(
    node: fx.Node, parts: Sequence[fx.Node], carriers: Sequence[fx.Node], dim: int, layouts: Layouts
) -> Layout:
    """Rows of other things around the tokens, as joint attention has them."""
    layout = layouts[carriers[0]]
    tokens = layout.axes[dim]
    if len(carriers) > 1 or len(tokens) != 1 or layout.counted != (*layout.of_samples, *tokens):
        raise MixesTokens(node, "joins tokens with others")
    first = parts.index(carriers[0])
    before, after = (sum(int(tensor_of(p).shape[dim]) for p in some) for some in (parts[:first], parts[first + 1 :]))
    (part,) = tokens
    around = replace(
        part, size=part.size + before + after, before=part.before + before, after=part.after + after
    )  # fmt: skip
    return layout.with_axis(dim, (around,))


def _narrow_cat(node: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    """Rows that are joined with the tokens stay where they are, or are left out."""
    if not (chosen.alone and layout.counts(int_argument(node, 1, 0) % tensor_of(node).ndim)):
        return chosen.call(node.target, *args, **node.kwargs)
    pairs = zip(list_argument(node, 0), args[0], strict=True)
    tokens: fx.Node = next(part for original, part in pairs if part is not original)
    return tokens


def _stack(node: fx.Node, layouts: Layouts) -> Carried:
    rank = tensor_of(node).ndim
    dim = int_argument(node, 1, 0) % rank
    axes = [axis for axis in range(rank) if axis != dim]
    return combine(node, layouts, dict.fromkeys(list_argument(node, 0), axes))


def _embedding(node: fx.Node, layouts: Layouts) -> Layout:
    """Rows of a table for every index: where indices are, there are the rows."""
    table, indices = node_argument(node, 0), node_argument(node, 1)
    if table in layouts:
        raise MixesTokens(node, "picks rows by an index, maybe of tokens")
    return Layout.of((*layouts[indices].axes, (Part(int(tensor_of(node).shape[-1])),)))


def _write_rows(node: fx.Node, layouts: Layouts) -> Carried:
    """``slice_scatter`` and ``select_scatter``: a value with some rows of an axis replaced."""
    rank, dim = tensor_of(node).ndim, axis_argument(node, 2, 0)
    into, rows = node_argument(node, 0), node_argument(node, 1)
    whole: Axes = [None if axis == dim else axis for axis in range(rank)]
    one = [axis for axis in range(rank) if axis != dim]
    if into in layouts and layouts[into].padding(dim) is not None and node.target is aten.slice_scatter.default:
        return _write_between_others(node, layouts, dim)
    of_rows = one if node.target is aten.select_scatter.default else whole
    return combine(node, layouts, {into: whole, rows: of_rows}, "writes to some of the tokens")


def _write_between_others(node: fx.Node, layouts: Layouts, dim: int) -> Carried:
    """Rows written to an axis with other rows around the tokens: all tokens, or none of them."""
    into, rows = node_argument(node, 0), node_argument(node, 1)
    (part,) = layouts[into].axes[dim]
    first, last = _written_rows(node)
    if rows in layouts:
        around = replace(part, size=last - first, before=part.before - first, after=last - part.size + part.after)
        fits = min(around.before, around.after) >= 0 and layouts[rows] == layouts[into].with_axis(dim, (around,))
    else:
        fits = _lies_beside(part, first, last)
    if not fits or (len(node.args) > 5 and node.args[5] != 1):
        raise MixesTokens(node, "writes to some of the tokens")
    return Carried(layouts[into])


def _lies_beside(part: Part, first: int, last: int) -> bool:
    """True for rows none of which is a token."""
    return last <= part.before or first >= part.size - part.after


def _written_rows(node: fx.Node) -> tuple[int, int]:
    """First and last + 1 row of an axis that ``slice_scatter`` writes to."""
    dim = axis_argument(node, 2, 0)
    given = [*node.args[3:5], None, None][:2]
    first, last, _ = slice(*given).indices(int(tensor_of(node).shape[dim]))
    return first, last


def _narrow_written(node: fx.Node, args: Sequence[Any], layout: Layout, chosen: ChosenTokens) -> fx.Node:
    """Rows around the tokens stay where they are, or move with the end of the chosen ones."""
    axis = axis_argument(node, 2, 0)
    if not layout.counts(axis):
        return chosen.call(node.target, *args, **node.kwargs)
    (part,) = layout.axes[axis]
    if chosen.alone:
        tokens: fx.Node = args[0 if _lies_beside(part, *_written_rows(node)) else 1]
        return tokens
    bounds = [row if row <= part.before else chosen.size(plus=row - chosen.tokens) for row in _written_rows(node)]
    return chosen.call(node.target, *args[:2], axis, *bounds, **node.kwargs)


OPERATORS: Mapping[object, Operator] = {
    **dict.fromkeys(SPLITS, Operator(_split, _narrow_split)),
    operator.getitem: Operator(_getitem, _narrow_taken),
    aten.slice.Tensor: Operator(_slice, _narrow_taken),
    aten.select.int: Operator(_select),
    aten.unbind.int: Operator(_unbind),
    aten.cat.default: Operator(_cat, _narrow_cat),
    aten.stack.default: Operator(_stack),
    aten.slice_scatter.default: Operator(_write_rows, _narrow_written),
    aten.select_scatter.default: Operator(_write_rows),
    aten.embedding.default: Operator(_embedding),
    aten.index.Tensor: mixes("picks rows by an index, maybe of tokens"),
    aten.index_put.default: mixes("writes to rows of an index, maybe of tokens"),
    aten.gather.default: mixes("picks values by an index, maybe of other tokens"),
}
