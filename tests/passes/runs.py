"""Short runs of optimized models, whose outputs tell whether attention by another kernel is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dicompile
from tests.models import Sample, timesteps

STEPS = 4


def runs_of(sample: Sample, policy: Any, **options: Any) -> list[Tensor]:
    """Outputs of a run of `STEPS` steps whose latent shrinks; the model is restored after it."""
    schedule = timesteps(STEPS)
    model = dicompile.optimize(sample.model, policy, schedule=schedule, **options)
    outputs = []
    for step, timestep in enumerate(schedule):
        time = torch.full_like(sample.inputs["timestep"], timestep)
        latent = sample.inputs["hidden_states"] * (1 - 0.1 * step)
        outputs.append(model(**{**sample.inputs, "hidden_states": latent, "timestep": time})[0])
    dicompile.restore(model)
    return outputs
