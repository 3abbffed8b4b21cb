"""``dicompile calibrate MODEL`` records a few runs; ``dicompile frontier FILE`` says what they allow, and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dicompile.cli.files import make_folder, write_whole
from dicompile.cli.options import check_picture_file
from dicompile.cli.trainable import trainable
from dicompile.learn.recording import Recording
from dicompile.learn.runs import Runs


def calibrate_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    out: Annotated[Path, typer.Option(help="The recording.")] = Path("calibration.safetensors"),
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, both halves in one batch; 1 is none.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs to record.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a run.")] = 8,
    data: Annotated[Path | None, typer.Option(help="Safetensors file of latents and conditioning.")] = None,
    device: Annotated[str, typer.Option(help="Where to sample.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of noise and conditioning.")] = 0,
) -> None:
    """Record runs of a model with the scheduler that it was saved with; a pipeline of your own: dicompile.calibrate."""
    make_folder(out, "dicompile calibrate")
    subject = trainable(model, batch, data, device)
    made = Runs(subject.inputs, subject.scheduler, subject.data, subject.null, steps, guidance, seed)
    recording = made.record(subject.module, runs)
    recording.save(out)
    Console().print(f"{recording}\nwrote {out}; see what it allows with: dicompile frontier {out}")


def frontier_command(
    recording: Annotated[Path, typer.Argument(help="What `dicompile calibrate` or Recording.save wrote.")],
    budget: Annotated[float | None, typer.Option(help="Share of the compute that the policy may take.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Its inverse.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Expected relative error that it may have.")] = None,
    max_cache_bytes: Annotated[str | None, typer.Option(help="Memory that it may take, '2GiB'.")] = None,
    out: Annotated[Path | None, typer.Option(help="The policy for one of these goals, as .json or .yaml.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of the frontier; needs matplotlib.")] = None,
) -> None:
    """Print expected error against compute, with fewer steps as the rival; write the policy for one goal."""
    check_picture_file(plot)
    if out is not None:
        make_folder(out, "dicompile frontier")
    frontier = Recording.load(recording).frontier(max_cache_bytes)
    console = Console()
    console.print(frontier.table())
    if plot is not None:
        from dicompile.cli.pictures import save

        save(frontier.plot(), plot)
    if out is None:
        return
    point = frontier.point(budget=budget, speedup=speedup, max_error=max_error)
    policy = frontier.policy(point)
    write_whole(out, policy.to_yaml() if out.suffix in (".yaml", ".yml") else policy.to_json() + "\n")
    console.print(f"{policy.name}: {point}\nwrote {out}")
