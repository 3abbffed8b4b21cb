"""Trained cache predictors and their files: a small network, and the importance that it gave on calibration runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dicompile import outside
from dicompile.errors import InvalidPredictor
from dicompile.store import save_tensors

IMPORTANCE = "importance"
PARAMETER = "parameter."


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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dicompile.predictor/1"] = "dicompile.predictor/1"
    kind: Literal["network", "table"]
    blocks: tuple[str, ...]
    timesteps: tuple[float, ...]
    penalty: float
    seed: int
    iterations: int


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained cache predictor.

    Attributes:
        importance: mean over calibration samples, in (0, 1); float32, [steps, blocks, tokens].
        facts: see `PredictorFacts`.
        parameters: of the network, by the model's own names, and of its head; empty for a table.
        source: what messages call it.

    Raises:
        InvalidPredictor: the importance is not what the facts say.

    Reference:
        Lou et al., Token Caching for Diffusion Transformer Acceleration, arXiv 2409.18523, section 3.
    """

    importance: Tensor = field(repr=False)
    facts: PredictorFacts
    parameters: dict[str, Tensor] = field(repr=False, default_factory=dict)
    source: str = "predictor"

    def __post_init__(self) -> None:
        expected = (len(self.facts.timesteps), len(self.facts.blocks))
        shape, what = tuple(self.importance.shape), ""
        if len(shape) != 3 or shape[:2] != expected:
            what = f"the importance has shape {shape}, its facts say {expected[0]} steps and {expected[1]} blocks"
        elif self.importance.dtype != torch.float32:
            what = f"the importance is {str(self.importance.dtype).removeprefix('torch.')}, not float32"
        elif not self.importance.isfinite().all():
            what = "the importance is not finite"
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

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {IMPORTANCE: self.importance.half().contiguous()}
        tensors |= {PARAMETER + name: tensor.half().contiguous() for name, tensor in self.parameters.items()}
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
    parameters = {name.removeprefix(PARAMETER): tensor for name, tensor in tensors.items()}
    return Predictor(importance, facts, parameters, str(path))
