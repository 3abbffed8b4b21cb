"""Runs of tiny models with a flow-matching scheduler, recorded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import dicompile
from dicompile.learn.latents import LATENTS
from dicompile.learn.runs import Runs
from tests.models import Sample


def runs_of(sample: Sample, steps: int, guidance: float = 1.0, scheduler: Any = None) -> Runs:
    """Runs from noise and labels that are drawn."""
    latent, label = ("x", "y") if "x" in sample.inputs else ("hidden_states", "class_labels")
    like = sample.inputs[latent]

    def data(generator: torch.Generator) -> dict[str, Tensor]:
        return {LATENTS: like, label: torch.randint(10, (len(like),), generator=generator)}

    return Runs(sample.inputs, scheduler or FlowMatchEulerDiscreteScheduler(), data, {label: 10}, steps, guidance)


def recorded(sample: Sample, steps: int, count: int, **more: Any) -> dicompile.Trajectories:
    """Trajectories of some runs; the model is as it was."""
    runs = runs_of(sample, steps, **more)
    model = dicompile.optimize(sample.model, "none", schedule=runs.scheduler, backend="eager")
    with dicompile.record_trajectories(model) as trajectories:
        for number in range(count):
            runs.sample(model, number)
    return trajectories


def final(sample: Sample, runs: Runs, policy: Any, number: int) -> Tensor:
    """Latents at the end of a run under a policy."""
    runs.scheduler.set_timesteps(runs.steps)
    model: nn.Module = dicompile.optimize(sample.model, policy, schedule=runs.scheduler, backend="eager")
    return runs.sample(model, number)
