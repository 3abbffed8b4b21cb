"""Operators that are made of others become these: an ``einsum`` is a product, and a region of its own is its content.

Before::

    %3: f32[2,16,128] = aten.einsum.default('bnd,df->bnf', [%1, %2])

After::

    %4: f32[2,16,1,32] = aten.permute.default(...)
    %5: f32[1,32,128] = aten.bmm.default(%4, ...)
    ...

Everything after the capture then meets operators that it knows.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.errors import CannotCapture
from dicompile.nodes import results_of
from dicompile.text import first_line, module_path, operator_text

aten = torch.ops.aten

COMPOSITES = frozenset({
    aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.bilinear.default,
    aten.linalg_vecdot.default, aten.chain_matmul.default, aten.linalg_multi_dot.default, aten.kron.default,
})  # fmt: skip
"""Products under other names, which torch itself computes by the operators that analysis knows."""

_FILLS_DIAGONAL = ("fill_diagonal_", aten.fill_diagonal_.default)

_REGIONS = ("invoke_subgraph", "tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")
"""Higher-order operators that run a graph as it is: ``nested_compile_region``, ``checkpoint``."""


def inline_regions(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the content of regions in their place.

    Args:
        graph_module: as Dynamo made it; it is not changed.

    Raises:
        CannotCapture: it has another higher-order operator, whose graphs are not run exactly once.
    """
    made = graph_module
    while True:
        calls = [node for node in made.graph.nodes if isinstance(node.target, HigherOrderOperator)]
        if not calls:
            return made
        if made is graph_module:
            made = copy.deepcopy(graph_module)
            continue
        for node in calls:
            if node.target.name() not in _REGIONS:
                raise _refused(node)
            _inline(made, node)
        for node in made.graph.find_nodes(op="get_attr"):
            if not node.users:
                made.graph.erase_node(node)
        made.recompile()


def _refused(node: fx.Node) -> CannotCapture:
    path = module_path(node)
    return CannotCapture(
        f"{node.target.name()}(){f' in {path}' if path else ''} runs Python of its own",  # type: ignore[union-attr]
        where="capture",
        why="how often its graphs run, and which, is decided by values",
        fix="write it with tensors: torch.where, scaled_dot_product_attention with a mask",
    )


def _inline(graph_module: fx.GraphModule, call: fx.Node) -> None:
    """Put the graph that a region runs in the place of the call."""
    position = next(i for i, argument in enumerate(call.args) if _is_graph(graph_module, argument))
    held: Any = call.args[position]
    region = getattr(graph_module, held.target)
    operands = [a for a in call.args[position + 1 :] if not isinstance(a, str) and a is not None]
    results = _copied(region, operands, call)
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            call.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0])
    call.graph.erase_node(call)


def _is_graph(graph_module: fx.GraphModule, argument: Any) -> bool:
    is_attribute = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return is_attribute and isinstance(getattr(graph_module, argument.target), fx.GraphModule)


def _copied(part: fx.GraphModule, operands: Sequence[Any], before: fx.Node) -> list[Any]:
    """Copy the nodes of a graph before a node; returns what it returns."""
    known: dict[fx.Node, Any] = dict(zip(part.graph.find_nodes(op="placeholder"), operands, strict=True))
    owner = before.graph.owning_module
    for node in part.graph.nodes:
        if node.op == "get_attr":
            name = f"{before.name}_{node.target}"
            setattr(owner, name, getattr(part, node.target))
            with before.graph.inserting_before(before):
                known[node] = before.graph.get_attr(name)
        elif node.op not in ("placeholder", "output"):
            with before.graph.inserting_before(before):
                known[node] = before.graph.node_copy(node, known.__getitem__)
            if "nn_module_stack" in before.meta and not node.meta.get("nn_module_stack"):
                known[node].meta["nn_module_stack"] = before.meta["nn_module_stack"]
    return [known[result] if isinstance(result, fx.Node) else result for result in results_of(part.graph)]


def write_out_calls(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph without calls that torch cannot make functional.

    Writes to diagonals become writes under a mask. ``torch.Tensor(tensor)``, as GGUF weights are read, is that tensor;
    a trace would take what it returns for a constant.

    Args:
        graph_module: as Dynamo made it, or a run; it is not changed.
    """
    if not any(_written_out(node) for node in graph_module.graph.nodes):
        return graph_module
    made = copy.deepcopy(graph_module)
    for node in made.graph.nodes:
        written = _written_out(node)
        if written is not None:
            node.op, node.target = "call_function", written
    made.recompile()
    return made


def _written_out(node: fx.Node) -> Any:
    """What to call in the place of a call, if not the same."""
    if node.target in _FILLS_DIAGONAL:
        return fill_diagonal
    is_tensor = node.target is Tensor and len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    return aten.alias.default if is_tensor else None


def fill_diagonal(tensor: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """What ``tensor.fill_diagonal_(fill_value, wrap)`` does."""
    place = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    is_filled = place % sum(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)) == 0
    if tensor.ndim == 2 and not wrap:
        is_filled = is_filled & (place < tensor.shape[1] ** 2)
    return tensor.masked_fill_(is_filled, fill_value)


def write_out_composites(graph_module: fx.GraphModule) -> None:
    """Replace the operators of `COMPOSITES` by what they are made of; the graph's fake mode must be active."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in COMPOSITES:
            (result,) = _copied(_parts(node), node.all_input_nodes, node)
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _parts(node: fx.Node) -> fx.GraphModule:
    """The graph of one operator, over the values that it takes."""
    target, operands = node.target, node.all_input_nodes
    assert isinstance(target, OpOverload)

    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        return target.decompose(*args, **kwargs)

    try:
        return make_fx(run)(*(operand.meta["val"] for operand in operands))
    except RuntimeError as error:
        raise CannotCapture(
            f"{operator_text(target)} cannot be written out",
            where="capture",
            why=first_line(error),
            fix="write it as torch.matmul",
        ) from error
