"""A cache predictor as a callable: a copy of the model's first block with parameters of its own, and a linear head.

And the LoRA weights that come with it, ready to be read by the model's last blocks.

The network is cut out of the captured model, so that it needs no adapter: whatever leads from the inputs to the end of
the first block, with trained copies of the parameters on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dicompile.analysis import ModelStructure
from dicompile.capture import Capture, Role
from dicompile.config import DebugFolder, Settings
from dicompile.lower.inductor import Backend, Code
from dicompile.parked import brought
from dicompile.passes import DOWN, PASSES, UP, Segment, Value, adaptable, outline_until, rewrite
from dicompile.plan import Predictor, check_adapters, check_parameters, first_span

HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


@dataclass(frozen=True)
class FirstBlock:
    """The part of a captured model up to the end of its first block.

    Attributes:
        segment: one output, the stream after the block, [b, n, d].
        arguments: per input of the segment, position among the model's inputs and name.
        parameters: names of the inputs that are parameters.
    """

    segment: Segment = field(repr=False)
    arguments: tuple[tuple[int, str], ...]
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, capture: Capture, structure: ModelStructure) -> FirstBlock:
        """Cut it out.

        Raises:
            PolicyDoesNotFit: the model has no span of one block.
        """
        whole, live = outline_until(capture, structure, first_span(structure).add)
        segment, _ = rewrite(
            whole.segment, (), frozenset({live}), PASSES, settings=Settings(), debug=DebugFolder(None), name="predictor"
        )
        placeholders = [node.name for node in capture.graph.find_nodes(op="placeholder")]
        names = [whole.inputs[ref.index] for ref in segment.inputs if isinstance(ref, Value)]
        positions = [placeholders.index(name) for name in names]
        arguments = tuple((i, capture.inputs[i].name) for i in positions)
        parameters = tuple(capture.inputs[i].name for i in positions if capture.inputs[i].role is Role.PARAMETER)
        return cls(segment, arguments, parameters)


def importance_of(stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Importance of tokens in every block: ``sigmoid(LayerNorm(h) W + b)``.

    Args:
        stream: stream after the predictor's block, [b, n, d].
        weight: [blocks, d].
        bias: [blocks].

    Returns:
        In (0, 1), float32, [b, n, blocks].
    """
    normed = F.layer_norm(stream.float(), stream.shape[-1:])
    return torch.sigmoid(F.linear(normed, weight.float(), bias.float()))


def network_predictor(
    capture: Capture, structure: ModelStructure, parameters: Mapping[str, Tensor], backend: Backend, source: str
) -> tuple[Callable[[Sequence[Any], int], Tensor], Code]:
    """A predictor network for one captured model.

    Args:
        capture: the captured model.
        structure: its structure.
        parameters: trained copies by the model's own names, and the head.
        backend: what compiles it.
        source: file that they come from.

    Returns:
        Importance from the model's inputs and the step, float32, [b, n, blocks]; and the code in it, which is not
        compiled yet.

    Raises:
        PolicyDoesNotFit: a parameter is missing or has another shape.
    """
    first = FirstBlock.of(capture, structure)
    placeholders = first.segment.graph.find_nodes(op="placeholder")
    expected = {name: node.meta["val"] for (_, name), node in zip(first.arguments, placeholders, strict=True)}
    check_parameters(
        {name: tensor.shape for name, tensor in parameters.items()},
        {name: expected[name].shape for name in first.parameters},
        source,
    )
    function = Code(first.segment, backend)
    own = {name: parameters[name].to(expected[name].device, expected[name].dtype) for name in first.parameters}
    device = next(iter(own.values())).device
    weight, bias = (parameters[name].to(device) for name in (HEAD_WEIGHT, HEAD_BIAS))

    def predict(inputs: Sequence[Any], step: int) -> Tensor:
        del step
        (stream,) = function(*[own[name] if name in own else brought(inputs[i]) for i, name in first.arguments])
        return importance_of(stream, weight, bias)

    return predict, function


def lora_weights(capture: Capture, structure: ModelStructure, trained: Predictor, planned: int) -> dict[str, Tensor]:
    """LoRA weights of a predictor as one captured model reads them.

    Args:
        capture: the captured model.
        structure: its structure.
        trained: the predictor.
        planned: numbers in its LoRA weights as the policy says.

    Returns:
        In the dtype of the layers beside which they stand, and on their devices, by the names of `with_adapters`.

    Raises:
        PolicyDoesNotFit: they are for another model or policy.
    """
    blocks = structure.blocks[len(structure.blocks) - trained.facts.adapted :]
    beside = adaptable(capture, structure, blocks)
    check_adapters(
        {name: (len(adapter.up), adapter.down.shape[1]) for name, adapter in trained.adapters.items()},
        {name: weight.shape for name, weight in beside.items()},
        trained.source,
        planned,
        trained.adapter_numbers,
    )
    return {
        name + end: each.to(beside[name].device, beside[name].dtype).contiguous()
        for name, adapter in trained.adapters.items()
        for end, each in ((DOWN, adapter.down), (UP, adapter.up))
    }


def table_predictor(importance: Tensor, batch: int) -> Callable[[Sequence[Any], int], Tensor]:
    """A predictor that knows step, block and token alone.

    Args:
        importance: [steps, blocks, tokens].
        batch: rows of the batch.
    """

    def predict(inputs: Sequence[Any], step: int) -> Tensor:
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        return importance[step].T.to(device).expand(batch, -1, -1)

    return predict
