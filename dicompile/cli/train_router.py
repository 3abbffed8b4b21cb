"""``dicompile train-router MODEL``: learn which branches every second step may reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dicompile.cli.files import make_folder
from dicompile.cli.router import router_table
from dicompile.cli.trainable import trainable
from dicompile.learn.graph import learnable
from dicompile.learn.objective import Objective
from dicompile.learn.router import PUBLISHED, RouterOptions, RouterTraining, train_router
from dicompile.learn.samplers import Ddim, DpmSolver2, Sampler
from dicompile.learn.training import Files
from dicompile.policies import save_router


def train_router_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    out: Annotated[Path, typer.Option(help="The router; checkpoint and log are written beside it.")],
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run, even.")] = 50,
    penalty: Annotated[
        float | None, typer.Option("--lambda", min=0, help="Larger values cache more; as published if not given.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Optimiser steps; each trains one cache step.")] = 20000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per iteration.")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the logits.")] = 1e-3,
    threshold: Annotated[
        float | None, typer.Option(help="Score above which a site is computed; as published if not given.")
    ] = None,
    straight_through: Annotated[
        float | None, typer.Option(help="Blend by this threshold in the forward; by the scores if not given.")
    ] = None,
    sampler: Annotated[
        Literal["ddim", "dpm-solver-2"], typer.Option(help="The second trains as for U-ViT: sum of squares, no clamp.")
    ] = "ddim",
    data: Annotated[Path | None, typer.Option(help="Safetensors: latents, conditioning by forward argument.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the graphs through torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint beside the router.")] = False,
) -> None:
    """Train a Learning-to-Cache router; the model stays as it is."""
    make_folder(out, "dicompile train-router")
    subject = trainable(model, batch, data, device)
    sequence: Sampler = Ddim(subject.scheduler, steps) if sampler == "ddim" else DpmSolver2.of(subject.scheduler, steps)
    published = PUBLISHED[sampler]
    options = RouterOptions(
        iterations=iterations,
        objective=Objective(
            published.objective.penalty if penalty is None else penalty, published.objective.reduce, straight_through
        ),
        lr=lr,
        clamp=published.clamp,
        threshold=published.threshold if threshold is None else threshold,
        seed=seed,
    )
    learned = learnable(subject.module, subject.inputs, compiled=compiled)
    training = RouterTraining(learned, sequence, subject.data, options, subject.null)
    files = Files(checkpoint=out.with_suffix(".ckpt"), log=out.with_suffix(".jsonl"))
    router = train_router(training, files, resume=resume)
    save_router(router, out)
    typer.echo(router.summary())
    Console().print(router_table(router))
    typer.echo(f"router: {out}\nfacts:  {out.with_suffix('.json')}\nlog:    {files.log}")
