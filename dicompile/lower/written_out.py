"""Operators of ours that stand for what a library makes of its weights are written out before anything compiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.compat import lazy_graph_module
from dicompile.errors import CannotCapture
from dicompile.ops.wrapped import WRAPPED_LINEAR, class_of, linear_of


def written_out(graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """A graph with the operators of the library in the place of linear maps whose weight is of a class of its own.

    Args:
        graph_module: is not changed.
        arguments: examples of its inputs, of the mode; sizes may be symbols.
        mode: makes the values.

    Raises:
        CannotCapture: what the library computes cannot be traced.
    """
    if not graph_module.graph.find_nodes(op="call_function", target=WRAPPED_LINEAR):
        return graph_module
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=WRAPPED_LINEAR):
        node.target = linear_of
    run = fx.Interpreter(lazy_graph_module(graph_module, graph)).run
    try:
        with torch.no_grad(), torch._C._DisableAutocast(), mode, enable_python_dispatcher():
            made: fx.GraphModule = make_fx(run, pre_dispatch=True)(*arguments)
    except Exception as error:  # whatever a library raises where it is traced
        wrappers = {node.args[3] for node in graph.find_nodes(op="call_function", target=linear_of)}
        raise CannotCapture(
            f"weights of class {', '.join(sorted({class_of(name) for name in wrappers}))} cannot be compiled",
            where="lower, linear maps",
            why=f"what their library computes cannot be traced: {str(error).splitlines()[0]}",
            fix="backend='eager', which computes what the library does, or weights of another library, such as torchao",
        ) from error
    return made
