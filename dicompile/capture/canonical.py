"""One spelling for operators that have several, and no edges but dataflow.

``q.type_as(x)``, ``torch.empty_like(x)`` and the writes to slices of it (rotary embeddings) take a tensor for its
dtype, device or shape only; left alone, their result would seem to depend on it. Fused spellings (``addcmul``,
``lerp``) hide sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from dicompile.nodes import list_argument, node_argument
from dicompile.ops.registry import REGISTERED, HeadsFirst

aten = torch.ops.aten

_SAME = (aten.alias.default, aten.detach.default)
_SYNONYMS = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.clip.default: aten.clamp.default,
    aten.linalg_matmul.default: aten.matmul.default,
}


def make_canonical(graph: fx.Graph) -> None:
    """Rewrite a functional ATen graph in place; its fake mode must be active."""
    drop_switches(graph)
    for node in list(graph.nodes):
        node.target = _SYNONYMS.get(node.target, node.target)
        if node.target is aten.add.Tensor:
            _spread_over_batch(node)
        said = REGISTERED.get(node.target)
        rule = _heads_first if said is not None and said.layout == "bnhd" else _RULES.get(node.target)
        if rule is not None:
            node.replace_all_uses_with(rule(node))
            graph.erase_node(node)


def drop_switches(graph: fx.Graph) -> None:
    """Remove switches of gradients, which are off anyway; those of autocast mean something, see `autocast`."""
    for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        graph.erase_node(node)


def _spread_over_batch(add: fx.Node) -> None:
    """One sample that is added to a batch becomes a batch first: a text stream that pipelines do not repeat."""
    shape = add.meta["val"].shape
    for parent in add.all_input_nodes if len(shape) >= 3 else ():
        if parent.meta["val"].shape == (1, *shape[1:]) and shape[0] > 1:
            add.replace_input_with(parent, call_before(add, aten.expand.default, (parent, list(shape)), {}))


def _same(node: fx.Node) -> fx.Node:
    return node_argument(node, 0)


def _filled(fill: float | None) -> Callable[[fx.Node], fx.Node]:
    def rule(node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        kind = {"dtype": value.dtype, "device": value.device}
        if fill is None:
            return call_before(node, aten.empty.memory_format, (list(value.shape),), kind)
        return call_before(node, aten.full.default, (list(value.shape), fill), kind)

    return rule


def _type_as(node: fx.Node) -> fx.Node:
    return _cast(node, node_argument(node, 0))


def _copy(node: fx.Node) -> fx.Node:
    source, shape = node_argument(node, 1), node.meta["val"].shape
    if source.meta["val"].shape != shape:
        source = call_before(node, aten.expand.default, (source, list(shape)), {})
    return _cast(node, source)


def _cast(node: fx.Node, source: fx.Node) -> fx.Node:
    given, wanted = source.meta["val"], node.meta["val"]
    pairs = {"dtype": (given.dtype, wanted.dtype), "device": (given.device, wanted.device)}
    changed = {name: new for name, (old, new) in pairs.items() if old != new}
    return call_before(node, aten._to_copy.default, (source,), changed) if changed else source


def _addcmul(node: fx.Node) -> fx.Node:
    base, left, right = node.args[:3]
    product = call_before(node, aten.mul.Tensor, (left, right), {})
    scale = node.kwargs.get("value", 1)
    if scale != 1:
        product = call_before(node, aten.mul.Tensor, (product, scale), {})
    return call_before(node, aten.add.Tensor, (base, product), {})


def _cat(node: fx.Node) -> fx.Node:
    """Without parts that are empty: rows beyond a length that is the whole one here."""
    given: Sequence[fx.Node] = list_argument(node, 0)
    parts = [part for part in given if part.meta["val"].numel()] or list(given)
    return parts[0] if len(parts) == 1 else call_before(node, aten.cat.default, (parts, *node.args[1:]), {})


def _heads_first(node: fx.Node) -> fx.Node:
    """A registered attention that wants heads after tokens, with heads first."""
    assert isinstance(node.target, OpOverload)
    turned = [call_before(node, aten.transpose.int, (argument, 1, 2), {}) for argument in node.args[:3]]
    made = call_before(node, HeadsFirst(node.target), (*turned, *node.args[3:]), dict(node.kwargs))
    return call_before(node, aten.transpose.int, (made, 1, 2), {})


def _lerp(node: fx.Node) -> fx.Node:
    start, end, weight = node.args[:3]
    difference = call_before(node, aten.sub.Tensor, (end, start), {})
    return call_before(node, aten.add.Tensor, (start, call_before(node, aten.mul.Tensor, (difference, weight), {})), {})


def call_before(before: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
    """A call in the module of the node it goes before."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args), kwargs)
    node.meta["val"] = target(*fx.node.map_arg(tuple(args), lambda parent: parent.meta["val"]), **kwargs)
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    return node


_RULES: dict[object, Callable[[fx.Node], fx.Node]] = {
    **dict.fromkeys(_SAME, _same),
    aten.empty_like.default: _filled(None),
    aten.zeros_like.default: _filled(0),
    aten.ones_like.default: _filled(1),
    aten.new_empty.default: _filled(None),
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.type_as.default: _type_as,
    aten.copy.default: _copy,
    aten.addcmul.default: _addcmul,
    aten.cat.default: _cat,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
}
