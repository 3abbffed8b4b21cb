"""Floating-point operations and memory traffic of graph nodes.

Counted are matrix products only (2 per multiply-add), as in the papers; element-wise work shows up as bytes.
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.collectives import ranks_of
from dicompile.ops.kinds import (
    ADDED_PRODUCTS,
    CONVOLUTIONS,
    HEAVY,
    PADDED_CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    VIEWS,
    flop_formula,
    is_attention,
)

aten = torch.ops.aten

# What torch counts are the operators that ours become when they run.
_MM = flop_registry[aten.mm]
_CONVOLUTION = flop_registry[aten.convolution]
_ATTENTION = flop_registry[aten._scaled_dot_product_flash_attention]

Shape = tuple[int, ...]


def node_flops(node: fx.Node) -> int:
    """Floating-point operations of one node, by torch's formulas; 0 where there is none."""
    if not (node.target in HEAVY or is_attention(node)):
        return _told_flops(node)
    output = tuple(tensor_of(node).shape)
    operands = [tuple(tensor_of(operand).shape) for operand in node.args if isinstance(operand, fx.Node)]
    if is_attention(node):
        return ranks_of(node) * _attention_flops(operands[0], operands[1], operands[2])
    if node.target in (*CONVOLUTIONS, *PADDED_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        return _convolution_flops(operands[0], operands[1], output, transposed=node.target in TRANSPOSED_CONVOLUTIONS)
    return _product_flops(operands[1 if node.target in ADDED_PRODUCTS else 0], output)


def _told_flops(node: fx.Node) -> int:
    formula = flop_formula(node)
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda parent: parent.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _attention_flops(query: Shape, key: Shape, value: Shape) -> int:
    """Heads of keys and values may be fewer, or missing."""
    heads = math.prod(query[:-2])
    flops: int = _ATTENTION(*((1, heads, *shape[-2:]) for shape in (query, key, value)))
    return flops


def score_work(node: fx.Node) -> tuple[int, int]:
    """Operations and bytes of a score of all tokens, which makes the logits of an attention node once more."""
    query, key = (tensor_of(node_argument(node, i)) for i in range(2))
    flops = _product_flops(tuple(query.shape), (*query.shape[:-1], key.shape[-2]))
    return ranks_of(node) * flops, tensor_bytes(query) + tensor_bytes(key)


def _convolution_flops(image: Shape, kernel: Shape, output: Shape, *, transposed: bool) -> int:
    """The axis of samples may be missing."""
    samples = (1,) * (len(kernel) - len(image))
    flops: int = _CONVOLUTION(
        (*samples, *image), kernel, None, None, None, None, transposed=transposed, out_val=(*samples, *output)
    )
    return flops


def _product_flops(left: Shape, output: Shape) -> int:
    """Every element of the result is a row times a column."""
    flops: int = _MM((math.prod(output), left[-1]), (left[-1], 1))
    return flops


def node_bytes(node: fx.Node) -> int:
    """Bytes read and written by one node if nothing were fused; views are free."""
    if node.op != "call_function" or node.target in VIEWS or not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    return sum(tensor_bytes(value) for value in [*values, node.meta["val"]])


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor, 0 for anything else."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
