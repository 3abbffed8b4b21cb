"""MODEL on the command line of a training -> a module with its weights, its sampler, and what to train on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.api import optimize
from dicompile.cli.models import example_inputs, factory_of, transformer_of
from dicompile.errors import DicompileError
from dicompile.learn.latents import LATENTS, Data, Latents
from dicompile.learn.processes import rank
from dicompile.learn.runs import Runs
from dicompile.learn.trajectory import Stream

WHERE = "MODEL and --data"


@dataclass(frozen=True)
class Trainable:
    """Everything that a training needs of a model.

    Attributes:
        module: in eval mode, frozen.
        inputs: example keyword arguments of its forward, of the batch that is trained with.
        scheduler: a diffusers scheduler.
        data: draws batches.
        null: what conditioning is replaced by where it is dropped.
    """

    module: nn.Module
    inputs: dict[str, Any]
    scheduler: Any
    data: Data
    null: dict[str, float | Tensor] = field(default_factory=dict)


def trainable(model: str, batch: int, data: Path | None, device: str) -> Trainable:
    """Resolve MODEL: "demo", a folder that a diffusers pipeline or model was saved to, or ``module:factory``.

    Args:
        model: what the user wrote. A factory returns a module, keyword arguments of its forward, and a scheduler; the
            batch is that of the arguments.
        batch: samples per iteration.
        data: safetensors file of latents and conditioning, see `dicompile.learn.latents`; the demo draws its own.
        device: where to train.

    Raises:
        DicompileError: it is none of these, or something is missing.
        InvalidTrainingData: the file cannot be used.
    """
    if model == "demo":
        found = _demo(batch)
    elif Path(model).is_dir():
        found = _from_folder(Path(model), batch, _latents(model, data))
    elif ":" in model:
        found = _from_factory(model, _latents(model, data))
    else:
        raise DicompileError(
            f"there is no model {model!r}",
            where=WHERE,
            why="it is neither 'demo', nor an existing folder, nor module:factory",
            fix="give the folder that save_pretrained wrote, or demo",
        )
    found.module.to(device).eval().requires_grad_(False)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in found.inputs.items()}
    return Trainable(found.module, inputs, found.scheduler, found.data, found.null)


def streamed(subject: Trainable, steps: int, guidance: float, every: int, seed: int) -> Stream:
    """Trajectories of runs that are made while a training goes on.

    Args:
        subject: what is sampled.
        steps: evaluations of the model in one run.
        guidance: classifier-free, both halves in one batch; 1 is none.
        every: iterations that come with each new run.
        seed: of noise and conditioning.
    """
    runs = Runs(subject.inputs, subject.scheduler, subject.data, subject.null, steps, guidance, seed)
    model = optimize(subject.module, "none", schedule=subject.scheduler, backend="eager")
    return Stream(model, lambda number: runs.sample(model, number), every=every)


@contextlib.contextmanager
def one_of_several() -> Iterator[bool]:
    """The process group that ``torchrun`` announces, if it has started this process; True in its first process."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(torch.distributed.get_node_local_rank())
    torch.distributed.init_process_group()
    try:
        yield rank() == 0
    finally:
        torch.distributed.destroy_process_group()


def _demo(batch: int) -> Trainable:
    from dicompile.demo import shapes
    from dicompile.demo.sample import load_model, load_scheduler

    def data(generator: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(shapes.NUM_CLASSES, (batch,), generator=generator)
        return {LATENTS: shapes.draw(labels, generator), "class_labels": labels}

    module, null = load_model(), {"class_labels": shapes.NUM_CLASSES}
    return Trainable(module, _zeros(example_inputs(module, batch, None)), load_scheduler(), data, dict(null))


def _from_folder(folder: Path, batch: int, latents: Latents) -> Trainable:
    path, kind = transformer_of(folder)
    module = kind.from_pretrained(path, local_files_only=True)
    inputs = _zeros(example_inputs(module, batch, latents.rows[LATENTS].shape[-1]))
    drawn = latents.draw(batch, torch.Generator())
    inputs |= {name: value for name, value in drawn.items() if name != LATENTS}
    scheduler = _scheduler(folder)
    return Trainable(module, inputs, scheduler, lambda g: latents.draw(batch, g), dict(latents.null))


def _from_factory(spelled: str, latents: Latents) -> Trainable:
    made = factory_of(spelled)()
    if not (
        isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and isinstance(made[1], dict)
    ):
        raise DicompileError(
            f"{spelled} returned {type(made).__name__}",
            where=WHERE,
            fix="return a torch.nn.Module, a dict with the keyword arguments of its forward, and a scheduler",
        )
    module, inputs, scheduler = made
    batch = max(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return Trainable(module, inputs, scheduler, lambda g: latents.draw(batch, g), dict(latents.null))


def _zeros(inputs: dict[str, Any]) -> dict[str, Any]:
    """Example inputs without values that happen to lie in memory: labels must be classes."""
    return {name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _latents(model: str, data: Path | None) -> Latents:
    if data is None:
        raise DicompileError(
            f"there is nothing to train {model} on",
            where=WHERE,
            why="only the demo draws its own pictures",
            fix="--data FILE.safetensors with latents and conditioning by forward argument",
        )
    return Latents.load(data)


def _scheduler(folder: Path) -> Any:
    """The scheduler that was saved beside a model."""
    import diffusers

    path = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    if path is None:
        raise DicompileError(
            f"{folder} holds no scheduler",
            where=WHERE,
            why="neither scheduler_config.json nor scheduler/scheduler_config.json is there",
            fix="scheduler.save_pretrained(folder) with the scheduler that you sample with",
        )
    name = json.loads((path / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise DicompileError(
            f"diffusers {diffusers.__version__} has no scheduler {name!r}",
            where=str(path / "scheduler_config.json"),
            fix="install the diffusers version that saved it",
        )
    return kind.from_pretrained(path, local_files_only=True)
