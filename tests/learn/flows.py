"""Runs of tiny models with a flow-matching scheduler, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import dicompile
from dicompile.learn.latents import LATENTS
from dicompile.learn.objective import Objective
from dicompile.learn.predictor import PredictorOptions, PredictorTraining
from dicompile.learn.router import RouterOptions, RouterTraining
from dicompile.learn.runs import Runs
from dicompile.learn.training import Files, run_to_end
from tests.models import PlainDiT, Sample, redraw


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


def trained(folder: Path) -> dict[str, Tensor]:
    """Parameters of a router and of a predictor with LoRA, each after four iterations of three trajectories."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    sample = Sample(redraw(PlainDiT(layers=2, width=16, size=8)), inputs)
    source = recorded(sample, 4, 3)
    router = RouterTraining(sample.model, source, RouterOptions(4, Objective(1e-4, "sum"), lr=0.1, batch=3))
    options = PredictorOptions(4, "table", lr=1e-2, batch=3, lora_blocks=1, lora_rank=2)
    predictor = PredictorTraining(sample.model, source, options)
    for training in (router, predictor):
        run_to_end(training, Files(folder / f"{training.name}.ckpt", folder / f"{training.name}.jsonl"), progress=False)
    made = predictor.predictor()
    adapters = {f"{name} {i}": each for name, pair in made.adapters.items() for i, each in enumerate(pair)}
    return {"logits": router.router().logits, "importance": made.importance, **adapters}
