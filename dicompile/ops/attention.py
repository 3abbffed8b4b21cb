"""Attention: what it does to tokens, by itself and where keys and values or its output are at hand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.kinds import ATTENTION
from dicompile.ops.layout import Layout, Of, Part
from dicompile.ops.rules import Axes, combine, counted, layout_of_operand
from dicompile.ops.tokens import Carried, Layouts, MixesTokens, Operator
from dicompile.ops.ulysses import ULYSSES


def attention_apart(node: fx.Node, layouts: Layouts) -> Carried:
    """Attention among the tokens of each sample, where samples alone have to stay apart."""
    operands = _operands(node)
    for parent in operands:
        rank = tensor_of(parent).ndim
        if parent in layouts and any(layouts[parent].counts(axis) for axis in range(max(rank - 2, 0), rank)):
            raise MixesTokens(node, "attends over samples")
    return combine(node, layouts, operands)


def _operands(node: fx.Node) -> dict[fx.Node, Axes]:
    query, key, value = (node_argument(node, i) for i in range(3))
    rank = tensor_of(node).ndim
    leading = range(rank - 2)
    operands: dict[fx.Node, Axes] = {
        value: (*leading, None, rank - 1), key: (*leading, None, None), query: (*leading, rank - 2, None)
    }  # fmt: skip
    mask = mask_of(node)
    if mask is not None:
        operands[mask] = (*range(rank - tensor_of(mask).ndim, rank - 1), None)
    return operands


def _attention(node: fx.Node, layouts: Layouts) -> Carried:
    query, key, value = (node_argument(node, i) for i in range(3))
    operands = _operands(node)
    if query in (key, value) or mask_of(node) in (query, key, value):
        raise MixesTokens(node, "reads keys and values of all tokens")
    if query in layouts and is_causal(node):
        raise MixesTokens(node, "lets every token see those before it")
    carried = combine(node, layouts, operands, "reads keys and values of all tokens")
    if not carried.layout.has_tokens:
        raise MixesTokens(node, "reads keys and values of all tokens")
    return carried


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of an attention node, if it has one."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def is_causal(node: fx.Node) -> bool:
    """True for an attention node whose queries see no key after their own place."""
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal"))


def has_dropout(node: fx.Node) -> bool:
    """True for an attention node that drops weights."""
    return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))


def find_attention(score: fx.Node) -> fx.Node | None:
    """The attention without dropout that has the logits of a score; see `dicompile.ops.attention_scores`."""

    def is_same(node: fx.Node) -> bool:
        return (
            node.target is ATTENTION
            and (*node.args[:2], mask_of(node), node.kwargs.get("scale"), is_causal(node)) == score.args
            and not has_dropout(node)
        )

    return next(filter(is_same, node_argument(score, 0).users), None)


def open_attention(node: fx.Node, layouts: Layouts) -> Carried:
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
        counted(rows[axis]) != counted(part[axis]) for part in (keys, values) for axis in leading
    )
    alike = layouts[key].of_tokens == keys[-2] == values[-2] == layouts[value].of_tokens
    if grouped or not alike or len(keys[-2]) != 1:
        raise MixesTokens(node, "attends within groups of tokens")
    # As for cross-attention, but for a mask with a value per key: its columns go with the keys.
    closed = {parent: layout for parent, layout in layouts.items() if parent not in (key, value)}
    carried = _attention(node, closed)
    operands = {parent: layout for parent, layout in carried.operands.items() if parent not in (key, value)}
    mask = mask_of(node)
    if mask is not None and tensor_of(mask).shape[-1] != 1:
        if node.target is ULYSSES:
            raise MixesTokens(node, "has a mask with a value for every key of other ranks")
        if mask in operands:
            raise MixesTokens(node, "has a mask with a value for every pair of tokens")
        rank, own = len(rows), tensor_of(mask).ndim
        per_key = carried.layout.with_axis(rank - 1, keys[-2]).with_axis(rank - 2, ())
        columns = layout_of_operand(node, per_key, mask, range(rank - own, rank))
        assert columns is not None
        operands[mask] = columns
    return Carried(carried.layout, operands)


def stored_output(node: fx.Node, layouts: Layouts, stream: Layout) -> Layout:
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


OPERATORS: Mapping[object, Operator] = {ATTENTION: Operator(_attention)}
