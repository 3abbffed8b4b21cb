"""``dicompile train-predictor MODEL``: learn which tokens of which block need computing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from dicompile.cli.files import make_folder
from dicompile.cli.trainable import one_of_several, streamed, trainable
from dicompile.learn.predictor import PredictorOptions, train_predictor
from dicompile.learn.training import Files
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
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, both halves in one batch; 1 is none.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a run.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each iteration, over all processes.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Iterations that come with each new run; four are kept.")] = 100,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 1e-4,
    lora_blocks: Annotated[
        int, typer.Option(min=0, help="Last blocks that are never cached, and get LoRA weights.")
    ] = 0,
    lora_rank: Annotated[int, typer.Option(min=1, help="Of the LoRA weights.")] = 16,
    max_gap: Annotated[int, typer.Option(min=1, help="Age of recorded updates, in steps, at most.")] = 3,
    data: Annotated[Path | None, typer.Option(help="Safetensors: latents, conditioning by forward argument.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the graphs through torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint beside --out.")] = False,
) -> None:
    """Train a TokenCache predictor on runs with the scheduler that the model was saved with.

    The model stays as it is. Under torchrun several processes share the runs of every iteration.
    """
    make_folder(out, "dicompile train-predictor")
    options = PredictorOptions(
        iterations, kind, penalty, lr, batch=runs, max_gap=max_gap, seed=seed,
        lora_blocks=lora_blocks, lora_rank=lora_rank,
    )  # fmt: skip
    files = Files(checkpoint=out.with_suffix(".ckpt"), log=out.with_suffix(".jsonl"))
    with one_of_several() as is_first:
        subject = trainable(model, batch, data, device)
        source = streamed(subject, steps, guidance, every, seed)
        predictor = train_predictor(subject.module, source, options, files=files, resume=resume, compiled=compiled)
        if is_first:
            predictor.save(out)
            console = Console()
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
