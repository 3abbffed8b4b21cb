"""Sampling runs as small data: the same run can be made by the process under test, in any state, and by a fresh one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.plan import Policy
from tests import models
from tests.models import Sample, timesteps


@dataclass(frozen=True)
class Run:
    """Everything that a run's outputs may depend on.

    Attributes:
        model: key of `SETUPS`.
        policy: key of the setup's policies.
        steps: of the schedule.
        batch: samples.
        size: key of the setup's sizes.
        guidance: key of `GUIDANCE`.
        seed: of the first latent.
        prompt: number of the conditioning.
    """

    model: str
    policy: str
    steps: int
    batch: int = 1
    size: int = 0
    guidance: str = "none"
    seed: int = 0
    prompt: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """One call of the model: in which context, with which halves of the guidance pair."""

    context: str
    halves: tuple[str, ...]


COND, UNCOND, BOTH = Call("", ("cond",)), Call("", ("uncond",)), Call("", ("uncond", "cond"))
GUIDANCE: Mapping[str, Callable[[int, int], tuple[Call, ...]]] = {
    "none": lambda step, steps: (COND,),
    "batched": lambda step, steps: (BOTH,),
    "contexts": lambda step, steps: (Call("cond", ("cond",)), Call("uncond", ("uncond",))),
    "order": lambda step, steps: (COND, UNCOND),
    "interval": lambda step, steps: (BOTH,) if 1 <= step < steps - 2 else (COND,),
    "until 2": lambda step, steps: (BOTH,) if step < 2 else (COND,),
    "until 3": lambda step, steps: (BOTH,) if step < 3 else (COND,),
    "joins late": lambda step, steps: (UNCOND, COND) if step >= 2 else (COND,),
    "ends early": lambda step, steps: (COND,) if step >= 2 else (UNCOND, COND),
}
"""Calls of a step; every way in which samplers are known to guide."""


@dataclass(frozen=True)
class Setup:
    """A model, the ways to call it, and where its schedule comes from.

    Attributes:
        make: the model with weights that depend on nothing; its own inputs are not used.
        policies: by name.
        steps: numbers of steps that a run may have; several with a live scheduler only.
        live: a scheduler is set anew by every run; otherwise the timesteps are fixed.
        sizes: how many there are.
        latent: first latent for a batch and a size.
        conditioning: for a batch, a size, and a generator of what the prompt says; None for no prompt.
        names: arguments of the latent and the timestep.
    """

    make: Callable[[], Sample]
    policies: Mapping[str, Policy]
    steps: tuple[int, ...]
    live: bool
    sizes: int
    latent: Callable[[int, int], tuple[int, ...]]
    conditioning: Callable[[int, int, torch.Generator | None], dict[str, Any]]
    names: tuple[str, str] = ("hidden_states", "timestep")


def drawn(generator: torch.Generator | None, *shape: int) -> Tensor:
    return torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)


def plain_conditioning(batch: int, size: int, prompt: torch.Generator | None) -> dict[str, Any]:
    labels = torch.full((batch,), 10) if prompt is None else torch.randint(0, 10, (batch,), generator=prompt)
    return {"y": labels}


def pixart_conditioning(batch: int, size: int, prompt: torch.Generator | None) -> dict[str, Any]:
    return {
        "encoder_hidden_states": drawn(prompt, batch, 12 - 5 * (size == 1), 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def flux_conditioning(batch: int, size: int, prompt: torch.Generator | None) -> dict[str, Any]:
    text, image = 6 - 2 * size, 16 - 4 * size
    return {
        "encoder_hidden_states": drawn(prompt, batch, text, 24),
        "pooled_projections": drawn(prompt, batch, 40),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.arange(3.0 * image).view(image, 3),
        "guidance": torch.full((batch,), 3.5),
        "return_dict": False,
    }


STEPS = 6
SETUPS: Mapping[str, Setup] = {
    "plain_dit": Setup(
        make=lambda: models.plain_dit(2),
        policies={
            "fora": dicompile.FORA(interval=3),
            "toca": dicompile.ToCa(interval=3, ratio=0.2),
            "duca": dicompile.DuCa(interval=3, ratio=0.2),
        },
        steps=(STEPS,),
        live=False,
        sizes=1,
        latent=lambda batch, size: (batch, 4, 16, 16),
        conditioning=plain_conditioning,
        names=("x", "t"),
    ),
    "pixart": Setup(
        make=lambda: models.pixart(1),
        policies={"toca": dicompile.ToCaPixArt(interval=3), "taylorseer": dicompile.TaylorSeer(interval=2)},
        steps=(4, STEPS),
        live=True,
        sizes=3,  # the usual one, a shorter prompt, a smaller picture
        latent=lambda batch, size: (batch, 4, 8, 8) if size == 2 else (batch, 4, 16, 16),
        conditioning=pixart_conditioning,
    ),
    "flux": Setup(
        make=lambda: models.flux(1),
        policies={"duca": dicompile.DuCaFlux(interval=3), "taylorseer": dicompile.TaylorSeer(interval=3)},
        steps=(STEPS,),
        live=False,
        sizes=2,  # the usual one, a shorter prompt and a smaller picture
        latent=lambda batch, size: (batch, 16 - 4 * size, 4),
        conditioning=flux_conditioning,
    ),
}


class Optimized:
    """A model of a setup, optimized for a policy, with the schedule that it follows."""

    def __init__(self, model: str, policy: str, module: torch.nn.Module | None = None) -> None:
        self.name, self.policy, self.setup = model, policy, SETUPS[model]
        self.scheduler = DDIMScheduler() if self.setup.live else None
        self.module = module if module is not None else self.setup.make().model
        schedule = self.scheduler if self.setup.live else timesteps(self.setup.steps[0])
        self.model = dicompile.optimize(self.module, self.setup.policies[policy], schedule=schedule, mode="eager")


class Sampling:
    """A run that is made call by call; every latent depends on all outputs before it."""

    def __init__(self, run: Run, optimized: Optimized) -> None:
        assert (run.model, run.policy) == (optimized.name, optimized.policy)
        self.run, self.optimized, self.setup = run, optimized, optimized.setup
        self.digests: list[str] = []
        self.latent = torch.randn(
            self.setup.latent(run.batch, run.size), generator=torch.Generator().manual_seed(run.seed)
        )
        if optimized.scheduler is not None:
            optimized.scheduler.set_timesteps(run.steps)
            self.times = optimized.scheduler.timesteps.tolist()
        else:
            self.times = timesteps(run.steps)
        self._calls = self._all_calls()
        self.total = sum(len(GUIDANCE[run.guidance](step, run.steps)) for step in range(run.steps))

    @property
    def is_finished(self) -> bool:
        return len(self.digests) == self.total

    def call(self) -> None:
        """Make the next call."""
        next(self._calls)

    def first_digest(self) -> str:
        """Digest of the output of the first call, which is made now."""
        self.call()
        return self.digests[0]

    def finish(self) -> list[str]:
        """Make all calls that are left; digests of the outputs of all calls."""
        while not self.is_finished:
            self.call()
        return self.digests

    def _all_calls(self) -> Iterator[None]:
        for step, time in enumerate(self.times):
            outputs: dict[str, Tensor] = {}
            for call in GUIDANCE[self.run.guidance](step, self.run.steps):
                output = self._model(time, call)
                outputs.update(zip(call.halves, output.chunk(len(call.halves)), strict=True))
                digest = hashlib.sha256(output.contiguous().numpy().tobytes()).hexdigest()
                self.digests.append(digest)
                yield
            cond = outputs["cond"]
            guided = cond + 0.5 * (cond - outputs.get("uncond", cond))
            self.latent = self.latent - 0.1 * guided[:, : self.latent.shape[1]]
        yield

    def _model(self, time: float, call: Call) -> Tensor:
        halves = [self._conditioning(half) for half in call.halves]
        inputs = {key: _joined([half[key] for half in halves]) for key in halves[0]}
        latent, timestep = self.setup.names
        inputs[latent] = torch.cat([self.latent] * len(halves))
        times = torch.full((len(inputs[latent]),), time)
        inputs[timestep] = times / 1000 if self.run.model == "flux" else times
        named = self.optimized.model.cache_context(call.context) if call.context else contextlib.nullcontext()
        with named, torch.no_grad():
            output = self.optimized.model(**inputs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _conditioning(self, half: str) -> dict[str, Any]:
        prompt = torch.Generator().manual_seed(self.run.prompt + 100) if half == "cond" else None
        return self.setup.conditioning(self.run.batch, self.run.size, prompt)


def _joined(values: list[Any]) -> Any:
    """One value for a batch of halves; tables of positions have no batch."""
    if isinstance(values[0], Tensor) and not (values[0].ndim == 2 and values[0].shape[1] == 3):
        return torch.cat(values)
    return values[0]
