"""Trained cache predictors and their files: a small network, and the importance that it gave on calibration runs.

Beside them there may be LoRA weights for the last blocks, which then are never cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from dicompile import outside
from dicompile.errors import InvalidPredictor
from dicompile.store import save_tensors

IMPORTANCE = "importance"
PARAMETER = "parameter."
DOWN, UP = "lora_A.", "lora_B."


class Adapter(NamedTuple):
    """LoRA weights beside a linear layer: ``W x + up (down x)``.

    Attributes:
        down: A, [rank, c].
        up: B, [d, rank]; what LoRA calls alpha is the rank, so that there is no other factor.

    Reference:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, equation 3.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[0]

    @property
    def is_sound(self) -> bool:
        """True for two finite matrices that go together."""
        shapes = self.down.ndim, self.up.ndim, self.up.shape[-1:]
        return shapes == (2, 2, self.down.shape[:1]) and all(bool(each.isfinite().all()) for each in self)


class PredictorFacts(BaseModel):
    """What a predictor was trained for, as stored in its file.

    Attributes:
        format: name and version of the file format.
        kind: "network": a copy of the model's first block that sees latent, timestep and conditioning (version 2 of the
            paper); "table": a function of step, block and token position alone (version 1).
        blocks: labels of the blocks in order.
        timesteps: of the sampler, in calling order.
        penalty: weight of the sparsity term in training.
        seed: of the training.
        iterations: optimiser steps.
        adapted: number of the last blocks that are never cached, and have LoRA weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dicompile.predictor/1"] = "dicompile.predictor/1"
    kind: Literal["network", "table"]
    blocks: tuple[str, ...]
    timesteps: tuple[float, ...]
    penalty: float
    seed: int
    iterations: int
    adapted: NonNegativeInt = 0


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained cache predictor.

    Attributes:
        importance: mean over calibration samples, in (0, 1); float32, [steps, blocks, tokens].
        facts: see `PredictorFacts`.
        parameters: of the network, by the model's own names, and of its head; empty for a table.
        source: what messages call it.
        adapters: LoRA weights of the last blocks, by the names of the parameters beside which they stand.

    Raises:
        InvalidPredictor: the importance, or the LoRA weights, are not what the facts say.

    Reference:
        Lou et al., Token Caching for Diffusion Transformer Acceleration, arXiv 2409.18523, section 3.
    """

    importance: Tensor = field(repr=False)
    facts: PredictorFacts
    parameters: dict[str, Tensor] = field(repr=False, default_factory=dict)
    source: str = "predictor"
    adapters: Mapping[str, Adapter] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        unsound = next((name for name, adapter in self.adapters.items() if not adapter.is_sound), None)
        expected = (len(self.facts.timesteps), len(self.facts.blocks))
        shape, what = tuple(self.importance.shape), ""
        if len(shape) != 3 or shape[:2] != expected:
            what = f"the importance has shape {shape}, its facts say {expected[0]} steps and {expected[1]} blocks"
        elif self.importance.dtype != torch.float32:
            what = f"the importance is {str(self.importance.dtype).removeprefix('torch.')}, not float32"
        elif not self.importance.isfinite().all():
            what = "the importance is not finite"
        elif unsound is not None:
            what = f"the LoRA weights of {unsound} do not go together, or are not finite"
        elif bool(self.adapters) != bool(self.facts.adapted) or self.facts.adapted >= len(self.facts.blocks):
            what = f"its facts say {self.facts.adapted} adapted blocks, and it has LoRA weights of {len(self.adapters)}"
        if what:
            raise InvalidPredictor(what, where=self.source, fix="train the predictor again")

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        return self.importance.shape[0]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.importance.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.importance.shape[2]

    @property
    def adapter_numbers(self) -> int:
        """Numbers in all LoRA weights."""
        return sum(each.numel() for adapter in self.adapters.values() for each in adapter)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {IMPORTANCE: self.importance.half().contiguous()}
        tensors |= {PARAMETER + name: tensor.half().contiguous() for name, tensor in self.parameters.items()}
        for name, adapter in self.adapters.items():
            tensors |= {DOWN + name: adapter.down.half().contiguous(), UP + name: adapter.up.half().contiguous()}
        save_tensors(Path(path), tensors, {"facts": self.facts.model_dump_json()})


def load_predictor(path: Path | str) -> Predictor:
    """Read a predictor.

    Raises:
        InvalidPredictor: there is no such file, or it holds no predictor.
    """
    try:
        metadata, tensors = outside.read_safetensors(path)
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise outside.Unreadable("its tensors are not of floating-point numbers")
    except (OSError, outside.Unreadable) as error:
        raise InvalidPredictor(
            "this is not a safetensors file",
            where=str(path),
            why=str(error),
            fix="give the file that `dicompile train-predictor` wrote",
        ) from None
    try:
        facts = PredictorFacts.model_validate(outside.from_json(metadata.get("facts", "null")))
    except (ValidationError, ValueError) as error:
        raise InvalidPredictor(
            "this file does not say what its predictor was trained for",
            where=str(path),
            why=" ".join(str(error).split()),
            fix="give the file that `dicompile train-predictor` wrote",
        ) from None
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    importance = tensors.pop(IMPORTANCE, None)
    if importance is None:
        raise InvalidPredictor("this file holds no importance", where=str(path), fix="train the predictor again")
    adapted = [name.removeprefix(each) for each in (DOWN, UP) for name in tensors if name.startswith(each)]
    adapters = {
        name: Adapter(*(tensors.pop(each + name, torch.empty(0)) for each in (DOWN, UP)))
        for name in dict.fromkeys(adapted)
    }
    parameters = {name.removeprefix(PARAMETER): tensor for name, tensor in tensors.items()}
    return Predictor(importance, facts, parameters, str(path), adapters)
