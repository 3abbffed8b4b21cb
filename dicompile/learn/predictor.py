"""Training of a TokenCache predictor: the backbone is frozen, importance per block and token is learned.

Every iteration draws a step and a recent step that recorded what every block added to the stream. The student adds, for
every token, a mixture of the fresh and of the recorded update; the loss is how far its stream ends from the teacher's,
plus a penalty on importance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dicompile.errors import DicompileError, InvalidPredictor
from dicompile.learn.graph import LearnableModel
from dicompile.learn.latents import Data, draw_batch
from dicompile.learn.samplers import Ddim
from dicompile.learn.training import NOWHERE, Entry, Files, run_to_end
from dicompile.lower.predictor import HEAD_BIAS, HEAD_WEIGHT, FirstBlock, importance_of
from dicompile.plan import Predictor, PredictorFacts

START = 2.0
"""Logit of all importance before training: most tokens are computed."""


@dataclass(frozen=True, slots=True)
class PredictorOptions:
    """How a predictor is trained. The paper names no values: all of them are inferred.

    Attributes:
        iterations: optimiser steps.
        kind: "network": a copy of the model's first block and a linear head, which see what the model sees (version 2);
            "table": a small network of timestep, block and token position (version 1).
        penalty: weight of the mean importance, on the scale of the relative squared error of the last stream.
        lr: learning rate of AdamW.
        label_dropout: probability of a sample to be conditioned on nothing.
        max_gap: recorded updates are 1 to `max_gap` steps old, as they are in a run with several prediction steps.
        calibration: samples over which importance is averaged per step after training.
        seed: of everything that is drawn.
    """

    iterations: int
    kind: Literal["network", "table"] = "network"
    penalty: float = 0.1
    lr: float = 1e-4
    label_dropout: float = 0.1
    max_gap: int = 3
    calibration: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PredictorEntry(Entry):
    """One line of the log.

    Attributes:
        step: position in calling order.
        gap: steps since the updates that it mixes with were recorded.
        relative_error: of the student's last stream, squared.
        importance: mean over blocks and tokens.
    """

    step: int
    gap: int
    relative_error: float
    importance: float

    def __str__(self) -> str:
        return f"error {self.relative_error:.2e}, importance {self.importance:.2f}"


class CopiedBlock(nn.Module):
    """The model's first block with parameters of its own, and a linear head (version 2)."""

    def __init__(self, model: LearnableModel, module: nn.Module) -> None:
        super().__init__()
        self.first = FirstBlock.of(model.capture, model.structure)
        known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.names = self.first.parameters
        self.own = nn.ParameterList([nn.Parameter(known[name].detach().float().clone()) for name in self.names])
        blocks, width = len(model.sites), model.sites[0].shape[-1]
        self.weight, self.bias = nn.Parameter(torch.zeros(blocks, width)), nn.Parameter(torch.full((blocks,), START))

    def forward(self, inputs: Mapping[str, Any], step: int) -> Tensor:
        """Importance, [b, n, blocks]."""
        del step
        own = dict(zip(self.names, self.own, strict=True))
        (stream,) = self.first.segment.graph_module(
            *[own.get(name, inputs.get(name)) for _, name in self.first.arguments]
        )
        return importance_of(stream, self.weight, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        own = {name: value.detach().cpu() for name, value in zip(self.names, self.own, strict=True)}
        return {**own, HEAD_WEIGHT: self.weight.detach().cpu(), HEAD_BIAS: self.bias.detach().cpu()}


class PositionTable(nn.Module):
    """A small network of timestep, block and token position, the same for every picture (version 1)."""

    def __init__(self, model: LearnableModel, timesteps: Sequence[float], width: int = 128) -> None:
        super().__init__()
        blocks, self.batch, tokens = len(model.sites), model.sites[0].shape[0], model.sites[0].tokens.count
        angles = torch.tensor(timesteps)[:, None] * torch.logspace(0, -4, width // 2)
        self.times = nn.Buffer(torch.cat([angles.sin(), angles.cos()], dim=1))
        self.blocks, self.tokens = nn.Embedding(blocks, width), nn.Embedding(tokens, width)
        hidden = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, START)
        self.head = nn.Sequential(*hidden, last)

    def forward(self, inputs: Mapping[str, Any], step: int) -> Tensor:
        """Importance, [b, n, blocks]."""
        del inputs
        both = self.tokens.weight[:, None] + self.blocks.weight[None]
        return torch.sigmoid(self.head(both + self.times[step])).squeeze(-1).expand(self.batch, -1, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: what it says is the importance itself."""
        return {}


class PredictorTraining:
    """A training that can be advanced, saved and continued.

    Args:
        model: the frozen model, made by ``learnable(..., level="block", what=What.UPDATE, per_token=True,
            result="stream")``.
        module: the module it was made of.
        sampler: sampler that the predictor is for.
        data: draws batches of the model's shape.
        options: see `PredictorOptions`.
        null: what conditioning is replaced by where it is dropped, by argument name.
    """

    name: ClassVar[str] = "predictor"
    invalid: ClassVar[type[DicompileError]] = InvalidPredictor

    def __init__(
        self,
        model: LearnableModel,
        module: nn.Module,
        sampler: Ddim,
        data: Data,
        options: PredictorOptions,
        null: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        self.model, self.sampler, self.data, self.options, self.null = model, sampler, data, options, null or {}
        self.generator = torch.Generator().manual_seed(options.seed)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            made = CopiedBlock(model, module) if options.kind == "network" else PositionTable(model, sampler.timesteps)
            self.network = made.to(model.device)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=options.lr, weight_decay=0.0)
        self.iteration = 0

    def advance(self) -> PredictorEntry:
        """One iteration."""
        call = 1 + int(torch.randint(self.sampler.steps - 1, (), generator=self.generator))
        gap = 1 + int(torch.randint(min(self.options.max_gap, call), (), generator=self.generator))
        inputs, stored = self.reach(call, gap)
        teacher = self.model.predict(inputs)
        importance = self.network(inputs, call)
        weights = [torch.stack([alpha, 1 - alpha])[..., None] for alpha in importance.unbind(-1)]
        student = self.model.blend(inputs, stored, weights)
        error = (student - teacher).square().mean() / teacher.square().mean()
        loss = error + self.options.penalty * importance.mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.iteration += 1
        return PredictorEntry(self.iteration, call, gap, error.item(), importance.mean().item())

    @torch.no_grad()
    def reach(self, call: int, gap: int) -> tuple[dict[str, Any], Sequence[Tensor]]:
        """Inputs at a step, and the updates recorded `gap` steps before."""
        clean, noise, conditioning = self.draw()
        latent = self.sampler.noised(call - gap, clean, noise)
        recorded: list[Sequence[Tensor]] = []

        def predict(latent: Tensor, timestep: float) -> Tensor:
            inputs = self.model.inputs(latent, timestep, conditioning)
            if not recorded:
                recorded.append(self.model.record(inputs)[1])
            return self.model.output(inputs)

        for before in range(call - gap, call):
            latent = self.sampler.step(before, latent, predict)
        return self.model.inputs(latent, self.sampler.timestep(call), conditioning), recorded[0]

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Clean latents, noise, and conditioning of which some is dropped."""
        return draw_batch(self.data, self.generator, self.null, self.options.label_dropout, self.model.device)

    @torch.no_grad()
    def predictor(self) -> Predictor:
        """The predictor as it is now, with the importance that it gives on average at every step."""
        kept = self.generator.get_state()
        self.generator.manual_seed(self.options.seed + 1)
        importance = torch.stack([self.mean_importance(call) for call in range(self.sampler.steps)])
        self.generator.set_state(kept)
        return Predictor(
            importance=importance,
            facts=PredictorFacts(
                kind=self.options.kind,
                blocks=tuple(site.label for site in self.model.sites),
                timesteps=self.sampler.timesteps,
                penalty=self.options.penalty,
                seed=self.options.seed,
                iterations=self.iteration,
            ),
            parameters=self.network.tensors(),
            source="this training",
        )

    def mean_importance(self, call: int) -> Tensor:
        """Importance at a step, averaged over calibration samples; [blocks, tokens]."""
        found, seen = [], 0
        while seen < (self.options.calibration if self.options.kind == "network" else 1):
            clean, noise, conditioning = self.draw()
            latent = self.sampler.noised(call, clean, noise)
            inputs = self.model.inputs(latent, self.sampler.timestep(call), conditioning)
            found.append(self.network(inputs, call))
            seen += len(clean)
        return torch.cat(found).mean(0).T.cpu()

    @property
    def key(self) -> str:
        """What a checkpoint has to agree with."""
        options = {name: value for name, value in asdict(self.options).items() if name != "iterations"}
        return json.dumps(["predictor", self.model.name, len(self.model.sites), self.sampler.steps, options])

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.iteration = state["iteration"]


def train_predictor(
    training: PredictorTraining, files: Files = NOWHERE, *, resume: bool = False, progress: bool = True
) -> Predictor:
    """Run a training to its end, then average importance per step; see `train_router`."""
    run_to_end(training, files, resume=resume, progress=progress)
    return training.predictor()
