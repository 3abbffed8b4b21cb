"""``dicompile router show|export FILE``: what a router caches, and its schedule for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dicompile.cli.files import make_folder, write_whole
from dicompile.policies import Router, load_router, schedule_to_json

router_app = typer.Typer(no_args_is_help=True, help="Look at a trained router, or export its schedule.")

File = Annotated[Path, typer.Argument(help="A router of `dicompile train-router`, or a published .pt or .pth file.")]
Threshold = Annotated[float | None, typer.Option(help="Instead of the router's own; larger values cache more.")]


@router_app.command()
def show(file: File, threshold: Threshold = None) -> None:
    """Print how many sites every cache step reuses."""
    router = load_router(file)
    typer.echo(router.summary(threshold))
    Console().print(router_table(router, threshold))


@router_app.command()
def export(
    file: File,
    json: Annotated[Path, typer.Option(help="File to write: per branch one 0 or 1 for every call.")],
    threshold: Threshold = None,
) -> None:
    """Write the schedule as JSON, in the form that SmoothCache reads."""
    router = load_router(file)
    make_folder(json, "dicompile router export")
    write_whole(json, schedule_to_json(router.schedule(threshold), router.facts.sites))
    typer.echo(router.summary(threshold))


def router_table(router: Router, threshold: float | None = None) -> Table:
    """One row per cache step, in calling order: how many sites it reuses, and of which kind."""
    schedule, facts = router.schedule(threshold), router.facts
    kind_of = [label.partition(".")[2] for label in facts.sites]
    kinds = list(dict.fromkeys(kind_of))
    table = Table("call", "timestep", "row", "cached", *kinds)
    for call, row in router.rows.items():
        reused = (~schedule[call]).tolist()
        by_kind = [sum(own for own, kind in zip(reused, kind_of, strict=True) if kind == wanted) for wanted in kinds]
        timestep = f"{facts.timesteps[call]:g}" if facts.timesteps else ""
        table.add_row(f"{call}", timestep, f"{row}", f"{sum(reused)}", *map(str, by_kind))
    return table
