"""Options that several commands have, so that they are called and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dicompile.cli.files import make_folder
from dicompile.errors import DicompileError
from dicompile.plan import DTYPES, Plan

Model = Annotated[
    str,
    typer.Argument(
        help="A well-known model ('flux.1-dev'; `dicompile models` lists them), 'demo', a folder saved by "
        "diffusers, module:factory, or a hub id with --download."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Rows of a call; as its pipeline if not given, 2 for 'demo' and folders.")
]
Size = Annotated[str | None, typer.Option(help="Of a well-known model, in pixels: 1024, or height x width, 480x832.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Of the film of a well-known model.")]
Text = Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.")]
Latent = Annotated[int | None, typer.Option(min=1, help="Edge of the latent of 'demo' or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxCacheBytes = Annotated[
    str | None, typer.Option(help="Budget of the cache for one guidance context: '2GiB', '500MB'.")
]
OverBudget = Annotated[str, typer.Option(help="'refuse' or 'degrade' a plan that needs more.")]
CacheDtype = Annotated[str | None, typer.Option(help=f"Store values as {', '.join(DTYPES)}.")]
CacheDevice = Annotated[str | None, typer.Option(help="'cpu' keeps the cache in host memory.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch config.json of a hub id; no weights.")]

PICTURES = (".png", ".svg", ".pdf")


def check_picture_file(file: Path | None) -> None:
    """Check, before anything takes time, that a picture can be drawn to a file.

    Raises:
        DicompileError: there is no matplotlib, the name is no picture's, or its folder cannot be made.
    """
    if file is None:
        return
    if file.suffix.lower() not in PICTURES:
        raise DicompileError(
            f"cannot draw to {file}", where="file name", fix=f"let it end in one of: {', '.join(PICTURES)}"
        )
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise DicompileError(
            "pictures need matplotlib, which is not installed",
            where=str(file),
            why="the compiler itself does without it",
            fix="pip install 'dicompile[demo]', or --html, which needs nothing",
        ) from None
    make_folder(file, str(file))


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "flops": plan.flops,
        "flop_speedup": plan.flop_speedup,
        "predicted_speedup": plan.predicted_speedup,
        "cache_bytes": plan.cache_bytes,
        "setting_for": plan.meant_for,
        "notes": plan.notes(),
        "dropped": [label for item in plan.dropped for label in item.labels],
        "steps": [
            {
                "kind": step.kind,
                "flops": step.flops,
                "bytes": step.bytes,
                "held_bytes": plan.held(number),
                "predicted_speedup": plan.speedup_of(number),
                "actions": "".join(site.action.symbol for site in step.sites),
            }
            for number, step in enumerate(plan.steps)
        ],
    }
