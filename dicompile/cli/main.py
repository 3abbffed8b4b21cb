"""The typer application and its commands.

A command is a function that parses options, calls the API, and prints; one that has a file of its own is registered at
the bottom of this one: ``app.command()(inspect)``.
"""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer

import dicompile
from dicompile.cli.bench import bench
from dicompile.cli.cache import cache_app
from dicompile.cli.calibrate import calibrate_command, frontier_command, measure_command
from dicompile.cli.compare import compare_command
from dicompile.cli.doctor import doctor
from dicompile.cli.extras import needed_for
from dicompile.cli.fit_forecast import fit_forecast_command
from dicompile.cli.inspect import inspect
from dicompile.cli.logs import logged
from dicompile.cli.plan import plan_command
from dicompile.cli.policy import policies, policy_app
from dicompile.cli.router import router_app
from dicompile.cli.train_predictor import train_predictor_command
from dicompile.cli.train_router import train_router_command
from dicompile.cli.zoo import models
from dicompile.errors import DicompileError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the ``dicompile`` script; errors that are the user's to fix come without a traceback.

    The exit code is 0 where all went well, 1 where something was refused, 2 where the command line is wrong, 130 after
    ctrl-C, and 143 where the process was told to end, which leaves no temporary files, either.
    """
    before = signal.signal(signal.SIGTERM, _end)
    gc.freeze()  # what is imported lives on, and need not be looked at whenever garbage is collected
    try:
        app()
    except DicompileError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> None:
    """Let whatever is open clean up, as after ctrl-C."""
    raise SystemExit(128 + number)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"dicompile {dicompile.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def about(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only: no bars, no warnings.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is captured and compiled, and how long it takes.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler for diffusion transformers with feature caching.

    Results go to stdout; bars, warnings and errors to stderr. NO_COLOR=1 prints without colours.
    """
    if quiet and verbose:
        raise typer.BadParameter("either --quiet or --verbose")
    context.with_resource(logged(quiet=quiet, verbose=verbose))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report (index.html), pictures and numbers.")] = Path("out"),
    samples: Annotated[int | None, typer.Option(min=2, help="Pictures for each method; 24 if not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps; 50 if not given.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method at two or three speeds.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="12 samples and 20 steps, if not given.")] = False,
) -> None:
    """Compare cache policies on the bundled model: time, FLOPs, distance to the uncached samples, pictures."""
    with needed_for("the demo", "demo"):
        from dicompile.demo.run import run_demo
    run_demo(out, samples=samples or (12 if quick else 24), steps=steps or (20 if quick else 50), every=every)


app.command()(inspect)
app.command("plan")(plan_command)
app.command()(models)
app.command()(policies)
app.add_typer(policy_app, name="policy")
app.command()(bench)
app.command()(doctor)
app.command("compare")(compare_command)
app.command("calibrate")(calibrate_command)
app.command("measure")(measure_command)
app.command("frontier")(frontier_command)
app.command("fit-forecast")(fit_forecast_command)
app.command("train-router")(train_router_command)
app.command("train-predictor")(train_predictor_command)
app.add_typer(router_app, name="router")
app.add_typer(cache_app, name="cache")
