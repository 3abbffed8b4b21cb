"""One tiny model of the zoo: how to make it, what to call it with, and what a reader of its source finds in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.models import redraw


@dataclass(frozen=True, eq=False)
class Case:
    """A class of transformer in one configuration.

    Attributes:
        name: class name, with a variant in brackets where the class is configured in several ways.
        make: makes the module with small random weights.
        inputs: makes keyword arguments of its forward, the same at every call.
        branches: what the source says, not what dicompile finds: residual branches of each block in order of their
            adds, by the block's module path, in which ``*`` stands for any number: "self", "cross", "joint", "mlp",
            "parallel". An exact path goes before one with a star.
        timesteps: values of the timestep argument from noise to picture, at least eight of them.
        timestep: name of the forward argument that takes them.
        latent: name of the forward argument that takes the noisy sample.
        impossible: part of what the refusal says where no graph can serve this class; else empty.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    branches: Mapping[str, tuple[str, ...]]
    timesteps: tuple[float, ...] = tuple(float(t) for t in range(900, 100, -100))
    timestep: str = "timestep"
    latent: str = "hidden_states"
    impossible: str = field(default="")

    def model(self) -> nn.Module:
        """A fresh module whose every block matters: weights of norms lie around one, so that no block fades."""
        model = redraw(self.make())
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
                weight.data += 1
        return model.requires_grad_(False)

    def at(self, step: int) -> dict[str, Any]:
        """Inputs at a step: another timestep, and a latent that drifts a little from step to step."""
        torch.manual_seed(0)
        inputs = self.inputs()
        inputs[self.timestep] = torch.full_like(inputs[self.timestep], self.timesteps[step])
        drift = torch.Generator().manual_seed(step)
        latent = inputs[self.latent]
        if isinstance(latent, torch.Tensor):
            inputs[self.latent] = latent + 0.1 * torch.randn(latent.shape, generator=drift)
        else:
            inputs[self.latent] = [x + 0.1 * torch.randn(x.shape, generator=drift) for x in latent]
        return inputs

    def __str__(self) -> str:
        return self.name
