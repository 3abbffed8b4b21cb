"""Python numbers that differ at every step become tensors: ``torch.full((b,), t)`` of a timestep that is a float.

Dynamo hands such a number over as a 0-d tensor, which the graph reads with ``.item()``. Reading a value in a graph of
fixed values would make a constant of it; so the tensor itself goes where the number went.

Before::

    %t: f64[]
    %1 = item(%t)
    %2 = torch.full((4,), %1, dtype=torch.float32)

After::

    %2 = filled((4,), %t, dtype=torch.float32)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dicompile.errors import CannotCapture


def numbers_in(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that read a number from an input."""
    return [
        user
        for placeholder in graph.find_nodes(op="placeholder")
        for user in placeholder.users
        if user.op == "call_method" and user.target == "item"
    ]


def open_numbers(graph_module: fx.GraphModule) -> None:
    """Put tensors in the place of the numbers of a torch-level graph, in place.

    Raises:
        CannotCapture: a number goes where a tensor cannot.
    """
    graph = graph_module.graph
    tensors: set[fx.Node] = set()
    numbers = set(numbers_in(graph))
    for node in list(graph.nodes):
        if node in numbers:
            tensors.add(node.args[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif any(parent in tensors for parent in node.all_input_nodes):
            _open(node, tensors)
            node.meta.pop("example_value", None)  # it named the number
    graph_module.recompile()


def filled(size: Sequence[int], value: Tensor, **kind: Any) -> Tensor:
    """``torch.full`` of a number that is a 0-d tensor."""
    dtype = kind.get("dtype") or (torch.get_default_dtype() if value.is_floating_point() else value.dtype)
    return value.to(dtype=dtype, device=kind.get("device")).expand(size)


def listed(values: Any, **kind: Any) -> Tensor:
    """``torch.tensor`` of a list of numbers of which some are 0-d tensors."""
    if isinstance(values, Tensor):
        return filled((), values, **kind)
    return torch.stack([listed(value, **kind) if isinstance(value, (list, tuple, Tensor)) else
                        torch.tensor(value, **kind) for value in values])  # fmt: skip


_FILLING: dict[Any, Callable[..., Tensor]] = {torch.full: filled, torch.tensor: listed, torch.as_tensor: listed,
                                              torch.scalar_tensor: listed}  # fmt: skip
_ARITHMETIC = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.iadd,
    operator.isub, operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div,
})  # fmt: skip
_METHODS = frozenset({"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"})


def _open(node: fx.Node, tensors: set[fx.Node]) -> None:
    if node.target in _FILLING:
        node.target = _FILLING[node.target]
    elif node.op == "call_method" and node.target in _METHODS:
        pass
    elif node.op == "call_function" and node.target in (torch.sym_float, float):
        node.target, node.kwargs = _as_float, {}
        tensors.add(node)
    elif node.op == "call_function" and node.target in _ARITHMETIC:
        if all(parent in tensors for parent in node.all_input_nodes):
            tensors.add(node)  # a number still
    else:
        raise CannotCapture(
            f"a number that differs at every step goes into {getattr(node.target, '__name__', node.target)}",
            where="capture",
            why="a tensor cannot go there",
            fix="pass a tensor",
        )


def _as_float(value: Tensor) -> Tensor:
    return value.to(torch.float64)
