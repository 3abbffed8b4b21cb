"""Training of a Learning-to-Cache router: the backbone is frozen, one logit per cache step and site is learned.

Every iteration draws one cache step and some trajectories of uncached runs (see `dicompile.learn.trajectory`). Each is
evaluated three times: at the step before, which records, and at the cache step by teacher and student. Only the logits
of that step's row are updated.

The published routers saw pictures of a data set, noised to the step before, and one step of DDIM from there. What the
model's own run comes by is there for every sampler, and needs no data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dicompile.errors import DicompileError, InvalidRouter
from dicompile.learn.graph import LearnableModels
from dicompile.learn.objective import Iteration, Objective, training_iteration
from dicompile.learn.training import NOWHERE, Entry, Files, descend, draw, run_to_end
from dicompile.learn.trajectory import Source, Trajectory
from dicompile.learn.watch import denoiser_of
from dicompile.policies.router import Grid, Router, RouterFacts, cache_rows
from dicompile.policies.router_file import PUBLISHED_THRESHOLD


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How a router is trained.

    Attributes:
        iterations: optimiser steps in total. Each trains one row; with AdamW a logit moves by about `lr` each time, and
            crosses its range in 10 / lr of them (the published routers took 11000 per row).
        objective: the loss.
        lr: learning rate of AdamW, logits per update.
        clamp: bound of the logits after every update (DiT: 5), or None (U-ViT).
        batch: trajectories per iteration, over all processes.
        grid: which calls of a run are cache steps: "ddim", every second one; "dpm-solver-2", the first of the two of
            every solver step but the first.
        threshold: written into the router; of no influence on the training.
        seed: of everything that is drawn.
    """

    iterations: int
    objective: Objective = Objective()  # noqa: RUF009 - frozen
    lr: float = 1e-3
    clamp: float | None = 5.0
    batch: int = 1
    grid: Grid = "ddim"
    threshold: float = 0.1
    seed: int = 0


PUBLISHED: dict[Grid, RouterOptions] = {
    "ddim": RouterOptions(40000, Objective(1e-6), threshold=PUBLISHED_THRESHOLD["ddim"]),
    "dpm-solver-2": RouterOptions(
        40000, Objective(0.1, "sum"), clamp=None, grid="dpm-solver-2", threshold=PUBLISHED_THRESHOLD["dpm-solver-2"]
    ),
}
"""Options of the released routers for DiT-XL/2 and U-ViT-H/2 in 50 evaluations; their batch was of 64 samples."""


@dataclass(frozen=True, slots=True)
class RouterEntry(Entry):
    """One line of the log.

    Attributes:
        call: position of the cache step in calling order.
        row: its row of the router.
        timestep: of the cache step.
        data_loss: see `Objective`.
        score_sum: sum of the row's scores before the update.
        cached: sites of the row that the threshold caches after the update.
    """

    call: int
    row: int
    timestep: float
    data_loss: float
    score_sum: float
    cached: int

    def __str__(self) -> str:
        return f"step {self.call + 1}: {self.data_loss:.2e}, {self.cached} cached"


class RouterTraining:
    """A training that can be advanced, saved and continued.

    Args:
        model: a pipeline or its denoiser, optimized or not; its weights stay as they are.
        source: trajectories of its runs, recorded or streamed.
        options: see `RouterOptions`.
        compiled: run the graphs through `torch.compile`.

    Raises:
        InvalidRouter: the number of steps is odd.
        CannotCapture: the model does not fit into one graph.
    """

    name: ClassVar[str] = "router"
    invalid: ClassVar[type[DicompileError]] = InvalidRouter

    def __init__(self, model: Any, source: Source, options: RouterOptions, *, compiled: bool = False) -> None:
        self.source, self.options = source, options
        module, first = denoiser_of(model), source.at(0)[0]
        device = next(module.parameters()).device
        self.models = LearnableModels(module, first.call(0, device), compiled=compiled)
        self.model = self.models.first
        self.generator = torch.Generator().manual_seed(options.seed)
        steps = len(source.timesteps)
        start = torch.randn(steps, len(self.model.sites), generator=self.generator)
        # A parameter of its own per row: momentum and step count of rows that an iteration does not touch stay.
        self.rows = [torch.nn.Parameter(row.clone()) for row in start.to(device)]
        self.optimiser = torch.optim.AdamW(self.rows, lr=options.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.calls = list(cache_rows(options.grid, steps).items())
        self.iteration = 0
        self.router()  # an odd number of steps is refused before anything is trained

    def advance(self) -> RouterEntry:
        """One iteration."""
        call, row = self.calls[int(torch.randint(len(self.calls), (), generator=self.generator))]
        drawn = draw(self.source.at(self.iteration), self.options.batch, self.generator)
        logits = self.rows[row]

        def evaluate(trajectory: Trajectory) -> tuple[Tensor, ...]:
            result = self.evaluate(trajectory, call, logits)
            return result.loss, result.data_loss, result.scores.sum()

        _, data_loss, score_sum = descend(self.optimiser, drawn, evaluate)
        if self.options.clamp is not None:
            with torch.no_grad():
                for each in self.rows:
                    each.clamp_(-self.options.clamp, self.options.clamp)
        self.iteration += 1
        return RouterEntry(
            iteration=self.iteration,
            call=call,
            row=row,
            timestep=self.source.timesteps[call],
            data_loss=data_loss,
            score_sum=score_sum,
            cached=int((logits.sigmoid() <= self.options.threshold).sum()),
        )

    def evaluate(self, trajectory: Trajectory, call: int, logits: Tensor) -> Iteration:
        """The loss at a cache step, with what the call before it recorded."""
        before, inputs = (trajectory.call(step, self.model.device) for step in (call - 1, call))
        _, stored = self.models.of(before).record(before)
        return training_iteration(self.models.of(inputs), inputs, stored, logits, self.options.objective)

    def router(self) -> Router:
        """The router as it is now."""
        return Router(
            logits=torch.stack([row.detach().cpu() for row in self.rows]),
            grid=self.options.grid,
            threshold=self.options.threshold,
            facts=RouterFacts(
                sites=tuple(site.label for site in self.model.sites),
                timesteps=self.source.timesteps,
                sampler=self.source.sampler,
                model=self.model.name,
                penalty=self.options.objective.penalty,
                iterations=self.iteration,
                batch=self.options.batch * self.model.sites[0].shape[0],
                seed=self.options.seed,
            ),
            source="this training",
        )

    @property
    def key(self) -> str:
        """What a checkpoint has to agree with."""
        options = {name: value for name, value in asdict(self.options).items() if name != "iterations"}
        about = (self.model.name, len(self.model.sites), self.source.sampler, len(self.source.timesteps))
        return json.dumps([*about, options])

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "logits": [row.detach().clone() for row in self.rows],
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        with torch.no_grad():
            for row, logits in zip(self.rows, state["logits"], strict=True):
                row.copy_(logits)
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.iteration = state["iteration"]


def train_router(
    model: Any,
    source: Source,
    options: RouterOptions,
    *,
    files: Files = NOWHERE,
    resume: bool = False,
    compiled: bool = False,
    progress: bool = True,
) -> Router:
    """Learn which branches every second step may reuse; the model stays as it is.

    A training that was interrupted and resumed ends with the very logits of one that was not; several processes of one
    `torch.distributed` group share the batch of every iteration, and end with what one process ends with.

    Args:
        model: a pipeline or its denoiser, optimized or not.
        source: trajectories of its runs: recorded by `dicompile.record_trajectories`, or a `dicompile.Stream`.
        options: see `RouterOptions`.
        files: checkpoint and log.
        resume: continue from the checkpoint if it is there; otherwise checkpoint and log start anew.
        compiled: run the graphs through `torch.compile`.
        progress: show a bar.

    Raises:
        InvalidRouter: the number of steps is odd, or the checkpoint is damaged or of a training with other options.
        CannotCapture: the model does not fit into one graph.

    Example:
        >>> with dicompile.record_trajectories(pipe) as trajectories:
        ...     pipe(prompts, num_inference_steps=50)
        >>> router = dicompile.train_router(pipe, trajectories, RouterOptions(iterations=2000))
        >>> pipe = dicompile.optimize(pipe, dicompile.LearningToCache(router))

    Reference:
        Ma et al., Learning-to-Cache, arXiv 2406.01733, algorithm 1 and equation 9.
    """
    training = RouterTraining(model, source, options, compiled=compiled)
    run_to_end(training, files, resume=resume, progress=progress)
    return training.router()


def with_penalty(options: RouterOptions, penalty: float) -> RouterOptions:
    """The same options with another lambda."""
    return replace(options, objective=replace(options.objective, penalty=penalty))
