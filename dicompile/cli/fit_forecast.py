"""``dicompile fit-forecast MODEL``: fit the weights of a forecasting policy; the result is a policy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dicompile.cli.files import make_folder, write_whole
from dicompile.cli.trainable import trainable
from dicompile.learn.runs import Runs
from dicompile.plan import Cadence


def fit_forecast_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    out: Annotated[Path, typer.Option(help="The policy, as JSON.")],
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run.")] = 50,
    interval: Annotated[int, typer.Option(min=2, help="Steps from one full step to the next.")] = 4,
    warmup: Annotated[int, typer.Option(min=1, help="Full steps at the start.")] = 2,
    order: Annotated[int, typer.Option(min=0, help="Stored values used besides the latest one.")] = 2,
    level: Annotated[Literal["site", "stack"], typer.Option(help="Every branch, or the whole stack.")] = "site",
    guidance: Annotated[float, typer.Option(help="Guidance of the calibration runs; 1 for none.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Samples of one run.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Uncached runs to fit to.")] = 2,
    data: Annotated[Path | None, typer.Option(help="Safetensors: latents, conditioning by forward argument.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Fit a forecast; the model stays as it is."""
    make_folder(out, "dicompile fit-forecast")
    subject = trainable(model, batch, data, device)
    made = Runs(subject.inputs, subject.scheduler, subject.data, subject.null, steps, guidance, seed)
    cadence = Cadence(interval=interval, anchor="last", warmup=warmup)
    policy = made.record(subject.module, runs).fitted(cadence, order=order, level=level)
    write_whole(out, policy.to_json() + "\n")
    Console().print(f"policy: {out}")
