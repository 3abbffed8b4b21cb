"""Tensors written out in a model's Python become operators: ``mask[:, 0] = True``, ``x * torch.tensor([0.5, 2.0])``.

Before::

    %7: b8[] = _tensor_constant0()
    %8: b8[] = aten.lift_fresh_copy.default(%7)

After::

    %8: b8[] = aten.full.default([], True)

Tables of more than a few numbers become inputs instead. Whoever cuts the graph into pieces then meets nothing that is
neither an input nor computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dicompile.capture.canonical import call_before
from dicompile.errors import CannotCapture
from dicompile.text import module_path

aten = torch.ops.aten


MOST = 16
"""Numbers of a constant that is written out."""


def spell_out_constants(graph_module: fx.GraphModule) -> None:
    """Replace small tensors that a graph holds by operators that make them; its fake mode must be active."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(graph_module, node.target)
        if isinstance(value, torch.Tensor) and value.numel() <= MOST:
            _replace(node, _make(node, value.tolist(), {"dtype": value.dtype, "device": value.device}))
    graph_module.recompile()


def lift_constants(graph_module: fx.GraphModule, mode: FakeTensorMode) -> tuple[torch.Tensor, ...]:
    """Make inputs of the tensors that a graph holds still, after all others.

    Returns:
        Their values.

    Raises:
        CannotCapture: one is no constant, but was computed where the trace did not see it.
    """
    graph, lifted = graph_module.graph, dict[str, fx.Node]()
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                lifted[node.target] = graph.placeholder(f"constant_{len(lifted)}")
            value = getattr(graph_module, node.target)
            if isinstance(value, FakeTensor):
                raise _not_seen(node)
            if not isinstance(value, torch.Tensor):
                raise CannotCapture(
                    f"{_where(node)} computes with a {type(value).__name__} of its own",
                    where="capture",
                    why="what it is at the next call cannot be told",
                    fix="draw random numbers without a generator, or outside of the model, and pass them",
                )
            lifted[node.target].meta["val"] = mode.from_tensor(value, static_shapes=True)
        _replace(node, lifted[node.target])
    values = tuple(getattr(graph_module, name) for name in lifted)
    for name in lifted:
        delattr(graph_module, name)
    graph_module.recompile()
    return values


def _where(node: fx.Node) -> str:
    return module_path(next(iter(node.users), node)) or "the model"


def _not_seen(node: fx.Node) -> CannotCapture:
    return CannotCapture(
        f"how {_where(node)} makes a tensor of shape {list(node.meta['val'].shape)} leaves no trace",
        where="capture",
        why="it is computed beside torch's operators, and would stay as it was at the first call",
        fix="compute it by operators of torch",
    )


def _replace(node: fx.Node, made: fx.Node) -> None:
    for user in list(node.users):
        if user.target is aten.lift_fresh_copy.default:
            user.replace_all_uses_with(made)
            node.graph.erase_node(user)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _make(before: fx.Node, value: Any, kind: dict[str, Any]) -> fx.Node:
    if not isinstance(value, list):
        return call_before(before, aten.full.default, ([], value), kind)
    if not value:
        return call_before(before, aten.full.default, ([0], 0), kind)
    return call_before(before, aten.stack.default, ([_make(before, part, kind) for part in value],), {})
