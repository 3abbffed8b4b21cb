"""Parameters of a class of their own (quantised ones) as the plain tensors that they consist of.

Before::

    %w: Int8Tensor[64,32] = placeholder  # blocks.0.proj.weight
    %1 = torch._C._nn.linear(%0, %w, %b)

After::

    %w_qdata: i8[64,32] = placeholder    # blocks.0.proj.weight.qdata
    %w_scale: f32[64,1] = placeholder    # blocks.0.proj.weight.scale
    %1 = dicompile.wrapped_linear(%0, [%w_qdata, %w_scale], %b, 'Int8Tensor_0')

Any other operator gets the tensor put together just before it, and is traced into what its library makes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from dicompile.capture.guards import Fact, Path
from dicompile.ops.wrapped import WRAPPED_LINEAR, Wrapper, is_wrapped, plain_tensors, put_together, wrapper_of


def take_apart(tensors: Mapping[Path, Tensor]) -> tuple[dict[Path, Tensor], dict[Path, Fact]]:
    """Tensors by path with their plain tensors in the place of those of a class of their own; facts about these."""
    plain: dict[Path, Tensor] = {}
    facts: dict[Path, Fact] = {}
    for path, tensor in tensors.items():
        if not is_wrapped(tensor):
            plain[path] = tensor
            continue
        wrapper = wrapper_of(tensor)
        facts[path] = Fact(path, "wrapped", wrapper)
        for names, part in zip(wrapper.paths(), plain_tensors(tensor), strict=True):
            at = path
            for name in names:
                at = at.attribute(name)
            plain[at] = part
    return plain, facts


def open_wrapped(graph_module: fx.GraphModule, inputs: Sequence[Any], own: Collection[int]) -> list[Any]:
    """Make plain tensors the inputs of a graph.

    Args:
        graph_module: torch-level graph; it is changed.
        inputs: values of its placeholders.
        own: ids of the tensors that belong to the module.

    Returns:
        Values of its placeholders then.
    """
    graph, opened = graph_module.graph, list[Any]()
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        if not is_wrapped(value) or id(value) not in own:
            opened.append(value)
            continue
        parts, wrapper = [], wrapper_of(value)
        for names, part in zip(wrapper.paths(), plain_tensors(value), strict=True):
            with graph.inserting_before(node):
                parts.append(graph.placeholder("_".join((str(node.target), *names))))
            opened.append(part)
        for user in list(node.users):
            _give_parts(graph, user, node, parts, wrapper)
        graph.erase_node(node)
    if len(opened) > len(inputs):
        graph_module.recompile()
    return opened


def _give_parts(graph: fx.Graph, user: fx.Node, weight: fx.Node, parts: list[fx.Node], wrapper: Wrapper) -> None:
    linear = _linear(user)
    with graph.inserting_before(user):
        if linear is not None and linear[1] is weight and weight not in (linear[0], linear[2]):
            made = graph.call_function(WRAPPED_LINEAR, (linear[0], parts, linear[2], wrapper.name))
            made.meta = dict(user.meta)
            user.replace_all_uses_with(made)
            graph.erase_node(user)
        else:
            whole = graph.call_function(put_together, (wrapper.name, *parts))
            whole.meta = {name: user.meta[name] for name in ("nn_module_stack", "stack_trace") if name in user.meta}
            user.replace_input_with(weight, whole)


def _linear(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Source, weight and bias of a linear map; None for anything else."""
    if node.op != "call_function" or node.target is not F.linear:
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return given["input"], given["weight"], given.get("bias")
