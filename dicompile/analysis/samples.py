"""Where the samples of a batch are in every value, and which operator would let one see another.

Calls of several users can be one call only if no sample depends on the others. Nothing is taken for granted: samples
are followed from the inputs through every operator, by the rules that tokens are followed by (`dicompile.ops`). What
comes from no input of theirs has to be the same for every batch, or the same for every sample of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from dicompile.analysis.structure import ModelStructure
from dicompile.capture import Capture
from dicompile.nodes import results_of, tensor_of
from dicompile.ops.attention import attention_apart, has_dropout
from dicompile.ops.kinds import ELEMENTWISE, FILLS, RESHAPES, is_attention
from dicompile.ops.layout import Layout, Of
from dicompile.ops.operators import carry
from dicompile.ops.tokens import MixesTokens

aten = torch.ops.aten

_SPREADS = (aten.expand.default, aten.repeat.default)
_SIZED = frozenset((*_SPREADS, *RESHAPES, *FILLS))
_KEEPS = frozenset((*ELEMENTWISE, *RESHAPES, aten.unsqueeze.default, aten.squeeze.dim))


def mixed_samples(capture: Capture, structure: ModelStructure, given: Collection[int], smaller: Capture) -> str:
    """What mixes the samples of a batch, or is not known not to; empty if nothing does.

    Args:
        capture: of a model, for a batch of more than one sample.
        structure: of the same.
        given: positions of the inputs that have the samples on their first axis.
        smaller: the same model for a smaller batch.
    """
    try:
        layouts = _followed(capture, given, smaller)
    except MixesTokens as error:
        return str(error)
    for site in structure.everything:
        if not _is_first(layouts, site.core):
            return f"branch {site.label} has no rows of its own for every sample"
    for i, result in enumerate(results_of(capture.graph)):
        if isinstance(result, fx.Node) and not _is_first(layouts, result.name):
            return f"result {i} has no rows of its own for every sample"
    return ""


def _is_first(layouts: Mapping[str, Layout], name: str) -> bool:
    """True for a value whose first axis counts samples, or begins with them."""
    axes = layouts[name].axes if name in layouts else ()
    return bool(axes and axes[0]) and axes[0][0].of is Of.SAMPLES


def _followed(capture: Capture, given: Collection[int], smaller: Capture) -> dict[str, Layout]:
    layouts: dict[fx.Node, Layout] = {
        node: Layout.of_stream(tensor_of(node).shape, ())
        for i, node in enumerate(capture.graph.find_nodes(op="placeholder")) if i in given
    }  # fmt: skip
    for node in capture.graph.nodes:
        if node.op == "call_function" and _is_random(node):
            raise MixesTokens(node, "draws random numbers for the whole batch")
        if node.op == "call_function" and any(parent in layouts for parent in node.all_input_nodes):
            carried = attention_apart(node, layouts) if is_attention(node) else carry(node, layouts)
            layouts[node] = carried.layout
    for node, other in _pairs(_with_numbers(capture), _with_numbers(smaller)):
        if _given(node) != _given(other):
            raise MixesTokens(node, "depends on the size of the batch")
    for node, other in _pairs(_beside(capture, given), _beside(smaller, given)):
        _check_same(node, other)
    return {node.name: layout for node, layout in layouts.items()}


def _pairs(nodes: Sequence[fx.Node], others: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The same nodes in two graphs."""
    for node, other in zip(nodes, others, strict=False):
        if node.target != other.target:
            raise MixesTokens(node, "depends on the size of the batch")
        yield node, other
    if len(nodes) != len(others):
        raise MixesTokens(max(nodes, others, key=len)[-1], "depends on the size of the batch")


def _with_numbers(capture: Capture) -> list[fx.Node]:
    """Nodes that take numbers other than sizes: factors, axes, places."""
    return [
        node for node in capture.graph.nodes
        if node.op == "call_function" and node.target not in _SIZED and any(map(_is_number, tree_leaves(_given(node))))
    ]  # fmt: skip


def _given(node: fx.Node) -> object:
    """Arguments of a call but for values of the graph."""
    return fx.map_arg((node.args, node.kwargs), lambda _: None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _beside(capture: Capture, given: Collection[int]) -> list[fx.Node]:
    """Calls that nothing of a sample reaches; what is spread over rows is left out, since it is the same for each.

    For a batch of one row it may not be in the graph at all.
    """
    reached = {node for i, node in enumerate(capture.graph.find_nodes(op="placeholder")) if i in given}
    beside = []
    for node in capture.graph.nodes:
        if any(parent in reached for parent in node.all_input_nodes):
            reached.add(node)
        elif node.op == "call_function" and node.target is not aten.expand.default:
            beside.append(node)
    return beside


def _is_random(node: fx.Node) -> bool:
    if is_attention(node):
        return has_dropout(node)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _check_same(node: fx.Node, other: fx.Node) -> None:
    """Check that what depends on no sample is what it is for another batch, or the same for every sample."""
    value, before = node.meta.get("val"), other.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor):
        return
    if value.shape == before.shape:
        if _given(node) != _given(other):
            raise MixesTokens(node, "depends on the size of the batch")
        return
    if node.target in _KEEPS or (node.target in FILLS and node.args[1:] == other.args[1:]):
        return
    grown = [
        axis - value.ndim for axis, pair in enumerate(zip(value.shape, before.shape, strict=True)) if len({*pair}) > 1
    ]
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or node.target not in _SPREADS or any(_size(source, axis) != 1 for axis in grown):
        raise MixesTokens(node, "depends on the size of the batch")


def _size(node: fx.Node, axis: int) -> int:
    """Size of an axis, counted from the right; 1 where there is none."""
    shape = tensor_of(node).shape
    return int(shape[axis]) if -axis <= len(shape) else 1
