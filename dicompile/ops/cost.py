"""Floating-point operations and memory traffic of graph nodes.

Counted are matrix products only (2 per multiply-add), as in the papers; element-wise work shows up as bytes.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.kinds import ATTENTION, CONVOLUTIONS, LINEAR, VIEWS, is_heavy

aten = torch.ops.aten


def node_flops(node: fx.Node) -> int:
    """Floating-point operations of one node."""
    if not is_heavy(node):
        return 0
    inputs, output = node.all_input_nodes, tensor_of(node)
    if node.target is ATTENTION:
        query, key, value = (tensor_of(node_argument(node, i)) for i in range(3))
        return 2 * query.numel() * key.shape[-2] + 2 * math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]
    if node.target is LINEAR:
        return 2 * output.numel() * tensor_of(inputs[0]).shape[-1]
    if node.target in CONVOLUTIONS:
        return 2 * output.numel() * math.prod(tensor_of(inputs[1]).shape[1:])
    left = tensor_of(inputs[1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0])
    return 2 * output.numel() * left.shape[-1]


def node_bytes(node: fx.Node) -> int:
    """Bytes read and written by one node if nothing were fused; views are free."""
    if node.op != "call_function" or node.target in VIEWS or not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    return sum(tensor_bytes(value) for value in [*values, node.meta["val"]])


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor, 0 for anything else."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
