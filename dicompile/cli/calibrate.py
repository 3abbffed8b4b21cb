"""``dicompile calibrate`` records runs, ``measure`` times their steps, and ``frontier`` says what these allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from dicompile.cli.files import make_folder, write_whole
from dicompile.cli.options import check_picture_file, spread
from dicompile.cli.trainable import trainable
from dicompile.learn.probe import FEWEST_STEPS, PROBES
from dicompile.learn.recording import Recording
from dicompile.learn.runs import Runs
from dicompile.plan import Timing


@dataclass(frozen=True)
class Sampled:
    """MODEL, and how it is sampled: the same for recording and for timing."""

    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")]
    steps: Annotated[int, typer.Option(min=2, help="Evaluations of the model in one run.")] = 50
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, both halves in one batch; 1 is none.")] = 1
    runs: Annotated[int, typer.Option(min=1, help="How many.")] = 2
    batch: Annotated[int, typer.Option(min=1, help="Samples of a run.")] = 8
    data: Annotated[Path | None, typer.Option(help="Safetensors file of latents and conditioning.")] = None
    device: Annotated[str, typer.Option(help="Where to sample.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of noise and conditioning.")] = 0

    def load(self) -> tuple[nn.Module, Runs]:
        """The model, and runs with the scheduler that it was saved with."""
        found = trainable(self.model, self.batch, self.data, self.device)
        made = Runs(found.inputs, found.scheduler, found.data, found.null, self.steps, self.guidance, self.seed)
        return found.module, made


@spread
def calibrate_command(
    sampled: Sampled,
    *,
    probes: Annotated[
        int, typer.Option(min=0, help="Steps of which it is found out what becomes of their errors; a run for each.")
    ] = PROBES,
    out: Annotated[Path, typer.Option(help="The recording.")] = Path("calibration.safetensors"),
) -> None:
    """Record runs of a model with the scheduler that it was saved with; a pipeline of your own: dicompile.calibrate."""
    make_folder(out, "dicompile calibrate")
    module, made = sampled.load()
    recording = made.record(module, sampled.runs)
    if probes and sampled.steps > FEWEST_STEPS:
        made.probe(module, recording, probes)
    recording.save(out)
    Console().print(f"{recording}\nwrote {out}; see what it allows with: dicompile frontier {out}")


@spread
def measure_command(
    sampled: Sampled,
    *,
    backend: Annotated[str, typer.Option(help="What runs the steps: 'inductor' or 'eager'.")] = "inductor",
    out: Annotated[Path, typer.Option(help="The times.")] = Path("timing.json"),
) -> None:
    """Time every kind of step that auto chooses from, on this machine; a pipeline of your own: dicompile.measure."""
    make_folder(out, "dicompile measure")
    module, made = sampled.load()
    timing = made.measure(module, sampled.runs, backend=backend)
    timing.save(out)
    console = Console()
    console.print(timing)
    console.print(f"wrote {out}; plans by time: dicompile frontier calibration.safetensors --timing {out}")


def frontier_command(
    recording: Annotated[Path, typer.Argument(help="What `dicompile calibrate` or Recording.save wrote.")],
    budget: Annotated[float | None, typer.Option(help="Share of the compute that the policy may take.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Its inverse.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Expected relative error that it may have.")] = None,
    max_cache_bytes: Annotated[str | None, typer.Option(help="Memory that it may take, '2GiB'.")] = None,
    timing: Annotated[Path | None, typer.Option(help="What `dicompile measure` wrote: budgets are of time.")] = None,
    out: Annotated[Path | None, typer.Option(help="The policy for one of these goals, as .json or .yaml.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of the frontier; needs matplotlib.")] = None,
) -> None:
    """Print expected error against compute, with fewer steps as the rival; write the policy for one goal."""
    check_picture_file(plot)
    if out is not None:
        make_folder(out, "dicompile frontier")
    timed = None if timing is None else Timing.load(timing)
    frontier = Recording.load(recording).frontier(max_cache_bytes, timed)
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
