"""Options that several commands have, so that they are called and explained alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

from dicompile.analysis import Analysis
from dicompile.cli.files import make_folder
from dicompile.cli.models import Loaded, Shape, load
from dicompile.errors import DicompileError
from dicompile.plan import DTYPES, CacheOptions, Plan, TimestepSchedule, Timing

GIVEN, REMEMBERED = "What the model is given", "What is remembered"
"""Panels of the help."""

Command = TypeVar("Command", bound=Callable[..., Any])

Model = Annotated[
    str,
    typer.Argument(
        help="A well-known model ('flux.1-dev'; `dicompile models` lists them), 'demo', a folder saved by "
        "diffusers, module:factory, or a hub id with --download."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=GIVEN)]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Rows of a call; as its pipeline if not given, 2 for 'demo' and folders.", rich_help_panel=GIVEN
    ),
]
Size = Annotated[
    str | None,
    typer.Option(help="Of a well-known model, in pixels: 1024, or height x width, 480x832.", rich_help_panel=GIVEN),
]
Frames = Annotated[int | None, typer.Option(min=1, help="Of the film of a well-known model.", rich_help_panel=GIVEN)]
Text = Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.", rich_help_panel=GIVEN)]
Latent = Annotated[
    int | None, typer.Option(min=1, help="Edge of the latent of 'demo' or a folder.", rich_help_panel=GIVEN)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxCacheBytes = Annotated[
    str | None,
    typer.Option(help="Budget of the cache for one guidance context: '2GiB', '500MB'.", rich_help_panel=REMEMBERED),
]
OverBudget = Annotated[
    str, typer.Option(help="'refuse' or 'degrade' a plan that needs more.", rich_help_panel=REMEMBERED)
]
CacheDtype = Annotated[
    str | None, typer.Option(help=f"Store values as {', '.join(DTYPES)}.", rich_help_panel=REMEMBERED)
]
CacheDevice = Annotated[
    str | None, typer.Option(help="'cpu' keeps the cache in host memory.", rich_help_panel=REMEMBERED)
]
TimingFile = Annotated[
    Path | None,
    typer.Option("--timing", help="What `dicompile measure` wrote: times of this model, in the place of a roofline."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch config.json of a hub id; no weights.")]


@dataclass(frozen=True)
class Subject:
    """MODEL, and what it is given: the same for every command that looks at one."""

    model: Model
    steps: Steps = 50
    batch: Batch = None
    size: Size = None
    frames: Frames = None
    text: Text = None
    latent: Latent = None
    download: Download = False

    def load(self) -> Loaded:
        """The model, without weights."""
        shape = Shape(self.batch, self.size, self.frames, self.text, self.latent)
        return load(self.model, shape, download=self.download)

    @property
    def schedule(self) -> TimestepSchedule:
        """So many steps."""
        return TimestepSchedule.of(self.steps)


@dataclass(frozen=True)
class Cache:
    """What may be remembered."""

    max_cache_bytes: MaxCacheBytes = None
    over_budget: OverBudget = "refuse"
    cache_dtype: CacheDtype = None
    cache_device: CacheDevice = None

    def options(self, where: str) -> CacheOptions:
        """The same, checked."""
        return CacheOptions.of(self.max_cache_bytes, self.over_budget, self.cache_dtype, self.cache_device, where=where)


def spread(command: Command) -> Command:
    """Options of a dataclass in the place of a parameter that is one, so that commands share what is spelled alike.

    Typer reads options from a signature; this is the command's with the fields of every such parameter in its place.
    """
    types = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in types.items() if is_dataclass(kind) and isinstance(kind, type)}
    found: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            own = inspect.signature(groups[name]).parameters.values()
            found += [field.replace(annotation=hints[field.name], kind=field.KEYWORD_ONLY) for field in own]
        else:
            found.append(parameter.replace(annotation=types[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        return command(**given)

    del call.__wrapped__  # typer would look at the command's own signature
    call.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
    return cast("Command", call)


def timing_of(file: Path | None, loaded: Loaded, analysis: Analysis) -> Timing | None:
    """Times out of a file, if one is given.

    Raises:
        InvalidTiming: it is none, or another model or size was timed.
    """
    if file is None:
        return None
    timing = Timing.load(file)
    timing.check_model(type(loaded.module).__name__, str(file))
    if analysis.latent is not None:
        timing.check(latent=tuple(int(size) for size in analysis.latent.meta["val"].shape))
    return timing


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
        "clock": plan.clock,
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
