"""Training of a Learning-to-Cache router: the backbone is frozen, one logit per cache step and site is learned.

Every iteration draws one cache step, a batch, noise, and one mask of dropped conditioning for its three evaluations:
the full step that records, the teacher, the student. Only the logits of that step's row are updated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dicompile.errors import DicompileError, InvalidRouter
from dicompile.learn.graph import LearnableModel
from dicompile.learn.latents import Data, draw_batch
from dicompile.learn.objective import Iteration, Objective, training_iteration
from dicompile.learn.samplers import Sampler
from dicompile.learn.training import NOWHERE, Entry, Files, run_to_end
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
        label_dropout: probability of a sample to be conditioned on nothing.
        threshold: written into the router; of no influence on the training.
        seed: of everything that is drawn.
    """

    iterations: int
    objective: Objective = Objective()  # noqa: RUF009 - frozen
    lr: float = 1e-3
    clamp: float | None = 5.0
    label_dropout: float = 0.1
    threshold: float = 0.1
    seed: int = 0


PUBLISHED: dict[Grid, RouterOptions] = {
    "ddim": RouterOptions(40000, Objective(1e-6), threshold=PUBLISHED_THRESHOLD["ddim"]),
    "dpm-solver-2": RouterOptions(
        40000, Objective(0.1, "sum"), clamp=None, threshold=PUBLISHED_THRESHOLD["dpm-solver-2"]
    ),
}
"""Options of the released routers for DiT-XL/2 and U-ViT-H/2 in 50 evaluations; their batch was 64."""


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
        model: the frozen model, see `dicompile.learn.graph.learnable`.
        sampler: sampler that the router is for.
        data: draws batches of the model's shape.
        options: see `RouterOptions`.
        null: what conditioning is replaced by where it is dropped, by argument name: a number, or a tensor that
            broadcasts against a batch of it.
    """

    name: ClassVar[str] = "router"
    invalid: ClassVar[type[DicompileError]] = InvalidRouter

    def __init__(
        self,
        model: LearnableModel,
        sampler: Sampler,
        data: Data,
        options: RouterOptions,
        null: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        self.model, self.sampler, self.data, self.options, self.null = model, sampler, data, options, null or {}
        self.generator = torch.Generator().manual_seed(options.seed)
        steps = len(sampler.timesteps)
        start = torch.randn(steps, len(model.sites), generator=self.generator)
        # A parameter of its own per row: momentum and step count of rows that an iteration does not touch stay.
        self.rows = [torch.nn.Parameter(row.clone()) for row in start.to(model.device)]
        self.optimiser = torch.optim.AdamW(self.rows, lr=options.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.calls = list(cache_rows(sampler.grid, steps).items())
        self.iteration = self.batch = 0
        self.router()  # an odd number of steps is refused before anything is trained

    def advance(self) -> RouterEntry:
        """One iteration."""
        call, row = self.calls[int(torch.randint(len(self.calls), (), generator=self.generator))]
        result = self.evaluate(call, self.rows[row])
        self.optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        self.optimiser.step()
        if self.options.clamp is not None:
            with torch.no_grad():
                for logits in self.rows:
                    logits.clamp_(-self.options.clamp, self.options.clamp)
        self.iteration += 1
        return RouterEntry(
            iteration=self.iteration,
            call=call,
            row=row,
            timestep=self.sampler.timestep(call),
            data_loss=result.data_loss.item(),
            score_sum=result.scores.sum().item(),
            cached=int((self.rows[row].sigmoid() <= self.options.threshold).sum()),
        )

    def evaluate(self, call: int, logits: Tensor) -> Iteration:
        """Draw a batch and compute the loss of a cache step."""
        clean, noise, conditioning = self.draw()
        recorded: list[Sequence[Tensor]] = []

        def predict(latent: Tensor, timestep: float) -> Tensor:
            output, stored = self.model.record(self.model.inputs(latent, timestep, conditioning))
            recorded.append(stored)
            return output

        with torch.no_grad():
            latent = self.sampler.advance(call, clean, noise, predict)
        inputs = self.model.inputs(latent, self.sampler.timestep(call), conditioning)
        return training_iteration(self.model, inputs, recorded[-1], logits, self.options.objective)

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Clean latents, noise, and conditioning of which some is dropped."""
        clean, noise, conditioning = draw_batch(
            self.data, self.generator, self.null, self.options.label_dropout, self.model.device
        )
        self.batch = len(clean)
        return clean, noise, conditioning

    def router(self) -> Router:
        """The router as it is now."""
        return Router(
            logits=torch.stack([row.detach().cpu() for row in self.rows]),
            grid=self.sampler.grid,
            threshold=self.options.threshold,
            facts=RouterFacts(
                sites=tuple(site.label for site in self.model.sites),
                timesteps=self.sampler.timesteps,
                sampler=self.sampler.name,
                model=self.model.name,
                penalty=self.options.objective.penalty,
                iterations=self.iteration,
                batch=self.batch or None,
                seed=self.options.seed,
            ),
            source="this training",
        )

    @property
    def key(self) -> str:
        """What a checkpoint has to agree with."""
        options = {name: value for name, value in asdict(self.options).items() if name != "iterations"}
        about = (self.model.name, len(self.model.sites), self.sampler.name, len(self.sampler.timesteps))
        return json.dumps([*about, options])

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "logits": [row.detach().clone() for row in self.rows],
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
            "batch": self.batch,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        with torch.no_grad():
            for row, logits in zip(self.rows, state["logits"], strict=True):
                row.copy_(logits)
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.iteration, self.batch = state["iteration"], state["batch"]


def train_router(
    training: RouterTraining, files: Files = NOWHERE, *, resume: bool = False, progress: bool = True
) -> Router:
    """Run a training to its end.

    A resumed run ends with the very logits of one that was never interrupted.

    Args:
        training: what to run.
        files: checkpoint and log.
        resume: continue from the checkpoint if it is there; otherwise checkpoint and log start anew.
        progress: show a bar.

    Raises:
        InvalidRouter: the checkpoint is damaged or belongs to a training with other options.
    """
    run_to_end(training, files, resume=resume, progress=progress)
    return training.router()


def sweep_penalties(
    start: Callable[[float], RouterTraining], penalties: Sequence[float], **options: Any
) -> dict[float, Router]:
    """Train one router per penalty.

    Args:
        start: makes the training for a penalty, for example with `with_penalty`.
        penalties: values of lambda.
        **options: of `train_router`.
    """
    return {penalty: train_router(start(penalty), **options) for penalty in penalties}


def with_penalty(options: RouterOptions, penalty: float) -> RouterOptions:
    """The same options with another lambda."""
    return replace(options, objective=replace(options.objective, penalty=penalty))
