"""Sampler arithmetic for training: from a clean latent to the latent that a cache step sees in a real run.

A router learns on pairs of evaluations, one that records and the cache step after it. `Sampler.advance` noises a clean
latent to the first of the pair and takes one deterministic step from there; what `predict` recorded last is what the
cache step of a real run would find.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from dicompile.errors import InvalidSchedule
from dicompile.policies.router import Grid

Predict = Callable[[Tensor, float], Tensor]
"""Latent [b, c, ...] and timestep -> output of the model, which may have more channels than the latent."""


class Sampler(Protocol):
    """A deterministic sampler with a fixed number of evaluations of the network."""

    grid: ClassVar[Grid]
    """How its calls alternate between full and cache steps."""

    @property
    def name(self) -> str:
        """Name for the facts of a router."""
        ...

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep of every evaluation, in calling order."""
        ...

    def timestep(self, call: int) -> float:
        """Timestep at which the cache step `call` is trained."""
        ...

    def advance(self, call: int, clean: Tensor, noise: Tensor, predict: Predict) -> Tensor:
        """Latent at the cache step `call`.

        Args:
            call: position of a cache step in calling order.
            clean: clean latents, [b, c, ...].
            noise: standard normal, same shape.
            predict: runs the model; the evaluation right before the cache step comes last.
        """
        ...


@dataclass(frozen=True)
class Ddim:
    """DDIM without noise (eta 0) as a diffusers scheduler computes it.

    Attributes:
        scheduler: a ``DDIMScheduler`` that does not clip; it is copied.
        steps: evaluations of the network, T.

    Raises:
        InvalidSchedule: the scheduler clips, keeps state between steps, or adds noise.

    Reference:
        Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, equation 12.
    """

    scheduler: Any
    steps: int

    grid: ClassVar[Grid] = "ddim"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", copy.deepcopy(self.scheduler))
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if "eta" not in inspect.signature(self.scheduler.step).parameters or hasattr(self.scheduler, "step_index"):
            raise _unusable(name, "its step depends on the steps before, or draws noise", "use a DDIMScheduler")
        if config.get("clip_sample") or config.get("thresholding"):
            raise _unusable(
                name,
                "it clips the predicted clean latent, which a router is not trained with",
                "make it with clip_sample=False, thresholding=False",
            )
        self.scheduler.set_timesteps(self.steps)

    @property
    def name(self) -> str:
        """Class of the scheduler."""
        return type(self.scheduler).__name__

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep of every evaluation, in calling order."""
        return tuple(float(t) for t in self.scheduler.timesteps)

    def timestep(self, call: int) -> float:
        """Timestep of the call."""
        return self.timesteps[call]

    def advance(self, call: int, clean: Tensor, noise: Tensor, predict: Predict) -> Tensor:
        """One step from the call before."""
        return self.step(call - 1, self.noised(call - 1, clean, noise), predict)

    def noised(self, call: int, clean: Tensor, noise: Tensor) -> Tensor:
        """Latent at a call, drawn from the forward process."""
        noised: Tensor = self.scheduler.add_noise(clean, noise, self.scheduler.timesteps[call].expand(len(clean)))
        return noised

    def step(self, call: int, latent: Tensor, predict: Predict) -> Tensor:
        """Latent at the call after `call`."""
        timestep = self.scheduler.timesteps[call]
        output = predict(latent, float(timestep))[:, : latent.shape[1]]
        stepped: Tensor = self.scheduler.step(output, int(timestep), latent, eta=0.0, return_dict=False)[0]
        return stepped


@dataclass(frozen=True)
class DpmSolver2:
    """DPM-Solver++ of second order, singlestep: evaluations at the start and in the middle (in log-SNR) of every step.

    Times run linearly from 1 to 1/1000; the model receives 1000 times that.

    Attributes:
        alphas_cumprod: float [1000], of the discrete noise schedule.
        steps: evaluations of the network, T = 2 N.

    Raises:
        InvalidSchedule: the number of evaluations is odd.

    Reference:
        Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 1 with r = 1/2, as U-ViT uses it.
    """

    alphas_cumprod: Tensor
    steps: int

    grid: ClassVar[Grid] = "dpm-solver-2"

    def __post_init__(self) -> None:
        if self.steps < 2 or self.steps % 2:
            raise _unusable(
                f"DPM-Solver-2 with {self.steps} evaluations",
                "every solver step evaluates the network twice",
                f"use {max(2, self.steps + self.steps % 2)}",
            )

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> DpmSolver2:
        """The solver for the noise schedule of a diffusers scheduler.

        Raises:
            InvalidSchedule: it has none, or the model does not predict noise.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or scheduler.config.get("prediction_type", "epsilon") != "epsilon":
            raise _unusable(
                f"DPM-Solver-2 after {type(scheduler).__name__}",
                "it needs a discrete noise schedule and a model that predicts noise",
                "use DDIM, or give a scheduler with alphas_cumprod and prediction_type='epsilon'",
            )
        return cls(alphas, steps)

    @property
    def name(self) -> str:
        """Name for the facts of a router."""
        return "DPM-Solver-2, singlestep"

    @property
    def times(self) -> list[float]:
        """Ends of the N solver steps, from 1 to 1/1000."""
        values: list[float] = np.linspace(1.0, 1.0 / len(self.alphas_cumprod), self.steps // 2 + 1).tolist()
        return values

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep of every evaluation, in calling order."""
        ends = self.times
        pairs = ((start, self._middle(start, end)) for start, end in itertools.pairwise(ends))
        return tuple(len(self.alphas_cumprod) * time for pair in pairs for time in pair)

    def timestep(self, call: int) -> float:
        """Nearest discrete timestep: routers were trained there."""
        return float(round(len(self.alphas_cumprod) * self.times[call // 2]))

    def advance(self, call: int, clean: Tensor, noise: Tensor, predict: Predict) -> Tensor:
        """One whole solver step, of two evaluations, from the one before."""
        alpha, sigma, _ = self._marginal(self.timestep(call - 2) / len(self.alphas_cumprod))
        return self.update(call // 2 - 1, alpha * clean + sigma * noise, predict)

    def update(self, step: int, latent: Tensor, predict: Predict) -> Tensor:
        """Latent after solver step `step`; the second evaluation is that in the middle."""
        start, end = self.times[step : step + 2]
        middle = self._middle(start, end)
        alpha, sigma, snr = self._marginal(end)
        middle_alpha, middle_sigma, _ = self._marginal(middle)
        _, start_sigma, start_snr = self._marginal(start)
        h = snr - start_snr
        first = self._clean(latent, start, predict)
        between = middle_sigma / start_sigma * latent - middle_alpha * np.expm1(-h / 2) * first
        second = self._clean(between, middle, predict)
        phi = float(np.expm1(-h))
        return sigma / start_sigma * latent - alpha * phi * first - alpha * phi * (second - first)

    def _clean(self, latent: Tensor, time: float, predict: Predict) -> Tensor:
        """Clean latent that the model's noise prediction amounts to."""
        alpha, sigma, _ = self._marginal(time)
        predicted = predict(latent, len(self.alphas_cumprod) * time)[:, : latent.shape[1]]
        return (latent - sigma * predicted) / alpha

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Times, and logarithms of the signal at them."""
        logs = 0.5 * np.log(self.alphas_cumprod.double().cpu().numpy())
        return np.linspace(0.0, 1.0, len(logs) + 1)[1:], logs

    def _marginal(self, time: float) -> tuple[float, float, float]:
        """Signal, noise, and half the log-SNR."""
        log = float(np.interp(time, *self._table()))
        sigma = float(np.sqrt(-np.expm1(2 * log)))
        return float(np.exp(log)), sigma, log - float(np.log(sigma))

    def _middle(self, start: float, end: float) -> float:
        """Time in the middle of a step, in log-SNR."""
        times, logs = self._table()
        snr = logs - 0.5 * np.log(-np.expm1(2 * logs))
        wanted = 0.5 * (self._marginal(start)[2] + self._marginal(end)[2])
        return float(np.interp(wanted, snr[::-1], times[::-1]))


def _unusable(what: str, why: str, fix: str) -> InvalidSchedule:
    return InvalidSchedule(f"a router cannot be trained for {what}", where="dicompile.learn", why=why, fix=fix)
