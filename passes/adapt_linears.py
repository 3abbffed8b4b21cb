"""Add LoRA weights to linear layers of a piece, as inputs of its graph.

Before::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight, @proj.bias)

After::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight, @proj.bias)
    %4: f32[2,64,4] = aten.linear.default(%2, proj.weight:down)
    %5: f32[2,64,32] = aten.linear.default(%4, proj.weight:up)
    %6: f32[2,64,32] = aten.add.Tensor(%3, %5)

The layer's own weight is read as ever, so it may be edited, replaced or adapted by others meanwhile. It is done before
the passes, which therefore see one more part of the branch and nothing else. Left alone are layers that the latent does
not reach (modulation, keys and values of the text: they may be computed outside of the steps), and weights of a class
of their own (quantised ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from dicompile.analysis import Block, ModelStructure
from dicompile.capture import Capture, Role
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.kinds import LINEAR
from dicompile.passes.base import Segment, Value
from dicompile.passes.edit import Editor
from dicompile.passes.outline import Outline

aten = torch.ops.aten

DOWN, UP = ":down", ":up"
"""What is added to the name of a parameter for its LoRA weights A, [rank, c], and B, [d, rank]."""

_CASTS = (
    aten._to_copy.default, aten.to.dtype, aten.alias.default, aten.detach.default, aten.clone.default,
    aten.contiguous.default,
)  # fmt: skip


def adaptable(capture: Capture, structure: ModelStructure, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Weights of linear layers on the latent's way through some blocks, as their layers see them.

    Args:
        capture: the captured model.
        structure: its structure.
        blocks: some of its blocks.

    Returns:
        Fake tensors, [d, c], by the names of the parameters, in the order of the graph.
    """
    parameters, nodes = parameters_of(capture), {node.name: node for node in capture.graph.nodes}
    found = {}
    for name in (name for block in blocks for name in block.nodes):
        node = nodes[name]
        if node.target is LINEAR and Role.LATENT in structure.dependence[name]:
            weight = node_argument(node, 1)
            if weight.name in parameters:
                found[parameters[weight.name]] = tensor_of(weight)
    return found


def parameters_of(capture: Capture) -> dict[str, str]:
    """Names of the parameters that nodes are, or are cast from, by the names of the nodes."""
    placeholders = capture.graph.find_nodes(op="placeholder")
    found = {
        node.name: item.name
        for node, item in zip(placeholders, capture.inputs, strict=True)
        if item.role is Role.PARAMETER
    }
    for node in capture.graph.nodes:
        if node.target in _CASTS and node_argument(node, 0).name in found:
            found[node.name] = found[node_argument(node, 0).name]
    return found


def with_adapters(piece: Outline, parameters: Mapping[str, str], ranks: Mapping[str, int]) -> Outline:
    """A piece whose linear layers have LoRA weights; the piece itself if none of them is to have any.

    Args:
        piece: of the captured model.
        parameters: see `parameters_of`.
        ranks: of the LoRA weights, by the names of the parameters beside which they stand.

    Returns:
        The piece with further inputs behind its own: ``NAME:down``, ``NAME:up``.
    """
    if not any(parameters.get(name) in ranks for name in piece.inputs):
        return piece
    segment, inputs = piece.segment.copy(()), dict.fromkeys(piece.inputs)
    for node, entry in _linears(segment):
        parameter = parameters.get(piece.inputs[entry], "")
        if parameter in ranks:
            _adapt(segment, node, parameter, ranks[parameter], inputs)
    segment.owned |= frozenset(range(len(piece.inputs), len(inputs)))
    segment.graph_module.recompile()
    return Outline(segment, tuple(inputs), piece.outputs)


def _linears(segment: Segment) -> Iterator[tuple[fx.Node, int]]:
    """Linear layers, and the numbers of the values that are their weights."""
    placeholders = segment.graph.find_nodes(op="placeholder")
    numbers = {
        node: ref.index for node, ref in zip(placeholders, segment.inputs, strict=True) if isinstance(ref, Value)
    }
    for node in segment.graph.find_nodes(op="call_function", target=LINEAR):
        weight = node_argument(node, 1)
        while weight.target in _CASTS:
            weight = node_argument(weight, 0)
        if weight in numbers:
            yield node, numbers[weight]


def _adapt(segment: Segment, node: fx.Node, parameter: str, rank: int, inputs: dict[str, None]) -> None:
    """Let a node be the sum of the layer that it was and of the LoRA beside it."""
    editor, weight = Editor(segment), node_argument(node, 1)
    wide, narrow = tensor_of(weight).shape
    below = []
    for name, shape in ((parameter + DOWN, (rank, narrow)), (parameter + UP, (wide, rank))):
        inputs.setdefault(name)
        number = Value(list(inputs).index(name))
        below.append(editor.tensor_input(number, shape, tensor_of(weight).dtype, weight))
    with editor.before(node):
        plain, low = editor.call(LINEAR, *node.args), node_argument(node, 0)
        for each in below:
            low = editor.call(LINEAR, low, each)
    node.target, node.args = aten.add.Tensor, (plain, low)
