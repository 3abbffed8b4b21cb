"""One generation of a model: the same latents, timesteps and conditioning for every contestant."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.bench.models import Subject
from dicompile.device import wait_for
from dicompile.zoo import Size


@dataclass
class Workload:
    """A model, and what it is called with.

    The latent moves in a straight line from one draw to another, as that of a rectified flow does; so caches that
    compare what they see decide alike for every contestant, and in every round.

    Attributes:
        subject: the model's description.
        size: how large it was built.
        module: the model.
        inputs: keyword arguments of its forward, without latent and timestep.
        ends: first latent, and what the last one approaches.
        steps: calls of a generation.
        now: timestep of the current call, of 1000, for caches that ask.
    """

    subject: Subject
    size: Size
    module: nn.Module
    inputs: dict[str, Any]
    ends: tuple[Tensor, Tensor]
    steps: int
    now: float = 0.0

    @classmethod
    def of(cls, subject: Subject, size: Size, steps: int, device: str, dtype: torch.dtype) -> Workload:
        """Build a model with random weights, the same in every process.

        Args:
            subject: the model.
            size: how large.
            steps: calls of a generation.
            device: where.
            dtype: of weights, latent and conditioning; timesteps stay float32, or int64.
        """
        torch.manual_seed(0)
        module = subject.build(size, device, dtype)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        inputs = {name: moved(value) for name, value in subject.inputs(size).items()}
        ends = moved(subject.latents(size)), moved(subject.latents(size))
        return cls(subject, size, module, inputs, ends, steps)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.ends[0].device

    def schedule(self, steps: int) -> list[float]:
        """Timesteps as the model receives them."""
        return [self.timestep(t) for t in self.subject.timesteps(steps)]

    def timestep(self, of_1000: float) -> float:
        """What the model receives for a timestep of 1000; an int where a model of discrete times expects one."""
        return of_1000 if self.subject.time_scale == 1 else of_1000 * self.subject.time_scale

    def copy(self) -> nn.Module:
        """The model once more around the same weights: hooks and compiled blocks of a contestant stay on its own."""
        return around_same_weights(self.module)

    def calls(self, model: Callable[..., Any], steps: int) -> Iterator[float]:
        """Run a generation; after every call, the seconds that it took.

        Args:
            model: called like the module.
            steps: calls of the generation.
        """
        first, last = self.ends
        for number, of_1000 in enumerate(self.subject.timesteps(steps)):
            latent = torch.lerp(first, last, number / steps)
            timestep = torch.full((len(latent),), self.timestep(of_1000), device=self.device)
            self.now = of_1000
            self.wait()
            start = time.perf_counter()
            with torch.no_grad():
                model(hidden_states=latent, timestep=timestep, return_dict=False, **self.inputs)
            self.wait()
            yield time.perf_counter() - start

    def wait(self) -> None:
        """Let the device finish."""
        wait_for(self.device)


def around_same_weights(module: nn.Module) -> nn.Module:
    """A module once more, with the very parameters and buffers of the first one."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): weight for weight in weights})
