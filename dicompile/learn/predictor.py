"""Training of a TokenCache predictor: the backbone is frozen, importance per block and token is learned.

Every iteration draws trajectories of uncached runs (see `dicompile.learn.trajectory`), a step, and a recent step that
recorded what every block added to the stream. The student adds, for every token, a mixture of the fresh and of the
recorded update; the loss is how far its stream ends from the teacher's, plus a penalty on importance. The last blocks
may be left out of caching and get LoRA weights instead, which are learned in the same iterations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicompile.errors import DicompileError, InvalidPredictor
from dicompile.learn.graph import LearnableModel, LearnableModels
from dicompile.learn.training import NOWHERE, Entry, Files, descend, draw, run_to_end
from dicompile.learn.trajectory import Source, Trajectory
from dicompile.learn.watch import denoiser_of
from dicompile.lower.predictor import HEAD_BIAS, HEAD_WEIGHT, FirstBlock, importance_of
from dicompile.passes import DOWN, UP
from dicompile.plan import Adapter, Predictor, PredictorFacts, What

START = 2.0
"""Logit of all importance before training: most tokens are computed."""


@dataclass(frozen=True, slots=True)
class PredictorOptions:
    """How a predictor is trained. The paper names no values: all of them are inferred.

    Of its LoRA only this is known here, from notes on the paper: the last K blocks are never cached, and adapted by it.
    That it is learned together with the predictor, for the same loss and at the same rate, beside every linear layer on
    the latent's way through a block, and that blocks which are not cached count for no penalty, is inferred, too.

    Attributes:
        iterations: optimiser steps.
        kind: "network": a copy of the model's first block and a linear head, which see what the model sees (version 2);
            "table": a small network of timestep, block and token position (version 1).
        penalty: weight of the mean importance, on the scale of the relative squared error of the last stream.
        lr: learning rate of AdamW.
        batch: trajectories per iteration, over all processes.
        max_gap: recorded updates are 1 to `max_gap` steps old, as they are in a run with several prediction steps.
        calibration: samples over which importance is averaged per step after training, as far as there are so many.
        seed: of everything that is drawn.
        lora_blocks: number of the last blocks that are never cached, and get LoRA weights, K; 0 for none.
        lora_rank: of these.

    Raises:
        InvalidPredictor: a number of blocks below 0, or a rank below 1.
    """

    iterations: int
    kind: Literal["network", "table"] = "network"
    penalty: float = 0.1
    lr: float = 1e-4
    batch: int = 1
    max_gap: int = 3
    calibration: int = 256
    seed: int = 0
    lora_blocks: int = 0
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.lora_blocks < 0 or self.lora_rank < 1:
            raise InvalidPredictor(
                f"{self.lora_blocks} blocks cannot have LoRA weights of rank {self.lora_rank}",
                where="PredictorOptions",
                fix="0 blocks or more, and a rank of 1 or more",
            )


@dataclass(frozen=True, slots=True)
class PredictorEntry(Entry):
    """One line of the log.

    Attributes:
        step: position in calling order.
        gap: steps since the updates that it mixes with were recorded.
        relative_error: of the student's last stream, squared.
        importance: mean over tokens of the blocks that may be cached.
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


class LowRank(nn.Module):
    """LoRA weights beside some linear layers: A drawn as torch draws those of a linear layer, B zero.

    Args:
        beside: weights of the layers, [d, c], by name.
        rank: of the LoRA weights.

    Reference:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, beside: Mapping[str, Tensor], rank: int) -> None:
        super().__init__()
        self.dtypes = {name: weight.dtype for name, weight in beside.items()}
        self.down = nn.ParameterList([torch.empty(rank, weight.shape[1]) for weight in beside.values()])
        self.up = nn.ParameterList([torch.zeros(weight.shape[0], rank) for weight in beside.values()])
        for each in self.down:
            nn.init.kaiming_uniform_(each, a=math.sqrt(5))

    def inputs(self) -> dict[str, Tensor]:
        """As graphs take them: in the dtypes of the layers, by the names of `dicompile.passes.with_adapters`."""
        return {
            name + end: each.to(dtype)
            for end, weights in ((DOWN, self.down), (UP, self.up))
            for (name, dtype), each in zip(self.dtypes.items(), weights, strict=True)
        }

    def adapters(self) -> dict[str, Adapter]:
        """What the file holds."""
        pairs = zip(self.dtypes, self.down, self.up, strict=True)
        return {name: Adapter(*(each.detach().to("cpu", copy=True) for each in pair)) for name, *pair in pairs}


class PredictorTraining:
    """A training that can be advanced, saved and continued.

    Args:
        model: a pipeline or its denoiser, optimized or not; its weights stay as they are.
        source: trajectories of its runs, recorded or streamed.
        options: see `PredictorOptions`.
        compiled: run the graphs through `torch.compile`.

    Raises:
        InvalidPredictor: runs have a single step, or no block is left that could be cached.
        CannotCapture: the model does not fit into one graph.
    """

    name: ClassVar[str] = "predictor"
    invalid: ClassVar[type[DicompileError]] = InvalidPredictor

    def __init__(self, model: Any, source: Source, options: PredictorOptions, *, compiled: bool = False) -> None:
        self.source, self.options, self.steps = source, options, len(source.timesteps)
        module, first = denoiser_of(model), source.at(0)[0]
        if self.steps < 2:
            raise InvalidPredictor(
                "a run of one step has nothing to reuse", where="dicompile.train_predictor", fix="record runs of more"
            )
        device = next(module.parameters()).device
        self.models = LearnableModels(
            module,
            first.call(0, device),
            one_kind=True,
            level="block",
            what=What.UPDATE,
            per_token=True,
            result="stream",
            lora=(options.lora_blocks, options.lora_rank),
            compiled=compiled,
        )
        self.model = self.models.first
        self.cached = len(self.model.sites) - options.lora_blocks
        if self.cached < 1 or (options.lora_blocks and not self.model.adaptable):
            raise InvalidPredictor(
                f"the last {options.lora_blocks} of {len(self.model.sites)} blocks cannot be adapted",
                where="dicompile.train_predictor",
                why="no block is left to be cached" if self.cached < 1 else "they have no plain linear layer",
                fix="lora_blocks=2, or 0 for none",
            )
        self.generator = torch.Generator().manual_seed(options.seed)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            is_network = options.kind == "network"
            made = CopiedBlock(self.model, module) if is_network else PositionTable(self.model, source.timesteps)
            self.network = made.to(device)
            self.adapters = LowRank(self.model.adaptable, options.lora_rank).to(device)
        trained = [*self.network.parameters(), *self.adapters.parameters()]
        self.optimiser = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
        self.iteration = 0

    def advance(self) -> PredictorEntry:
        """One iteration."""
        call = 1 + int(torch.randint(self.steps - 1, (), generator=self.generator))
        gap = 1 + int(torch.randint(min(self.options.max_gap, call), (), generator=self.generator))
        drawn = draw(self.source.at(self.iteration), self.options.batch, self.generator)

        def evaluate(trajectory: Trajectory) -> tuple[Tensor, ...]:
            inputs, stored = self.reach(trajectory, call, gap)
            teacher = self.model.predict(inputs)
            importance = self.importance(inputs, call)
            weights = [torch.stack([alpha, 1 - alpha])[..., None] for alpha in importance.unbind(-1)]
            student = self.model.blend(inputs, stored, weights, self.adapters.inputs())
            error = (student - teacher).square().mean() / teacher.square().mean()
            cost = importance[..., : self.cached].mean()
            return error + self.options.penalty * cost, error, cost

        _, error, importance = descend(self.optimiser, drawn, evaluate)
        self.iteration += 1
        return PredictorEntry(self.iteration, call, gap, error, importance)

    def importance(self, inputs: Mapping[str, Any], call: int) -> Tensor:
        """What the network says, and 1 for blocks that are never cached; [b, n, blocks]."""
        said: Tensor = self.network(inputs, call)
        whole = self.options.lora_blocks
        return F.pad(said[..., : self.cached], (0, whole), value=1.0) if whole else said

    def reach(self, trajectory: Trajectory, call: int, gap: int) -> tuple[dict[str, Any], Sequence[Tensor]]:
        """Inputs at a step, and the updates recorded `gap` steps before."""
        before, inputs = (trajectory.call(step, self.model.device) for step in (call - gap, call))
        _, stored = self.models.of(before).record(before)
        self.models.of(inputs)  # refuses a call of another kind
        return inputs, stored

    @torch.no_grad()
    def predictor(self) -> Predictor:
        """The predictor as it is now, with the importance that it gives on average at every step."""
        return Predictor(
            importance=torch.stack([self.mean_importance(call) for call in range(self.steps)]),
            facts=PredictorFacts(
                kind=self.options.kind,
                blocks=tuple(site.label for site in self.model.sites),
                timesteps=self.source.timesteps,
                penalty=self.options.penalty,
                seed=self.options.seed,
                iterations=self.iteration,
                adapted=self.options.lora_blocks,
            ),
            parameters=self.network.tensors(),
            source="this training",
            adapters=self.adapters.adapters(),
        )

    def mean_importance(self, call: int) -> Tensor:
        """Importance at a step, averaged over calibration samples; [blocks, tokens]."""
        wanted = self.options.calibration if self.options.kind == "network" else 1
        found = self.source.at(self.iteration)[: -(-wanted // self.model.sites[0].shape[0])]
        seen = [self.importance(trajectory.call(call, self.model.device), call) for trajectory in found]
        return torch.cat(seen).mean(0).T.cpu()

    @property
    def key(self) -> str:
        """What a checkpoint has to agree with."""
        options = {name: value for name, value in asdict(self.options).items() if name != "iterations"}
        return json.dumps(["predictor", self.model.name, len(self.model.sites), self.steps, options])

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "network": self.network.state_dict(),
            "adapters": self.adapters.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["network"])
        self.adapters.load_state_dict(state["adapters"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.iteration = state["iteration"]


def train_predictor(
    model: Any,
    source: Source,
    options: PredictorOptions,
    *,
    files: Files = NOWHERE,
    resume: bool = False,
    compiled: bool = False,
    progress: bool = True,
) -> Predictor:
    """Learn which tokens of which block need computing, then average importance per step; the model stays as it is.

    Args:
        model: a pipeline or its denoiser, optimized or not.
        source: trajectories of its runs: recorded by `dicompile.record_trajectories`, or a `dicompile.Stream`.
        options: see `PredictorOptions`.
        files: checkpoint and log.
        resume: continue from the checkpoint if it is there; otherwise checkpoint and log start anew.
        compiled: run the graphs through `torch.compile`.
        progress: show a bar.

    Raises:
        InvalidPredictor: runs have a single step, no block is left that could be cached, or the checkpoint is damaged
            or of a training with other options.
        CannotCapture: the model does not fit into one graph.

    Reference:
        Lou et al., Token Caching for Diffusion Transformer Acceleration, arXiv 2409.18523, version 2, section 3.
    """
    training = PredictorTraining(model, source, options, compiled=compiled)
    run_to_end(training, files, resume=resume, progress=progress)
    return training.predictor()
