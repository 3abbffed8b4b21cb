"""What generates pictures: a diffusers pipeline, or a module with a loop of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import dicompile
from dicompile.bench.workload import around_same_weights
from dicompile.errors import DicompileError
from dicompile.pipelines import denoisers
from dicompile.plan import Policy

FRAMES = 4
"""Of a film so many frames are compared, evenly spaced."""


class _Stopped(Exception):
    """The first step is done."""


def _stop(*_: Any) -> None:
    raise _Stopped


class Subject(Protocol):
    """Something that generates pictures from one seed, again and again."""

    @property
    def name(self) -> str:
        """In words."""

    @property
    def steps(self) -> int:
        """Of the sampler."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Of the pictures; may be fewer."""

    def copy(self) -> Any:
        """A model or pipeline of its own to optimize, around the same weights."""

    def optimize(self, target: Any, policy: Policy) -> Any:
        """`dicompile.optimize` of such a copy."""

    def modules(self, target: Any) -> Sequence[nn.Module]:
        """The denoisers that it calls."""

    def warm_up(self, target: Any, steps: int) -> None:
        """Compile everything that a generation needs."""

    def generate(self, target: Any, steps: int) -> Tensor:
        """Pictures: float32 in [0, 1], [n, 3, h, w]."""

    def judge(self, pictures: Tensor) -> dict[str, str]:
        """What else can be said of pictures, by heading."""


@dataclass
class PipelineSubject:
    """A diffusers pipeline and what it is called with.

    Attributes:
        pipeline: not optimized.
        call: keyword arguments of every call, without steps and generator.
        steps: of the sampler, its ``num_inference_steps``.
        seed: of the noise.
    """

    pipeline: Any
    call: Mapping[str, Any]
    steps: int
    seed: int = 0
    captions: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        prompt = self.call.get("prompt", ())
        self.captions = (prompt,) if isinstance(prompt, str) else tuple(map(str, prompt))

    @property
    def name(self) -> str:
        """Class of the pipeline, and its steps."""
        return f"{type(self.pipeline).__name__}, {self.steps} steps"

    def copy(self) -> Any:
        """The pipeline once more, with a scheduler of its own."""
        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = copy.deepcopy(self.pipeline.scheduler)
        return pipeline

    def optimize(self, target: Any, policy: Policy) -> Any:
        """See `Subject`."""
        return dicompile.optimize(target, policy)

    def modules(self, target: Any) -> Sequence[nn.Module]:
        """See `Subject`."""
        return list(denoisers(target).values())

    def warm_up(self, target: Any, steps: int) -> None:
        """Generate once."""
        self.generate(target, steps)

    def generate(self, target: Any, steps: int) -> Tensor:
        """See `Subject`.

        Raises:
            DicompileError: the pipeline returned no pictures.
        """
        generator = torch.Generator().manual_seed(self.seed)
        result = target(**{"output_type": "np", **self.call}, num_inference_steps=steps, generator=generator)
        return pictures_of(result)

    def judge(self, pictures: Tensor) -> dict[str, str]:
        """Nothing else."""
        return {}


@dataclass
class ModuleSubject:
    """A module with a sampling loop of its own.

    Attributes:
        name: in words.
        module: not optimized.
        loop: runs a module for a number of steps; returns pictures as `Subject.generate` does.
        schedule: of `dicompile.optimize`: the scheduler that the loop sets.
        steps: of the sampler.
        captions: of the pictures.
        judged_by: see `Subject.judge`.
        settings: further options of `dicompile.optimize`.
    """

    name: str
    module: nn.Module
    loop: Callable[[nn.Module, int], Tensor]
    schedule: Any
    steps: int
    captions: tuple[str, ...] = ()
    judged_by: Callable[[Tensor], dict[str, str]] = lambda pictures: {}
    settings: Mapping[str, Any] = field(default_factory=dict)

    def copy(self) -> nn.Module:
        """The module once more around the same weights."""
        return around_same_weights(self.module)

    def optimize(self, target: Any, policy: Policy) -> Any:
        """See `Subject`."""
        return dicompile.optimize(target, policy, schedule=self.schedule, **self.settings)

    def modules(self, target: Any) -> Sequence[nn.Module]:
        """See `Subject`."""
        return [target]

    def warm_up(self, target: Any, steps: int) -> None:
        """Run one step, and compile the others."""
        stopping = target.register_forward_hook(_stop)
        try:
            self.loop(target, steps)
        except _Stopped:
            pass
        finally:
            stopping.remove()
        if isinstance(target, dicompile.CachedModel):
            dicompile.prepare(target, late=False)
            dicompile.free(target)

    def generate(self, target: Any, steps: int) -> Tensor:
        """See `Subject`."""
        return self.loop(target, steps)

    def judge(self, pictures: Tensor) -> dict[str, str]:
        """See `Subject`."""
        return self.judged_by(pictures)


def pictures_of(result: Any) -> Tensor:
    """Pictures of what a pipeline returned: of films some frames.

    Raises:
        DicompileError: there are none.
    """
    found = getattr(result, "images", None)
    if found is None:
        frames = getattr(result, "frames", None)
        found = None if frames is None else [film[i] for film in frames for i in _spread(len(film))]
    if found is None or isinstance(found, Tensor) or not len(found):
        raise DicompileError(
            f"the pipeline returned {type(result).__name__}, which holds no pictures",
            where="compare",
            why='neither "images" nor "frames" of it are arrays or PIL images',
            fix='call it with output_type="np", or give a ModuleSubject with a loop of your own',
        )
    arrays = [np.asarray(picture) for picture in found]
    scaled = [array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1) for array in arrays]
    pictures = torch.from_numpy(np.stack(scaled)).float().clamp(0, 1)
    pictures = pictures[..., None] if pictures.ndim == 3 else pictures
    return pictures.movedim(-1, 1).expand(-1, 3, -1, -1)[:, :3].contiguous()


def _spread(count: int) -> list[int]:
    wanted = min(FRAMES, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
