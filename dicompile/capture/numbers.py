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
    tensors: dict[fx.Node, bool] = {}
    numbers = set(numbers_in(graph))
    for node in list(graph.nodes):
        if node in numbers:
            tensors[node.args[0]] = isinstance(node.meta.get("example_value"), (float, torch.SymFloat))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif any(parent in tensors for parent in node.all_input_nodes):
            _open(node, tensors)
            if not isinstance(node.meta.get("example_value"), Tensor):
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
                                              torch.scalar_tensor: listed, torch._refs.tensor: listed}  # fmt: skip
_ARITHMETIC: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", operator.sub: "sub", operator.isub: "sub",
    torch.sub: "sub", operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", operator.truediv: "truediv",
    operator.itruediv: "truediv", torch.div: "truediv", operator.neg: "neg", operator.pow: "pow",
}  # fmt: skip
_METHODS = frozenset({"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"})


def calculated(operation: str, *values: Any) -> Tensor:
    """Arithmetic with numbers that are 0-d tensors, as precise as that of Python."""
    floats = [value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float) for value in values]
    if any(floats) or operation == "truediv":
        values = tuple(value.to(torch.float64) if isinstance(value, Tensor) else value for value in values)
    result: Tensor = getattr(operator, operation)(*values)
    return result


def _open(node: fx.Node, tensors: dict[fx.Node, bool]) -> None:
    """Let a node take tensors where it took numbers; what is a number still joins them, with whether it is a float."""
    is_function = node.op == "call_function"
    computes = node.target in (_ARITHMETIC if is_function else _METHODS) and not node.kwargs
    if is_function and node.target in _FILLING:
        node.target = _FILLING[node.target]
    elif is_function and node.target in (torch.sym_float, float):
        node.target, node.kwargs = _as_float, {}
        tensors[node] = True
    elif is_function and computes and all(parent in tensors for parent in node.all_input_nodes):
        tensors[node] = isinstance(node.meta.get("example_value"), (float, torch.SymFloat))
        node.target, node.args = calculated, (_ARITHMETIC[node.target], *node.args)
    elif not computes or not _promotes_alike(node, tensors):
        raise CannotCapture(
            f"a number that differs at every step goes into {getattr(node.target, '__name__', node.target)}",
            where="capture",
            why="a tensor cannot go there",
            fix="pass a tensor",
        )


def _promotes_alike(node: fx.Node, tensors: dict[fx.Node, bool]) -> bool:
    """True if the result has the dtype that it has with a number: a 0-d tensor counts where there is no larger one."""
    is_float = any(tensors[parent] for parent in node.all_input_nodes if parent in tensors)
    others: list[Any] = [parent.meta.get("example_value") for parent in node.all_input_nodes if parent not in tensors]
    if not all(isinstance(value, Tensor) for value in others):
        return False
    if is_float:
        return any(value.ndim and value.is_floating_point() for value in others)
    return any(value.ndim or value.is_floating_point() for value in others)


def _as_float(value: Tensor) -> Tensor:
    return value.to(torch.float64)
