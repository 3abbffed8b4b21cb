"""Weights of forecasts, fitted: for every step the combination of stored values that comes nearest to the fresh one.

A forecast of any order is a linear combination of what full steps stored, so the best one for a model, a sampler and a
cadence is a least-squares problem of a few unknowns per step. A handful of uncached runs is enough to pose it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from dicompile.learn.graph import LearnableModel, learnable
from dicompile.learn.latents import LATENTS, Data
from dicompile.learn.runs import both_halves
from dicompile.learn.samplers import Ddim
from dicompile.plan import Cadence, Fitted, Policy, Rule, SiteName, What

RIDGE = 1e-6
"""Added to the diagonal of the normal equations, relative to it: stored values of near steps are nearly equal."""


@dataclass(frozen=True, slots=True)
class ForecastOptions:
    """How a forecast is fitted.

    Attributes:
        cadence: which steps compute everything.
        order: stored values used besides the latest one.
        level: one set of weights per step "site": for all branches; "stack": for what the whole stack adds.
        guidance: classifier-free guidance of the runs, both halves in one batch; 1 makes conditional samples.
        runs: uncached runs to fit to.
        seed: of everything that is drawn.
    """

    cadence: Cadence
    order: int = 2
    level: Literal["site", "stack"] = "site"
    guidance: float = 1.0
    runs: int = 2
    seed: int = 0


def fit_forecast(
    model: LearnableModel,
    sampler: Ddim,
    data: Data,
    options: ForecastOptions,
    null: Mapping[str, float | Tensor] | None = None,
    *,
    progress: bool = True,
) -> Policy:
    """Fit a forecasting policy to a model.

    Args:
        model: made by `learnable_for`; its batch is twice that of `data` if guidance is used.
        sampler: sampler that the policy is for.
        data: draws conditioning (and latents, of which the shape alone matters here).
        options: see `ForecastOptions`.
        null: conditioning of the unconditional half, by argument name.
        progress: show a bar.

    Reference:
        L2P, arXiv 2604.26365.
    """
    cadence = options.cadence
    generator = torch.Generator().manual_seed(options.seed)
    full = [moment.others for moment in cadence.moments(sampler.steps)]
    problems: dict[int, tuple[Tensor, Tensor]] = {}
    for _ in track(range(options.runs), "fitting", disable=not progress):
        history: list[Sequence[Tensor]] = []
        for step, values in enumerate(_run(model, sampler, data, generator, options.guidance, null or {})):
            if full[step]:
                history.insert(0, values)
            else:
                _pose(problems, step, values, history[: options.order + 1])
    weights = tuple(_solve(*problems[step]) if step in problems else () for step in range(sampler.steps))
    recall = Fitted(weights=weights, what=_what(options.level).value)
    sites: tuple[SiteName, ...] = () if options.level == "site" else ("stack",)
    name = f"fitted-{cadence.interval}-{options.order}"
    return Policy(name=name, cadence=cadence, rules=(Rule(sites=sites, do=recall),))


def learnable_for(module: nn.Module, inputs: Mapping[str, Any], options: ForecastOptions) -> LearnableModel:
    """The model that a forecast is fitted to.

    Args:
        module: in eval mode.
        inputs: keyword arguments of its forward, of the shapes to fit with.
        options: see `ForecastOptions`.
    """
    return learnable(module, inputs, level=options.level, what=_what(options.level))


def _what(level: str) -> What:
    return What.CORE if level == "site" else What.UPDATE


def _run(
    model: LearnableModel,
    sampler: Ddim,
    data: Data,
    generator: torch.Generator,
    guidance: float,
    null: Mapping[str, float | Tensor],
) -> Iterator[Sequence[Tensor]]:
    """Recorded values at every step of an uncached run."""
    doubled = guidance != 1.0
    conditioning = dict(data(generator))
    like: Tensor = conditioning.pop(LATENTS)
    latent = torch.randn(like.shape, generator=generator).to(model.device)
    conditioning = {
        name: both_halves(value, null.get(name)) if doubled else value for name, value in conditioning.items()
    }
    for call, timestep in enumerate(sampler.timesteps):
        seen = torch.cat([latent, latent]) if doubled else latent
        output, values = model.record(model.inputs(seen, timestep, conditioning))
        yield values
        if doubled:
            cond, uncond = output.chunk(2)
            output = uncond + guidance * (cond - uncond)
        if call + 1 < sampler.steps:
            latent = sampler.step(call, latent, functools.partial(_known, output))


def _known(output: Tensor, latent: Tensor, timestep: float) -> Tensor:
    """A prediction that was made already."""
    del latent, timestep
    return output


def _pose(
    problems: dict[int, tuple[Tensor, Tensor]], step: int, values: Sequence[Tensor], history: Sequence[Sequence[Tensor]]
) -> None:
    """Add the normal equations of one step, every site weighted by the inverse size of its value."""
    unknowns = len(history)
    start = torch.zeros(unknowns, unknowns, dtype=torch.float64), torch.zeros(unknowns, dtype=torch.float64)
    matrix, right = problems.get(step, start)
    for site, value in enumerate(values):
        past = torch.stack([stored[site].flatten() for stored in history]).double()
        size = value.double().square().sum().clamp_min(1e-30)
        matrix = matrix + (past @ past.T / size).cpu()
        right = right + (past @ value.flatten().double() / size).cpu()
    problems[step] = matrix, right


def _solve(matrix: Tensor, right: Tensor) -> tuple[float, ...]:
    damped = matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    solution: list[float] = torch.linalg.solve(damped, right).tolist()
    return tuple(solution)
