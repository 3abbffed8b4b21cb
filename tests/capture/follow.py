"""Modules that something is changed about after their first calls: what is optimized has to follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dicompile
from dicompile.wrapper import record_of

WIDTH = 8
WAYS = ("dynamo", "running")
"""Both ways to capture: what reads a mask in Python has to be run."""


class Model(nn.Module):
    """Reads its mask in Python if it is to be run, and leaves the rest of it to `extra`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.is_read = way == "running"
        self.linear = nn.Linear(WIDTH, WIDTH)

    def extra(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        if self.is_read and mask.any():
            x = x + 1
        return self.linear(x) * torch.cos(t)[:, None, None] + self.extra(x)


def given(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 4, dtype=torch.bool)
    return {"x": torch.randn(2, 4, WIDTH, generator=generator), "t": torch.rand(2, generator=generator), "mask": mask}


def optimized(module: nn.Module, policy: str = "none") -> Any:
    return dicompile.optimize(module.eval(), policy, mode="eager")


def same(model: nn.Module, module: nn.Module, **inputs: Any) -> None:
    """Check that both give the same for a latent of this call."""
    with torch.no_grad():
        wanted = module(**inputs)
    found = model(**inputs)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def counted(model: Any) -> int:
    """How many ways through the forward were captured."""
    return len(model.frames)


def follow(module: nn.Module, *changes: Callable[[], object], inputs: Callable[[int], Any] = given) -> list[int]:
    """Call an optimized module twice, then after every change twice; returns how much each change captured anew."""
    model = optimized(module)
    for seed in range(2):
        same(model, module, **inputs(seed))
    assert record_of(model).calls.is_run == getattr(module, "is_read", False)
    captured = [counted(model)]
    for i, change in enumerate(changes):
        change()
        for seed in range(2):
            same(model, module, **inputs(10 * i + seed + 2))
        captured.append(counted(model))
    return [after - before for before, after in itertools.pairwise(captured)]
