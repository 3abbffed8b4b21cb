"""Where the token axis is in every node of a branch, and which operator mixes tokens.

Abstract interpretation: starting from the residual stream, each operator either carries the token axis along or mixes
tokens. A branch that carries it to its end can be recomputed for a subset of its tokens. Attention mixes through keys
and values; if those do not come from the stream (cross-attention) the branch is still token-wise, otherwise its
queries are, and everything is once the attention's output is at hand.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Collection, Iterable

import torch
from torch import fx

from dicompile.analysis.cost import ATTENTION
from dicompile.nodes import int_argument, list_argument, node_argument, tensor_of
from dicompile.text import module_path, operator_text

aten = torch.ops.aten

ELEMENTWISE = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.sqrt.default, aten.rsqrt.default, aten.exp.default, aten.tanh.default,
    aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default, aten.clamp.default,
    aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
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


def token_axes(
    region: Collection[fx.Node], stream: fx.Node, axis: int, mixing: Mixing = Mixing.FORBIDDEN
) -> dict[fx.Node, int]:
    """Token axis of every node that carries tokens of the stream.

    Args:
        region: nodes of the branch in graph order.
        stream: the stream value they start from.
        axis: its token axis.
        mixing: what is assumed of attention over the same tokens.

    Raises:
        MixesTokens: an operator mixes tokens, or is not known not to.
    """
    axes = {stream: axis}
    wanted = _behind_stored(region) if mixing is Mixing.STORED else region
    tokens = tensor_of(stream).shape[axis]
    for node in wanted:
        if node.target is ATTENTION and mixing is not Mixing.FORBIDDEN:
            axes[node] = _open_attention(node, axes, tokens, mixing)
        elif any(parent in axes for parent in node.all_input_nodes):
            axes[node] = _carry(node, axes)
    return axes


def _behind_stored(region: Collection[fx.Node]) -> list[fx.Node]:
    """Nodes of a branch that are needed for its end when the output of its attention is at hand."""
    members, needed = list(region), set()
    inside = set(members)
    queue = members[-1:]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += [p for p in node.all_input_nodes if p in inside] if node.target is not ATTENTION else []
    return [node for node in members if node in needed]


def _open_attention(node: fx.Node, axes: dict[fx.Node, int], tokens: int, mixing: Mixing) -> int:
    rank, query = tensor_of(node).ndim, node_argument(node, 0)
    if tensor_of(node).shape[-2] != tokens:
        raise MixesTokens(node, "attends over other tokens than the branch has")
    if mixing is Mixing.QUERIES:
        if axes.get(query) != tensor_of(query).ndim - 2:
            raise MixesTokens(node, "attends along another axis than tokens")
        _check_mask(node, axes)
    return rank - 2


def per_token_operands(node: fx.Node, axes: dict[fx.Node, int]) -> list[tuple[fx.Node, int]]:
    """Operands of an element-wise node that are not of the stream but have a value per token, with their token axis."""
    if node.target not in ELEMENTWISE or node not in axes:
        return []
    result = []
    rank = tensor_of(node).ndim
    for parent in node.all_input_nodes:
        value = tensor_of(parent)
        position = axes[node] - rank + value.ndim
        if parent not in axes and position >= 0 and value.shape[position] != 1:
            result.append((parent, position))
    return result


def _carry(node: fx.Node, axes: dict[fx.Node, int]) -> int:
    source = next(parent for parent in node.all_input_nodes if parent in axes)
    if node.target in ELEMENTWISE:
        return _carry_elementwise(node, axes)
    rule = _RULES.get(node.target)
    if rule is None:
        raise MixesTokens(node, "is not known to keep tokens apart")
    return rule(node, source, axes)


def _carry_elementwise(node: fx.Node, axes: dict[fx.Node, int]) -> int:
    if not isinstance(node.meta["val"], torch.Tensor):
        raise MixesTokens(node, "returns no tensor")
    rank = node.meta["val"].ndim
    aligned = {axes[p] + rank - tensor_of(p).ndim for p in node.all_input_nodes if p in axes}
    if len(aligned) != 1:
        raise MixesTokens(node, "combines tokens along different axes")
    return aligned.pop()


def _any_carries(operands: Iterable[object], axes: dict[fx.Node, int]) -> bool:
    return any(isinstance(operand, fx.Node) and operand in axes for operand in operands)


def _linear(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    contracted = axes[source] == tensor_of(source).ndim - 1
    if node.args[0] is not source or contracted or _any_carries(node.args[1:], axes):
        raise MixesTokens(node, "contracts the token axis")
    return axes[source]


def _norm(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    normalised = axes[source] >= tensor_of(source).ndim - len(list_argument(node, 1))
    if normalised or _any_carries(node.args[2:4], axes):
        raise MixesTokens(node, "normalises over tokens")
    return axes[source]


def _reshape(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    before, after, axis = tensor_of(source).shape, tensor_of(node).shape, axes[source]
    for candidate in range(len(after)):
        if math.prod(after[:candidate]) == math.prod(before[:axis]) and after[candidate] == before[axis]:
            return candidate
    raise MixesTokens(node, f"folds tokens into another axis ({list(before)} to {list(after)})")


def _transpose(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    rank = tensor_of(source).ndim
    first, second = int_argument(node, 1) % rank, int_argument(node, 2) % rank
    return {first: second, second: first}.get(axes[source], axes[source])


def _permute(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    rank = tensor_of(source).ndim
    return [dim % rank for dim in list_argument(node, 1)].index(axes[source])


def _unsqueeze(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    dim = int_argument(node, 1) % tensor_of(node).ndim
    return axes[source] + (dim <= axes[source])


def _split(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    if int_argument(node, 2, 0) % tensor_of(source).ndim == axes[source]:
        raise MixesTokens(node, "splits the token axis")
    return axes[source]


def _slice(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    if int_argument(node, 1, 0) % tensor_of(source).ndim == axes[source]:
        raise MixesTokens(node, "takes a range of tokens")
    return axes[source]


def _select(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    dim = int_argument(node, 1) % tensor_of(source).ndim
    if dim == axes[source]:
        raise MixesTokens(node, "picks one token")
    return axes[source] - (dim < axes[source])


def _unbind(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    dim = int_argument(node, 1, 0) % tensor_of(source).ndim
    if dim == axes[source]:
        raise MixesTokens(node, "takes tokens apart")
    return axes[source] - (dim < axes[source])


def _getitem(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    return axes[source]


def _cat(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    dim = int_argument(node, 1, 0) % tensor_of(source).ndim
    if dim == axes[source] or any(axes.get(part) != axes[source] for part in list_argument(node, 0)):
        raise MixesTokens(node, "joins tokens with others")
    return axes[source]


def _attention(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    query, key, value = (node_argument(node, i) for i in range(3))
    if key in axes or value in axes:
        raise MixesTokens(node, "reads keys and values of all tokens")
    _check_mask(node, axes)
    if axes[query] != tensor_of(query).ndim - 2:
        raise MixesTokens(node, "attends along another axis than tokens")
    return axes[query]


def _check_mask(node: fx.Node, axes: dict[fx.Node, int]) -> None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal")
    if isinstance(mask, fx.Node):
        causal = causal or mask in axes or (tensor_of(mask).ndim > 1 and tensor_of(mask).shape[-2] != 1)
    if causal:
        raise MixesTokens(node, "has a mask of its own for every token")


def _stack(node: fx.Node, source: fx.Node, axes: dict[fx.Node, int]) -> int:
    dim = int_argument(node, 1, 0) % tensor_of(node).ndim
    if any(axes.get(part) != axes[source] for part in list_argument(node, 0)):
        raise MixesTokens(node, "joins tokens with others")
    return axes[source] + (dim <= axes[source])


_Rule = Callable[[fx.Node, fx.Node, dict[fx.Node, int]], int]
_RULES: dict[object, _Rule] = {
    aten.linear.default: _linear,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.scaled_dot_product_attention.default: _attention,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(SPLITS, _split),
}
