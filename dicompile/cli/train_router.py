"""``dicompile train-router MODEL``: learn which branches every second step may reuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dicompile.cli.files import make_folder
from dicompile.cli.router import router_table
from dicompile.cli.trainable import one_of_several, streamed, trainable
from dicompile.learn.objective import Objective
from dicompile.learn.router import PUBLISHED, train_router, with_penalty
from dicompile.learn.training import Files
from dicompile.policies import Router, save_router
from dicompile.policies.router import Grid


def train_router_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    out: Annotated[Path, typer.Option(help="The router; checkpoint and log are written beside it.")],
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run, even.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, both halves in one batch; 1 is none.")] = 1,
    penalty: Annotated[
        list[float] | None,
        typer.Option("--lambda", min=0, help="Larger values cache more; several make a router each. As published."),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Optimiser steps; each trains one cache step.")] = 20000,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a run.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each iteration, over all processes.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Iterations that come with each new run; four are kept.")] = 100,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the logits.")] = 1e-3,
    threshold: Annotated[
        float | None, typer.Option(help="Score above which a site is computed; as published if not given.")
    ] = None,
    straight_through: Annotated[
        float | None, typer.Option(help="Blend by this threshold in the forward; by the scores if not given.")
    ] = None,
    grid: Annotated[
        Grid,
        typer.Option(help="Cache steps: every second call, or the first call of a singlestep solver of order 2."),
    ] = "ddim",
    data: Annotated[Path | None, typer.Option(help="Safetensors: latents, conditioning by forward argument.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the graphs through torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint beside the router.")] = False,
) -> None:
    """Train a Learning-to-Cache router on runs with the scheduler that the model was saved with.

    The model stays as it is. Under torchrun several processes share the runs of every iteration.
    """
    make_folder(out, "dicompile train-router")
    published = PUBLISHED[grid]
    penalties = penalty or [published.objective.penalty]
    options = replace(
        published,
        iterations=iterations,
        objective=Objective(penalties[0], published.objective.reduce, straight_through),
        lr=lr,
        batch=runs,
        threshold=published.threshold if threshold is None else threshold,
        seed=seed,
    )
    with one_of_several() as is_first:
        subject = trainable(model, batch, data, device)
        source = streamed(subject, steps, guidance, every, seed)
        found: dict[Path, Router] = {}
        for each in penalties:
            file = out if len(penalties) == 1 else out.with_stem(f"{out.stem}-{each:g}")
            files = Files(checkpoint=file.with_suffix(".ckpt"), log=file.with_suffix(".jsonl"))
            router = train_router(
                subject.module, source, with_penalty(options, each), files=files, resume=resume, compiled=compiled
            )
            found[file] = router
            if is_first:
                save_router(router, file)
        if is_first:
            _report(found)


def _report(found: dict[Path, Router]) -> None:
    """Say what the routers cache: each step of one, or each of several."""
    for router in found.values():
        typer.echo(router.summary())
    if len(found) > 1:
        Console().print(_comparison(found))
        return
    ((file, router),) = found.items()
    Console().print(router_table(router))
    typer.echo(f"router: {file}\nfacts:  {file.with_suffix('.json')}\nlog:    {file.with_suffix('.jsonl')}")


def _comparison(found: dict[Path, Router]) -> Table:
    table = Table("lambda", "cached", "router", title="routers by penalty")
    for file, router in found.items():
        share = sum(router.cached().values()) / max(len(router.rows) * router.sites, 1)
        table.add_row(f"{router.facts.penalty:g}", f"{share:.1%}", str(file))
    return table
