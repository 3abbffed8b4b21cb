"""Sampling runs as small data: the same run can be made by the process under test, in any state, and by a fresh one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.plan import Policy
from tests import models
from tests.models import PlainDiT, Sample, timesteps


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
        time: key of `TIMES`: what the timestep comes as.
        autocast: whether the calls are made under autocast to bfloat16.
    """

    model: str
    policy: str
    steps: int
    batch: int = 1
    size: int = 0
    guidance: str = "none"
    seed: int = 0
    prompt: int = 0
    time: str = "tensor"
    autocast: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """One call of the model: in which context, with which halves of the guidance pair, for which window of a film."""

    context: str
    halves: tuple[str, ...]
    window: int = 0


COND, UNCOND, BOTH = Call("", ("cond",)), Call("", ("uncond",)), Call("", ("uncond", "cond"))
WINDOWS = tuple(Call("", ("cond",), window) for window in range(3))
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
    "windows": lambda step, steps: WINDOWS,
    "windows in turn": lambda step, steps: (*WINDOWS[step % 3 :], *WINDOWS[: step % 3]),
    "windows, guided": lambda step, steps: tuple(replace(c, window=w.window) for w in WINDOWS for c in (COND, UNCOND)),
}
"""Calls of a step; every way in which samplers are known to guide, and to go through what is too large for one call."""

TIMES: Mapping[str, Callable[[float, int], Any]] = {
    "tensor": lambda time, batch: torch.full((batch,), time),
    "0-d tensor": lambda time, batch: torch.tensor(time),
    "float": lambda time, batch: float(time),
    "int": lambda time, batch: int(time),
    "numpy": lambda time, batch: np.float32(time),
}
"""What a timestep comes as, for a batch."""


class TakesNumbers(PlainDiT):
    """A timestep for the whole batch, which may be a number."""

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        times = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float32)
        return super().forward(x, times.expand(len(x)), y)


class ReadsItsLabels(PlainDiT):
    """Python reads values of its inputs, so that it is captured by running it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, torch.tensor(y.tolist()))


class SwitchesAutocast(PlainDiT):
    """Its condition is computed in float32 and its blocks in bfloat16, whatever is on outside."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            c = self.condition(t, y)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.tokens(x)
            for block in self.blocks:
                h = block(h, c)
        return self.picture(h.float(), c, *x.shape[2:])


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
        bare: it is compiled by ``torch.compile(backend="dicache")``; such models of one policy share their code.
    """

    make: Callable[[], Sample]
    policies: Mapping[str, Policy]
    steps: tuple[int, ...]
    live: bool
    sizes: int
    latent: Callable[[int, int], tuple[int, ...]]
    conditioning: Callable[[int, int, torch.Generator | None], dict[str, Any]]
    names: tuple[str, str] = ("hidden_states", "timestep")
    bare: bool = False


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


def plain(make: Callable[[], torch.nn.Module], seed: int = 0, *, bare: bool = False) -> Setup:
    """A setup of a model that is called like the plain DiT."""
    return Setup(
        make=lambda: Sample(models.redraw(make(), seed), {}),
        policies={"fora": dicompile.FORA(interval=3), "duca": dicompile.DuCa(interval=3, ratio=0.2)},
        steps=(STEPS,),
        live=False,
        sizes=1,
        latent=lambda batch, size: (batch, 4, 16, 16),
        conditioning=plain_conditioning,
        names=("x", "t"),
        bare=bare,
    )


SETUPS: Mapping[str, Setup] = {
    "numbers": plain(lambda: TakesNumbers(1)),
    "run": plain(lambda: ReadsItsLabels(1)),
    "autocast": plain(lambda: SwitchesAutocast(1)),
    "bare": plain(lambda: PlainDiT(1), bare=True),
    "bare twin": plain(lambda: PlainDiT(1), seed=1, bare=True),
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
        if self.setup.bare:
            options = {"policy": self.setup.policies[policy], "schedule": schedule, "mode": "eager", "hoist": "all"}
            self.model = torch.compile(self.module, backend="dicache", options=SHARED.setdefault(policy, options))
        else:
            chosen = self.setup.policies[policy]
            self.model = dicompile.optimize(self.module, chosen, schedule=schedule, mode="eager", hoist="all")


SHARED: dict[str, dict[str, Any]] = {}
"""Options of the bare backend by policy: models that are given the very same ones share their code."""


class Sampling:
    """A run that is made call by call; every latent depends on all outputs before it."""

    def __init__(self, run: Run, optimized: Optimized) -> None:
        assert (run.model, run.policy) == (optimized.name, optimized.policy)
        self.run, self.optimized, self.setup = run, optimized, optimized.setup
        self.digests: list[str] = []
        drawn = torch.Generator().manual_seed(run.seed)
        windows = {call.window for call in GUIDANCE[run.guidance](0, run.steps)}
        self.latents = [torch.randn(self.setup.latent(run.batch, run.size), generator=drawn) for _ in windows]
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
            outputs: list[dict[str, Tensor]] = [{} for _ in self.latents]
            for call in GUIDANCE[self.run.guidance](step, self.run.steps):
                output = self._model(time, call)
                outputs[call.window].update(zip(call.halves, output.chunk(len(call.halves)), strict=True))
                digest = hashlib.sha256(output.contiguous().float().numpy().tobytes()).hexdigest()
                self.digests.append(digest)
                yield
            self.latents = list(map(_next_latent, self.latents, outputs))
        yield

    def _model(self, time: float, call: Call) -> Tensor:
        halves = [self._conditioning(half) for half in call.halves]
        inputs = {key: _joined([half[key] for half in halves]) for key in halves[0]}
        latent, timestep = self.setup.names
        inputs[latent] = torch.cat([self.latents[call.window]] * len(halves))
        time = time / 1000 if self.run.model == "flux" else time
        inputs[timestep] = TIMES[self.run.time](time, len(inputs[latent]))
        named = dicompile.cache_context(call.context) if call.context else contextlib.nullcontext()
        with named, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.run.autocast):
            output = self.optimized.model(**inputs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _conditioning(self, half: str) -> dict[str, Any]:
        prompt = torch.Generator().manual_seed(self.run.prompt + 100) if half == "cond" else None
        return self.setup.conditioning(self.run.batch, self.run.size, prompt)


def _next_latent(latent: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    cond = outputs["cond"].float()
    guided = cond + 0.5 * (cond - outputs.get("uncond", cond))
    return latent - 0.1 * guided[:, : latent.shape[1]]


def _joined(values: list[Any]) -> Any:
    """One value for a batch of halves; tables of positions have no batch."""
    if isinstance(values[0], Tensor) and not (values[0].ndim == 2 and values[0].shape[1] == 3):
        return torch.cat(values)
    return values[0]
