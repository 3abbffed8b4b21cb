"""``dicompile train-predictor MODEL``: learn which tokens of which block need computing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from dicompile.cli.files import make_folder
from dicompile.cli.trainable import trainable
from dicompile.learn.graph import learnable
from dicompile.learn.predictor import PredictorOptions, PredictorTraining, train_predictor
from dicompile.learn.samplers import Ddim
from dicompile.learn.training import Files
from dicompile.plan import What
from dicompile.policies import Predictor


def train_predictor_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    out: Annotated[Path, typer.Option(help="The predictor; checkpoint and log are written beside it.")],
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run.")] = 50,
    kind: Annotated[
        Literal["network", "table"], typer.Option(help="A copy of the first block (v2), or step, block and place (v1).")
    ] = "network",
    penalty: Annotated[float, typer.Option("--lambda", min=0, help="Larger values cache more.")] = 0.1,
    iterations: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 10000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per iteration.")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 1e-4,
    max_gap: Annotated[int, typer.Option(min=1, help="Age of recorded updates, in steps, at most.")] = 3,
    data: Annotated[Path | None, typer.Option(help="Safetensors: latents, conditioning by forward argument.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the graphs through torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint beside --out.")] = False,
) -> None:
    """Train a TokenCache predictor; the model stays as it is."""
    console = Console()
    make_folder(out, "dicompile train-predictor")
    subject = trainable(model, batch, data, device)
    options = PredictorOptions(iterations, kind, penalty, lr, max_gap=max_gap, seed=seed)
    learned = learnable(
        subject.module,
        subject.inputs,
        level="block",
        what=What.UPDATE,
        per_token=True,
        result="stream",
        compiled=compiled,
    )
    training = PredictorTraining(
        learned, subject.module, Ddim(subject.scheduler, steps), subject.data, options, subject.null
    )
    files = Files(checkpoint=out.with_suffix(".ckpt"), log=out.with_suffix(".jsonl"))
    predictor = train_predictor(training, files, resume=resume)
    predictor.save(out)
    console.print(predictor_table(predictor))
    console.print(f"predictor: {out}\nlog:       {files.log}")


def predictor_table(predictor: Predictor) -> Table:
    """Mean importance per step and block."""
    table = Table("step", "timestep", "mean", "importance of blocks", title="cache predictor")
    for step, (timestep, blocks) in enumerate(
        zip(predictor.facts.timesteps, predictor.importance.mean(-1), strict=True)
    ):
        row = " ".join(f"{value:.2f}" for value in blocks.tolist())
        table.add_row(str(step), f"{timestep:g}", f"{blocks.mean():.2f}", row)
    return table
