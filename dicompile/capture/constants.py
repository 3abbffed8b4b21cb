"""Tensors written out in a model's Python become operators: ``mask[:, 0] = True``, ``x * torch.tensor([0.5, 2.0])``.

Before::

    %7: b8[] = _tensor_constant0()
    %8: b8[] = aten.lift_fresh_copy.default(%7)

After::

    %8: b8[] = aten.full.default([], True)

Whoever cuts the graph into pieces then meets nothing that is neither an input nor computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def spell_out_constants(graph_module: fx.GraphModule) -> None:
    """Replace the tensors that a graph holds by operators that make them; its fake mode must be active."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(graph_module, node.target)
        with graph.inserting_before(node):
            made = _make(graph, value.tolist(), {"dtype": value.dtype, "device": value.device})
        made.meta.update({key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta})
        for user in list(node.users):
            if user.target is aten.lift_fresh_copy.default:
                user.replace_all_uses_with(made)
                graph.erase_node(user)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph_module.recompile()


def _make(graph: fx.Graph, value: Any, kind: dict[str, Any]) -> fx.Node:
    if not isinstance(value, list):
        return _call(graph, aten.full.default, ([], value), kind)
    if not value:
        return _call(graph, aten.full.default, ([0], 0), kind)
    return _call(graph, aten.stack.default, ([_make(graph, part, kind) for part in value],), {})


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    values = torch.utils._pytree.tree_map_only(fx.Node, lambda argument: argument.meta["val"], args)
    node.meta["val"] = target(*values, **kwargs)
    return node
