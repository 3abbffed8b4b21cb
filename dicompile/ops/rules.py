"""What the rules of operators are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from dicompile.nodes import int_argument, node_argument, tensor_of
from dicompile.ops.layout import Axis, Layout, Of, Part
from dicompile.ops.tokens import Carried, Layouts, MixesTokens

Axes = Sequence[int | None]
"""For every axis of an operand, from the right, the axis of the result that it goes with; None if it goes with none."""

_DIFFERENT = "combines tokens along different axes"


def combine(node: fx.Node, layouts: Layouts, operands: Mapping[fx.Node, Axes], mixes: str = _DIFFERENT) -> Carried:
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
        parent: layout_of_operand(node, result, parent, going)
        for parent, going in operands.items()
        if parent not in layouts
    }
    return Carried(result, {parent: layout for parent, layout in expected.items() if layout is not None})


def layout_of_operand(node: fx.Node, result: Layout, parent: fx.Node, going: Axes) -> Layout | None:
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
    layout = Layout.of((*(counted(parts) for parts in missing), *own))
    if layout.counted != result.counted:
        raise MixesTokens(node, "has an operand with values for groups of tokens")
    return layout


def _is_counting(parts: Axis) -> bool:
    return any(part.of is not Of.OTHERS for part in parts)


def counted(parts: Axis) -> Axis:
    """The parts if any counts samples or tokens: numbers of heads may differ."""
    return parts if _is_counting(parts) else ()


def source_layout(node: fx.Node, layouts: Layouts) -> Layout:
    """Layout of the first operand, which alone may carry tokens."""
    source = node_argument(node, 0)
    if source not in layouts or any(parent in layouts for parent in node.all_input_nodes if parent is not source):
        raise MixesTokens(node, "takes tokens as something else than its first operand")
    return layouts[source]


def axis_argument(node: fx.Node, position: int, default: int | None = None, rank: int | None = None) -> int:
    """An argument that names an axis of the first operand, or of a value with `rank` axes; counted from the left."""
    return int_argument(node, position, default) % (rank or tensor_of(node_argument(node, 0)).ndim)


def check_apart(node: fx.Node, layout: Layout, axis: int, of_tokens: str, of_samples: str = "combines samples") -> None:
    """Check that an axis counts neither samples nor tokens."""
    if layout.counts(axis):
        raise MixesTokens(node, of_tokens if layout.counts(axis, Of.TOKENS) else of_samples)


def sized_as(node: fx.Node, layout: Layout) -> Layout:
    """With the node's own sizes on axes that count neither samples nor tokens."""
    shape = tensor_of(node).shape
    return Layout.of(
        parts if _is_counting(parts) else (Part(int(size)),) for parts, size in zip(layout.axes, shape, strict=True)
    )
