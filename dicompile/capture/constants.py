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

from dicompile.capture.canonical import call_before

aten = torch.ops.aten


def spell_out_constants(graph_module: fx.GraphModule) -> None:
    """Replace the tensors that a graph holds by operators that make them; its fake mode must be active."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(graph_module, node.target)
        made = _make(node, value.tolist(), {"dtype": value.dtype, "device": value.device})
        for user in list(node.users):
            if user.target is aten.lift_fresh_copy.default:
                user.replace_all_uses_with(made)
                graph.erase_node(user)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph_module.recompile()


def _make(before: fx.Node, value: Any, kind: dict[str, Any]) -> fx.Node:
    if not isinstance(value, list):
        return call_before(before, aten.full.default, ([], value), kind)
    if not value:
        return call_before(before, aten.full.default, ([0], 0), kind)
    return call_before(before, aten.stack.default, ([_make(before, part, kind) for part in value],), {})
