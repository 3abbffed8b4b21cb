"""The table of operators: what is known of each, or that nothing is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dicompile.nodes import tensor_of
from dicompile.ops import attention, axes, products, rows
from dicompile.ops.kinds import ATTENTION, ELEMENTWISE, is_attention
from dicompile.ops.layout import Layout
from dicompile.ops.registry import said_of
from dicompile.ops.rules import combine
from dicompile.ops.tokens import Carried, ChosenTokens, Layouts, MixesTokens, Operator, mixes


def _elementwise(node: fx.Node, layouts: Layouts) -> Carried:
    if not isinstance(node.meta["val"], torch.Tensor):
        raise MixesTokens(node, "returns no tensor")
    rank = node.meta["val"].ndim
    return combine(node, layouts, {p: range(rank - tensor_of(p).ndim, rank) for p in node.all_input_nodes})


OPERATORS: Mapping[object, Operator] = {
    **dict.fromkeys(ELEMENTWISE, Operator(_elementwise)),
    **axes.OPERATORS,
    **rows.OPERATORS,
    **products.OPERATORS,
    **attention.OPERATORS,
}
_UNKNOWN = mixes("is not known to keep tokens apart")
_SAID: Mapping[str, Operator] = {
    "elementwise": Operator(_elementwise),
    "rows": Operator(axes.by_rows),
    "mixes": mixes("mixes tokens, as was said of it"),
}


def _known(node: fx.Node) -> Operator:
    if is_attention(node):
        return OPERATORS[ATTENTION]
    said = said_of(node.target)
    if said is not None:
        return _SAID[said.tokens]
    return OPERATORS.get(node.target, _UNKNOWN)


def carry(node: fx.Node, layouts: Layouts) -> Carried:
    """What a node does to tokens.

    Args:
        node: any call.
        layouts: of its operands that carry tokens.

    Raises:
        MixesTokens: it mixes tokens, or is not known not to.
    """
    result = _known(node).carry(node, layouts)
    return result if isinstance(result, Carried) else Carried(result)


def narrowed(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], layout: Layout, chosen: ChosenTokens
) -> fx.Node:
    """A node for chosen tokens.

    Args:
        node: the original, which keeps tokens apart.
        args: its arguments for chosen tokens.
        kwargs: its keyword arguments for chosen tokens.
        layout: of its result for all tokens.
        chosen: the tokens.
    """
    narrow = _known(node).narrow
    return narrow(node, args, layout, chosen) if narrow else chosen.call(node.target, *args, **kwargs)
