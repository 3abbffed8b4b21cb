"""The bundled demo model as a service, without a server: many orders at once, each in a thread of its own."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from dicompile.demo import shapes
from dicompile.demo.sample import GUIDANCE, load_model, load_scheduler
from dicompile.serve import Batcher, Request

TIERS = {"best": "none", "balanced": "fora", "fast": "duca"}
"""What a customer may choose, and the policy for it."""


@dataclass(frozen=True)
class Order:
    """One picture.

    Attributes:
        label: class, in [0, 150).
        seed: of the noise.
        steps: of the sampler.
        tier: one of `TIERS`.
    """

    label: int
    seed: int = 0
    steps: int = 20
    tier: str = "balanced"


def sampled(
    model: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, order: Order, guidance: float = GUIDANCE
) -> Iterator[Tensor]:
    """The picture after every step, in about [-1, 1], [3, h, w]: an ordinary loop, for any model that is called so."""
    scheduler.set_timesteps(order.steps)
    shape = (1, 3, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(order.seed))
    labels = torch.tensor([order.label, shapes.NUM_CLASSES])
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        with torch.no_grad():
            cond, uncond = model(both, timestep=timestep.expand(2), class_labels=labels, return_dict=False)[0].chunk(2)
        latents = scheduler.step(uncond + guidance * (cond - uncond), timestep, latents, return_dict=False)[0]
        yield latents[0]


class Engine:
    """The model, and what serves it.

    Args:
        sizes: see `Batcher`.
        max_cache_bytes: see `Batcher`.
        backend: see `Batcher`.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (1, 2, 4, 8),
        max_cache_bytes: int | str | None = "256MiB",
        backend: str = "inductor",
    ) -> None:
        self.batcher = Batcher(load_model(), sizes=sizes, max_cache_bytes=max_cache_bytes, backend=backend)
        self._scheduler = load_scheduler()

    def open(self, order: Order, timeout: float | None = None) -> tuple[Request, Iterator[Tensor]]:
        """A request, to be closed or cancelled, and the pictures that it makes, which whoever iterates computes."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler.config)
        scheduler.set_timesteps(order.steps)
        request = self.batcher.request(TIERS[order.tier], schedule=scheduler, timeout=timeout)
        return request, sampled(request.model, scheduler, order)

    def warm_up(self, steps: int = 12) -> None:
        """Let every size of a batch run once for every tier, so that no order waits for a capture."""
        for tier in TIERS:

            def opened(seed: int, tier: str = tier) -> Callable[[], None]:
                return functools.partial(_finish, *self.open(Order(0, seed, steps, tier)))

            self.batcher.warm_up(opened)


def _finish(request: Request, pictures: Iterator[Tensor]) -> None:
    with request:
        for _ in pictures:
            pass


def png(picture: Tensor) -> bytes:
    """A picture as a file."""
    values = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(values.numpy()).save(file, "PNG")
    return file.getvalue()
