"""Every mistake has its text: what happened, where, why, and the fix."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dicompile
from dicompile import errors
from tests import models
from tests.models import optimized, run

INTERNAL = {errors.IllegalGraph, errors.StaleRead}
"""Bugs of dicompile, not of the user; provoked where they are found: passes and runtime."""


class Writes(nn.Module):
    """Writes to the tensor it is given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(2) + t


class Perceptron(nn.Module):
    """Takes a timestep and has no residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t.sin()


class Pipeline:
    """What an object needs to look like a pipeline."""

    def __init__(self, **components: Any) -> None:
        self.scheduler = DDIMScheduler()
        self.components = components
        vars(self).update(components)


def plain_dit() -> nn.Module:
    return models.plain_dit(1).model


def call_plain_dit(policy: Any, timesteps: list[int], schedule: Any) -> None:
    sample = models.plain_dit(1)
    run(dicompile.optimize(sample.model, policy, schedule=schedule, mode="eager"), sample.inputs, timesteps)


def call_module(module: nn.Module, policy: Any) -> None:
    dicompile.optimize(module, policy, schedule=2, mode="eager")(torch.randn(2, 8), torch.ones(2, 1))


def call_with_disabled_passes(value: str) -> None:
    with mock.patch.dict(os.environ, {"DICOMPILE_PASSES": value}):
        call_plain_dit("none", [999], 1)


def call_odd_batch() -> None:
    sample = models.pixart(1)
    inputs = {k: v[:1] if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
    run(dicompile.optimize(sample.model, dicompile.ToCaPixArt(), schedule=4, mode="eager"), inputs, [999])


def call_joint_attention() -> None:
    sample = models.sd3(1)
    run(optimized(sample, dicompile.ToCa(grid_cell=0), 4), sample.inputs, [999])


def optimize_pipeline_twice() -> None:
    pipe = dicompile.optimize(Pipeline(transformer=plain_dit()), "none")
    dicompile.optimize(pipe, "none")


def refresh_of_attention() -> dicompile.Policy:
    rule = dicompile.Rule(sites=("self-attention",), do=dicompile.Refresh(ratio=0.5))
    return dicompile.Policy(name="mine", cadence=dicompile.Cadence(interval=2), rules=(rule,))


CASES: list[tuple[type[errors.DicompileError], Callable[[], Any], str]] = [
    (errors.UnknownPolicy, lambda: dicompile.optimize(plain_dit(), "forra", schedule=4), ""),
    (errors.InvalidPolicy, lambda: dicompile.get_policy("fora", intervall=2), ""),
    (errors.InvalidPolicy, lambda: dicompile.FORA(interval=0), ""),
    (errors.InvalidPolicy, lambda: dicompile.ToCa(schedule="ddim25"), ""),
    (errors.InvalidPolicy, lambda: dicompile.optimize(plain_dit(), {"name": "mine", "rulez": []}), ""),
    (errors.InvalidPolicy, lambda: dicompile.Policy.from_yaml("name: [", "mine.yaml"), ""),
    (errors.PolicyDoesNotFit, lambda: call_plain_dit(refresh_of_attention(), [999], 4), ""),
    (errors.PolicyDoesNotFit, lambda: call_plain_dit(dicompile.ToCa(score="entropy"), [999], 4), ""),
    (errors.PolicyDoesNotFit, lambda: call_plain_dit(dicompile.ToCa(grid_cell=3), [999], 4), ""),
    (errors.PolicyDoesNotFit, call_joint_attention, ""),
    (errors.PolicyDoesNotFit, call_odd_batch, ""),
    (errors.NoSitesFound, lambda: call_module(Perceptron(), "fora"), ""),
    (errors.InvalidSchedule, lambda: dicompile.optimize(plain_dit(), "fora"), ""),
    (errors.InvalidSchedule, lambda: dicompile.optimize(plain_dit(), "fora", schedule=0), ""),
    (errors.InvalidSchedule, lambda: dicompile.optimize(plain_dit(), "fora", schedule="ddim"), ""),
    (errors.InvalidSchedule, lambda: call_plain_dit("fora", [999], DDIMScheduler()), ""),
    (errors.CallOutsideSchedule, lambda: call_plain_dit("fora", [999, 700], [999, 500]), ""),
    (errors.CallOutsideSchedule, lambda: call_plain_dit("fora", [999, 500, 100], 2), ""),
    (errors.CannotCapture, lambda: call_module(Writes(), "none"), ""),
    (errors.NotOptimized, lambda: dicompile.restore(plain_dit()), ""),
    (errors.NotOptimized, lambda: dicompile.plan_of(Pipeline(transformer=plain_dit())), ""),
    (errors.AlreadyOptimized, lambda: dicompile.optimize(dicompile.optimize(plain_dit())), ""),
    (errors.AlreadyOptimized, optimize_pipeline_twice, ""),
    (errors.NotYetRun, lambda: dicompile.plan_of(dicompile.optimize(plain_dit())), ""),
    (errors.UnsupportedModel, lambda: dicompile.optimize("DiT-XL/2", "fora"), ""),
    (errors.UnsupportedModel, lambda: dicompile.optimize(Pipeline(vae=nn.Linear(2, 2)), "fora"), ""),
    (errors.InvalidSetting, lambda: dicompile.optimize(plain_dit(), mode="fast"), ""),
    (errors.InvalidSetting, lambda: call_with_disabled_passes("drop-dead"), ""),
    (errors.InvalidSetting, lambda: call_with_disabled_passes("-drop-deed"), ""),
]
