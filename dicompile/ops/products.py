"""Operators that multiply matrices or convolve."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from dicompile.nodes import list_argument, node_argument, tensor_of
from dicompile.ops.kinds import CONVOLUTIONS, LINEARS, PADDED_CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from dicompile.ops.layout import Layout
from dicompile.ops.rules import check_apart, combine, sized_as, source_layout
from dicompile.ops.tokens import Carried, Layouts, MixesTokens, Operator, mixes

aten = torch.ops.aten

_PRODUCT = "multiplies values of different tokens with each other"


def _linear(node: fx.Node, layouts: Layouts) -> Carried:
    source, *parameters = node.all_input_nodes
    rank = tensor_of(node).ndim
    if node.args[0] is not source or any(parameter in layouts for parameter in parameters):
        raise MixesTokens(node, "contracts the token axis")
    return combine(node, layouts, {source: (*range(rank - 1), None)}, "contracts the token axis")


def _product(node: fx.Node, layouts: Layouts) -> Carried:
    left, right = node_argument(node, 0), node_argument(node, 1)
    ranks = tensor_of(left).ndim, tensor_of(right).ndim
    rank = tensor_of(node).ndim
    if left is right or min(ranks) < 2:
        raise MixesTokens(node, _PRODUCT)
    leading = [range(rank - own, rank - 2) for own in ranks]
    return combine(node, layouts, {left: (*leading[0], rank - 2, None), right: (*leading[1], None, rank - 1)}, _PRODUCT)


def _convolution(node: fx.Node, layouts: Layouts) -> Layout:
    layout, kernel = source_layout(node, layouts), tensor_of(node_argument(node, 1)).shape
    if len(kernel) != len(layout.axes):
        raise MixesTokens(node, "has no axis of samples")
    check_apart(node, layout, 1, "contracts the token axis", "contracts samples")
    for axis in range(2, len(kernel)):
        stride, padding = (_of_axis(node, position, axis, default) for position, default in ((3, 1), (4, 0)))
        if (kernel[axis], stride, padding) != (1, 1, 0):
            check_apart(node, layout, axis, "mixes neighbouring tokens", "mixes samples")
    return sized_as(node, layout)


def _of_axis(node: fx.Node, position: int, axis: int, default: int) -> int:
    values = list_argument(node, position) if len(node.args) > position else [default]
    return int(values[axis - 2] if len(values) > 1 else values[0])


OPERATORS: Mapping[object, Operator] = {
    **dict.fromkeys(LINEARS, Operator(_linear)),
    aten.matmul.default: Operator(_product),
    aten.bmm.default: Operator(_product),
    aten.mm.default: Operator(_product),
    aten.einsum.default: mixes(_PRODUCT),
    aten.baddbmm.default: mixes(_PRODUCT),
    **dict.fromkeys(CONVOLUTIONS, Operator(_convolution)),
    **dict.fromkeys((*PADDED_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), mixes("mixes neighbouring tokens")),
    aten.avg_pool3d.default: mixes("mixes neighbouring tokens"),
}
