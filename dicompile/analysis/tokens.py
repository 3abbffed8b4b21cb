"""Where tokens are in every node of a branch, and which operator mixes them.

Abstract interpretation: starting from the residual stream, each operator either keeps tokens apart, so that one knows
which axes count them behind it (see `Layout`), or mixes them. A branch that keeps them apart to its end can be
recomputed for a subset of its tokens. Attention mixes through keys and values; if those do not come from the stream
(cross-attention) the branch is still token-wise, otherwise its queries are, and everything is once the attention's
output is at hand.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from dicompile.analysis.cost import ATTENTION, CONVOLUTIONS
from dicompile.analysis.layout import Axis, Layout, Of, Part
from dicompile.nodes import int_argument, list_argument, node_argument, tensor_of
from dicompile.text import module_path, operator_text

aten = torch.ops.aten

ELEMENTWISE = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.reciprocal.default, aten.neg.default, aten.abs.default,
    aten.square.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.sqrt.default,
    aten.rsqrt.default, aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.tanh.default,
    aten.erf.default, aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.leaky_relu.default, aten.elu.default, aten.softplus.default, aten.mish.default, aten.hardswish.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten._conj.default, aten.nan_to_num.default,
    aten.isnan.default, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar,
    aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.bitwise_not.default,
    aten.__and__.Tensor, aten.__or__.Tensor, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default,
})  # fmt: skip
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})


class MixesTokens(Exception):
    """An operator of the branch combines values of different tokens; the text names it and its module."""

    def __init__(self, node: fx.Node, why: str) -> None:
        path = module_path(node)
        super().__init__(f"{operator_text(node.target)}{f' in {path}' if path else ''} {why}")


class Mixing(enum.Enum):
    """What is assumed of attention whose keys and values come from the stream itself."""

    FORBIDDEN = "forbidden"
    QUERIES = "queries"
    """Keys and values are there, whoever computes them: the queries alone carry tokens."""

    STORED = "stored"
    """Its output is there: tokens start from it as they do from the stream."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What an operator does to tokens.

    Attributes:
        layout: where they are in its result; of several results, in each of them but for sizes of other axes.
        operands: operands that do not come from the stream but have a value per token, laid out as the result is:
            with as many axes as needed for samples and tokens, though their own may be of one row or missing.
    """

    layout: Layout
    operands: Mapping[fx.Node, Layout] = field(default_factory=dict)


Layouts = Mapping[fx.Node, Layout]


def token_layouts(
    region: Collection[fx.Node], stream: fx.Node, layout: Layout, mixing: Mixing = Mixing.FORBIDDEN
) -> dict[fx.Node, Carried]:
    """What every node does that carries tokens of the stream.

    Args:
        region: nodes of the branch in graph order.
        stream: the stream value they start from.
        layout: where its tokens are.
        mixing: what is assumed of attention over the same tokens.

    Raises:
        MixesTokens: an operator mixes tokens, or is not known not to.
    """
    carried = {stream: Carried(layout)}
    layouts = {stream: layout}
    if mixing is Mixing.STORED:
        return carried | _from_stored_attention(region, layouts)
    for node in region:
        if any(parent in layouts for parent in node.all_input_nodes):
            opened = node.target is ATTENTION and mixing is Mixing.QUERIES
            if _is_beside_tokens(node, layouts):
                continue
            carried[node] = _open_attention(node, layouts) if opened else _carry(node, layouts)
            layouts[node] = carried[node].layout
    return carried


def _is_beside_tokens(node: fx.Node, layouts: Layouts) -> bool:
    """True for rows that were joined with the tokens and have nothing of them: no attention is on the way."""
    taken = taken_rows(node)
    if taken is None or node_argument(node, 0) not in layouts:
        return False
    part = layouts[node_argument(node, 0)].padding(taken[0])
    if part is None or not (taken[2] <= part.before or taken[1] >= part.size - part.after):
        return False
    queue = [node_argument(node, 0)]
    while queue:
        parent = queue.pop()
        if parent.target is ATTENTION:
            return False
        queue += [p for p in parent.all_input_nodes if p in layouts]
    return True


def _from_stored_attention(region: Collection[fx.Node], layouts: dict[fx.Node, Layout]) -> dict[fx.Node, Carried]:
    """What nodes do that are needed for the branch's end when the output of its attention is at hand."""
    (layout,) = layouts.values()
    wanted, mixed = _behind_stored(region), set[fx.Node]()
    carried = {}
    for node in region:
        parents = node.all_input_nodes
        if not any(parent in layouts or parent in mixed for parent in parents) or _is_beside_tokens(node, layouts):
            continue
        try:
            if node.target is ATTENTION:
                carried[node] = Carried(_layout_of_output(node, layouts, layout))
            elif any(parent in mixed for parent in parents):
                mixed.add(node)
            else:
                carried[node] = _carry(node, layouts)
        except MixesTokens:
            if node in wanted:
                raise
            mixed.add(node)
        if node in carried:
            layouts[node] = carried[node].layout
    return {node: what for node, what in carried.items() if node in wanted}


def _behind_stored(region: Collection[fx.Node]) -> set[fx.Node]:
    members, needed = list(region), set[fx.Node]()
    inside = set(members)
    queue = members[-1:]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += [p for p in node.all_input_nodes if p in inside] if node.target is not ATTENTION else []
    return needed


def _layout_of_output(node: fx.Node, layouts: Layouts, stream: Layout) -> Layout:
    """Where tokens are in the output of attention: where its queries are; in rows where those are mixed before."""
    output, query = tensor_of(node), node_argument(node, 0)
    if query in layouts:
        layout = layouts[query]
        return layout.resized(output.ndim - 1, output.shape[-1])
    samples, tokens = (tuple(p for axis in stream.axes for p in axis if p.of is of) for of in (Of.SAMPLES, Of.TOKENS))
    expected = Layout(tuple(
        samples if axis == 0 else tokens if axis == output.ndim - 2 else (Part(size),)
        for axis, size in enumerate(output.shape)
    ))  # fmt: skip
    if output.ndim < 3 or [expected.size(axis) for axis in range(output.ndim)] != list(output.shape):
        raise MixesTokens(node, "attends over other tokens than the branch has")
    return expected


def _open_attention(node: fx.Node, layouts: Layouts) -> Carried:
    """Attention of chosen tokens, whose keys and values are those of all tokens, or of the chosen ones."""
    query, key, value = (node_argument(node, i) for i in range(3))
    if key not in layouts and value not in layouts:
        return _attention(node, layouts)
    if query not in layouts or not layouts[query].counts(tensor_of(query).ndim - 2, Of.TOKENS):
        raise MixesTokens(node, "attends along another axis than tokens")
    if key not in layouts or value not in layouts:
        raise MixesTokens(node, "has keys without values of the same tokens")
    rows, keys, values = ([*layouts[part].axes] for part in (query, key, value))
    leading = range(len(rows) - 2)
    grouped = any(layouts[query].counts(axis, Of.TOKENS) for axis in leading) or any(
        _counted(rows[axis]) != _counted(part[axis]) for part in (keys, values) for axis in leading
    )
    alike = layouts[key].of_tokens == keys[-2] == values[-2] == layouts[value].of_tokens
    if grouped or not alike or len(keys[-2]) != 1:
        raise MixesTokens(node, "attends within groups of tokens")
    # As for cross-attention, but for a mask with a value per key: its columns go with the keys.
    closed = {parent: layout for parent, layout in layouts.items() if parent not in (key, value)}
    carried = _attention(node, closed)
    operands = {parent: layout for parent, layout in carried.operands.items() if parent not in (key, value)}
    mask = _mask_of(node)
    if mask is not None and tensor_of(mask).shape[-1] != 1:
        if mask in operands:
            raise MixesTokens(node, "has a mask with a value for every pair of tokens")
        rank, own = len(rows), tensor_of(mask).ndim
        per_key = carried.layout.with_axis(rank - 1, keys[-2]).with_axis(rank - 2, ())
        columns = _expected(node, per_key, mask, range(rank - own, rank))
        assert columns is not None
        operands[mask] = columns
    return Carried(carried.layout, operands)


def _carry(node: fx.Node, layouts: Layouts) -> Carried:
    if node.target in ELEMENTWISE:
        if not isinstance(node.meta["val"], torch.Tensor):
            raise MixesTokens(node, "returns no tensor")
        return _combine(node, layouts, {parent: _from_right(node, parent) for parent in node.all_input_nodes})
    rule = _RULES.get(node.target)
    if rule is None:
        raise MixesTokens(node, _KNOWN_TO_MIX.get(node.target, "is not known to keep tokens apart"))
    result = rule(node, layouts)
    return result if isinstance(result, Carried) else Carried(result)


_Rule = Callable[[fx.Node, Layouts], Layout | Carried]
_Axes = Sequence[int | None]
"""For every axis of an operand, from the right, the axis of the result that it goes with; None if it goes with none."""

_DIFFERENT = "combines tokens along different axes"


def _from_right(node: fx.Node, parent: fx.Node) -> _Axes:
    rank, own = tensor_of(node).ndim, tensor_of(parent).ndim
    return range(rank - own, rank)


def _combine(node: fx.Node, layouts: Layouts, operands: Mapping[fx.Node, _Axes], mixes: str = _DIFFERENT) -> Carried:
    """Result of operands whose axes go along with axes of the result: all that count tokens have to agree.

    Args:
        node: the operator.
        layouts: of operands that carry tokens.
        operands: axes of every operand.
        mixes: what to say where tokens are on an axis that does not go along, or on different ones.
    """
    carriers = [parent for parent in operands if parent in layouts]
    if any(axis is None and layouts[p].counts(own) for p in carriers for own, axis in enumerate(operands[p])):
        raise MixesTokens(node, mixes)
    axes: list[Axis] = []
    for axis, size in enumerate(tensor_of(node).shape):
        found = {
            layouts[p].axes[operands[p].index(axis)] if axis in operands[p] else () for p in carriers
        }  # fmt: skip
        if not any(part.of is not Of.OTHERS for parts in found for part in parts):
            found = {(Part(int(size)),)}
        if len(found) > 1:
            raise MixesTokens(node, mixes)
        axes += found
    result = Layout.of(axes)
    expected = {
        parent: _expected(node, result, parent, going) for parent, going in operands.items() if parent not in layouts
    }
    return Carried(result, {parent: layout for parent, layout in expected.items() if layout is not None})


def _expected(node: fx.Node, result: Layout, parent: fx.Node, going: _Axes) -> Layout | None:
    """Layout of an operand that is not of the stream; None where it has no value per token."""
    shape = tensor_of(parent).shape
    if not any(
        axis is not None and result.counts(axis, Of.TOKENS) and size != 1
        for axis, size in zip(going, shape, strict=True)
    ):
        return None
    missing = result.axes[: going[0]] if going[0] is not None else ()
    own = (
        result.axes[axis] if axis is not None and result.counts(axis) else (Part(int(size)),)
        for axis, size in zip(going, shape, strict=True)
    )  # fmt: skip
    layout = Layout.of((*(_counted(parts) for parts in missing), *own))
    if layout.counted != result.counted:
        raise MixesTokens(node, "has an operand with values for groups of tokens")
    return layout


def _is_counting(parts: Axis) -> bool:
    return any(part.of is not Of.OTHERS for part in parts)


def _counted(parts: Axis) -> Axis:
    """The parts if any counts samples or tokens: numbers of heads may differ."""
    return parts if _is_counting(parts) else ()


def _source(node: fx.Node, layouts: Layouts) -> Layout:
    """Layout of the first operand, which alone may carry tokens."""
    source = node_argument(node, 0)
    if source not in layouts or any(parent in layouts for parent in node.all_input_nodes if parent is not source):
        raise MixesTokens(node, "takes tokens as something else than its first operand")
    return layouts[source]


def _dim(node: fx.Node, position: int, default: int | None = None, rank: int | None = None) -> int:
    return int_argument(node, position, default) % (rank or tensor_of(node_argument(node, 0)).ndim)


def _apart(node: fx.Node, layout: Layout, axis: int, of_tokens: str, of_samples: str = "combines samples") -> None:
    """Check that an axis counts neither samples nor tokens."""
    if layout.counts(axis):
        raise MixesTokens(node, of_tokens if layout.counts(axis, Of.TOKENS) else of_samples)


def _sized_as(node: fx.Node, layout: Layout) -> Layout:
    """With the node's own sizes on axes that count neither samples nor tokens."""
    shape = tensor_of(node).shape
    return Layout.of(
        parts if _is_counting(parts) else (Part(int(size)),) for parts, size in zip(layout.axes, shape, strict=True)
    )


def _linear(node: fx.Node, layouts: Layouts) -> Carried:
    source, *parameters = node.all_input_nodes
    rank = tensor_of(node).ndim
    if node.args[0] is not source or any(parameter in layouts for parameter in parameters):
        raise MixesTokens(node, "contracts the token axis")
    return _combine(node, layouts, {source: (*range(rank - 1), None)}, "contracts the token axis")


def _norm(node: fx.Node, layouts: Layouts) -> Layout:
    layout, count = _source(node, layouts), len(list_argument(node, 1))
    for axis in range(len(layout.axes) - count, len(layout.axes)):
        _apart(node, layout, axis, "normalises over tokens", "normalises over samples")
    return layout


def _group_norm(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    for axis in range(1, len(layout.axes)):
        _apart(node, layout, axis, "normalises over tokens", "normalises over samples")
    return layout


def _reshape(node: fx.Node, layouts: Layouts) -> Layout:
    before, after = tensor_of(node_argument(node, 0)).shape, tensor_of(node).shape
    layout = _source(node, layouts).reshaped(after)
    if layout is None:
        raise MixesTokens(node, f"folds tokens into another axis ({list(before)} to {list(after)})")
    return layout


def _transpose(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    order = list(range(len(layout.axes)))
    first, second = _dim(node, 1), _dim(node, 2)
    order[first], order[second] = second, first
    return layout.moved(order)


def _permute(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    return layout.moved([dim % len(layout.axes) for dim in list_argument(node, 1)])


def _unsqueeze(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = _source(node, layouts), _dim(node, 1, rank=tensor_of(node).ndim)
    return Layout((*layout.axes[:dim], (), *layout.axes[dim:]))


def _squeeze(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    given = node.args[1]
    dims = {int(dim) % len(layout.axes) for dim in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[arg-type]
    return layout.moved([axis for axis in range(len(layout.axes)) if axis not in dims or layout.size(axis) != 1])


def _expand(node: fx.Node, layouts: Layouts) -> Layout:
    layout, rank = _source(node, layouts), tensor_of(node).ndim
    return _sized_as(node, layout.moved([*[-1] * (rank - len(layout.axes)), *range(len(layout.axes))]))


def _repeat(node: fx.Node, layouts: Layouts) -> Layout:
    layout, rank = _source(node, layouts), tensor_of(node).ndim
    layout = layout.moved([*[-1] * (rank - len(layout.axes)), *range(len(layout.axes))])
    for axis, times in enumerate(list_argument(node, 1)):
        if times != 1:
            _apart(node, layout, axis, "repeats tokens", "repeats samples")
    return _sized_as(node, layout)


def _repeat_interleave(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    if len(node.args) < 3:
        raise MixesTokens(node, "folds tokens into another axis")
    _apart(node, layout, _dim(node, 2), "repeats tokens", "repeats samples")
    return _sized_as(node, layout)


def _reduction(position: int) -> _Rule:
    """A reduction whose axes are an argument, followed by whether they stay as axes of one row."""

    def rule(node: fx.Node, layouts: Layouts) -> Layout:
        layout = _source(node, layouts)
        rank = len(layout.axes)
        given: Any = node.args[position] if len(node.args) > position else None
        dims = [given] if isinstance(given, int) else given or range(rank)
        reduced = {int(dim) % rank for dim in dims}
        for axis in reduced:
            _apart(node, layout, axis, "combines all tokens", "combines all samples")
        if len(node.args) > position + 1 and node.args[position + 1]:
            return _sized_as(node, layout)
        return layout.moved([axis for axis in range(rank) if axis not in reduced])

    return rule


def _along(position: int, mixes: str, default: int | None = None) -> _Rule:
    """An operator that works along one axis and may change its size."""

    def rule(node: fx.Node, layouts: Layouts) -> Layout:
        layout = _source(node, layouts)
        _apart(node, layout, _dim(node, position, default), f"{mixes} tokens", f"{mixes} samples")
        return _sized_as(node, layout)

    return rule


def _flip(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    for dim in list_argument(node, 1):
        _apart(node, layout, dim % len(layout.axes), "reverses tokens", "reverses samples")
    return layout


def _pad(node: fx.Node, layouts: Layouts) -> Layout:
    layout, sizes = _source(node, layouts), list_argument(node, 1)
    for i in range(len(sizes) // 2):
        if sizes[2 * i] or sizes[2 * i + 1]:
            _apart(node, layout, len(layout.axes) - 1 - i, "pads tokens", "pads samples")
    return _sized_as(node, layout)


def _split(node: fx.Node, layouts: Layouts) -> Layout:
    """Of parts of the token axis, too: each of them says by itself which tokens it takes."""
    layout, dim = _source(node, layouts), split_axis(node)
    if layout.counts(dim) and layout.padding(dim) is None:
        raise MixesTokens(node, f"splits the {'token' if layout.counts(dim, Of.TOKENS) else 'sample'} axis")
    return layout


def split_axis(node: fx.Node) -> int:
    """The axis that a split takes apart."""
    return _dim(node, 2, 0)


def _getitem(node: fx.Node, layouts: Layouts) -> Layout:
    source = node_argument(node, 0)
    layout, taken = layouts[source], taken_rows(node)
    if taken is not None and layout.padding(taken[0]) is not None:
        return _rows(node, layout, *taken)
    return _sized_as(node, layout)


def taken_rows(node: fx.Node) -> tuple[int, int, int] | None:
    """Axis, first and last + 1 row of what a slice or a part of a split takes; None for other nodes."""
    if node.target is aten.slice.Tensor:
        dim = _dim(node, 1, 0)
        size = tensor_of(node_argument(node, 0)).shape[dim]
        start, _, _ = slice(*(node.args[2:4] if len(node.args) > 3 else (*node.args[2:3], None))).indices(int(size))
        return dim, start, start + int(tensor_of(node).shape[dim])
    source = node_argument(node, 0) if node.target is operator.getitem else node
    if source.target not in SPLITS or source is node:
        return None
    dim = split_axis(source)
    sizes = [int(part.shape[dim]) for part in source.meta["val"]]
    first = sum(sizes[: int_argument(node, 1)])
    return dim, first, first + sizes[int_argument(node, 1)]


def _slice(node: fx.Node, layouts: Layouts) -> Layout:
    layout, taken = _source(node, layouts), taken_rows(node)
    assert taken is not None
    axis, first, last = taken
    if (first, last) == (0, layout.size(axis)):
        return layout
    if layout.padding(axis) is not None and (len(node.args) < 5 or node.args[4] == 1):
        return _rows(node, layout, axis, first, last)
    _apart(node, layout, axis, "takes a range of tokens", "takes a range of samples")
    return _sized_as(node, layout)


def _rows(node: fx.Node, layout: Layout, axis: int, first: int, last: int) -> Layout:
    """Some rows of an axis with other rows around the tokens."""
    (part,) = layout.axes[axis]
    if first > part.before or last < part.size - part.after:
        raise MixesTokens(node, "takes rows beside the tokens, or a range of them")
    kept = replace(part, size=last - first, before=part.before - first, after=last - part.size + part.after)
    return _sized_as(node, layout.with_axis(axis, (kept,)))


def _select(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = _source(node, layouts), _dim(node, 1)
    _apart(node, layout, dim, "picks one token", "picks one sample")
    return layout.moved([axis for axis in range(len(layout.axes)) if axis != dim])


def _unbind(node: fx.Node, layouts: Layouts) -> Layout:
    layout, dim = _source(node, layouts), _dim(node, 1, 0)
    _apart(node, layout, dim, "takes tokens apart", "takes samples apart")
    return layout.moved([axis for axis in range(len(layout.axes)) if axis != dim])


def _cat(node: fx.Node, layouts: Layouts) -> Carried:
    parts, rank = list_argument(node, 0), tensor_of(node).ndim
    dim = int_argument(node, 1, 0) % rank
    carriers = [part for part in parts if part in layouts]
    if layouts[carriers[0]].counts(dim):
        return Carried(_between_others(node, parts, carriers, dim, layouts))
    axes = [None if axis == dim else axis for axis in range(rank)]
    return _combine(node, layouts, dict.fromkeys(parts, axes), "joins tokens with others")


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


def _stack(node: fx.Node, layouts: Layouts) -> Carried:
    rank = tensor_of(node).ndim
    dim = int_argument(node, 1, 0) % rank
    axes = [axis for axis in range(rank) if axis != dim]
    return _combine(node, layouts, dict.fromkeys(list_argument(node, 0), axes))


def _write_rows(node: fx.Node, layouts: Layouts) -> Carried:
    """``slice_scatter`` and ``select_scatter``: a value with some rows of an axis replaced."""
    rank, dim = tensor_of(node).ndim, int_argument(node, 2, 0) % tensor_of(node).ndim
    into, rows = node_argument(node, 0), node_argument(node, 1)
    whole: _Axes = [None if axis == dim else axis for axis in range(rank)]
    one = [axis for axis in range(rank) if axis != dim]
    if into in layouts and layouts[into].padding(dim) is not None and node.target is aten.slice_scatter.default:
        return _write_between_others(node, layouts, dim)
    of_rows = one if node.target is aten.select_scatter.default else whole
    return _combine(node, layouts, {into: whole, rows: of_rows}, "writes to some of the tokens")


def _write_between_others(node: fx.Node, layouts: Layouts, dim: int) -> Carried:
    """Rows written to an axis with other rows around the tokens: all tokens, or none of them."""
    into, rows = node_argument(node, 0), node_argument(node, 1)
    (part,) = layouts[into].axes[dim]
    first, last = written_rows(node)
    beside = last <= part.before or first >= part.size - part.after
    if rows in layouts:
        around = replace(part, size=last - first, before=part.before - first, after=last - part.size + part.after)
        fits = min(around.before, around.after) >= 0 and layouts[rows] == layouts[into].with_axis(dim, (around,))
    else:
        fits = beside
    if not fits or (len(node.args) > 5 and node.args[5] != 1):
        raise MixesTokens(node, "writes to some of the tokens")
    return Carried(layouts[into])


def written_rows(node: fx.Node) -> tuple[int, int]:
    """First and last + 1 row of an axis that ``slice_scatter`` writes to."""
    dim = _dim(node, 2, 0)
    given = [*node.args[3:5], None, None][:2]
    first, last, _ = slice(*given).indices(int(tensor_of(node).shape[dim]))
    return first, last


def _attention(node: fx.Node, layouts: Layouts) -> Carried:
    query, key, value = (node_argument(node, i) for i in range(3))
    rank = tensor_of(node).ndim
    leading = range(rank - 2)
    operands: dict[fx.Node, _Axes] = {
        value: (*leading, None, rank - 1), key: (*leading, None, None), query: (*leading, rank - 2, None)
    }  # fmt: skip
    mask = _mask_of(node)
    if query in (key, value) or mask in operands:
        raise MixesTokens(node, "reads keys and values of all tokens")
    if mask is not None:
        operands[mask] = (*range(rank - tensor_of(mask).ndim, rank - 1), None)
    if query in layouts and (node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal")):
        raise MixesTokens(node, "lets every token see those before it")
    carried = _combine(node, layouts, operands, "reads keys and values of all tokens")
    if not carried.layout.has_tokens:
        raise MixesTokens(node, "reads keys and values of all tokens")
    return carried


def _mask_of(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _product(node: fx.Node, layouts: Layouts) -> Carried:
    left, right = node_argument(node, 0), node_argument(node, 1)
    ranks = tensor_of(left).ndim, tensor_of(right).ndim
    rank = tensor_of(node).ndim
    if left is right or min(ranks) < 2:
        raise MixesTokens(node, _PRODUCT)
    leading = [range(rank - own, rank - 2) for own in ranks]
    return _combine(
        node, layouts, {left: (*leading[0], rank - 2, None), right: (*leading[1], None, rank - 1)}, _PRODUCT
    )


def _convolution(node: fx.Node, layouts: Layouts) -> Layout:
    layout, kernel = _source(node, layouts), tensor_of(node_argument(node, 1)).shape
    if len(kernel) != len(layout.axes):
        raise MixesTokens(node, "has no axis of samples")
    _apart(node, layout, 1, "contracts the token axis", "contracts samples")
    for axis in range(2, len(kernel)):
        stride, padding = (_of_axis(node, position, axis, default) for position, default in ((3, 1), (4, 0)))
        if (kernel[axis], stride, padding) != (1, 1, 0):
            _apart(node, layout, axis, "mixes neighbouring tokens", "mixes samples")
    return _sized_as(node, layout)


def _of_axis(node: fx.Node, position: int, axis: int, default: int) -> int:
    values = list_argument(node, position) if len(node.args) > position else [default]
    return int(values[axis - 2] if len(values) > 1 else values[0])


def _view_as_complex(node: fx.Node, layouts: Layouts) -> Layout:
    return _source(node, layouts).moved(range(tensor_of(node).ndim))


def _view_as_real(node: fx.Node, layouts: Layouts) -> Layout:
    layout = _source(node, layouts)
    return Layout.of((*layout.axes, (Part(2),)))


_PRODUCT = "multiplies values of different tokens with each other"
_RULES: dict[object, _Rule] = {
    aten.linear.default: _linear,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.index_select.default: _along(1, "picks"),
    aten.slice_scatter.default: _write_rows,
    aten.select_scatter.default: _write_rows,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.flip.default: _flip,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.mean.dim: _reduction(1),
    aten.sum.dim_IntList: _reduction(1),
    aten.amax.default: _reduction(1),
    aten.amin.default: _reduction(1),
    aten.any.dim: _reduction(1),
    aten.linalg_vector_norm.default: _reduction(2),
    aten.softmax.int: _along(1, "normalises over"),
    aten._softmax.default: _along(1, "normalises over"),
    aten.cumsum.default: _along(1, "adds up"),
    aten.group_norm.default: _group_norm,
    aten.view_as_complex.default: _view_as_complex,
    aten.view_as_real.default: _view_as_real,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.mm.default: _product,
    ATTENTION: _attention,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(SPLITS, _split),
}
_KNOWN_TO_MIX: dict[object, str] = {
    aten.einsum.default: _PRODUCT,
    aten.baddbmm.default: _PRODUCT,
    aten.conv_transpose1d.default: "mixes neighbouring tokens",
    aten.avg_pool3d.default: "mixes neighbouring tokens",
    aten.mean.default: "combines all tokens",
    aten.sum.default: "combines all tokens",
    aten.index.Tensor: "picks rows by an index, maybe of tokens",
    aten.index_put.default: "writes to rows of an index, maybe of tokens",
    aten.gather.default: "picks values by an index, maybe of other tokens",
}
