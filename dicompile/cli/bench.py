"""``dicompile bench [MODEL ...]``: how much of the saved work arrives as saved time, beside everybody else."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.console import Console

from dicompile.cli.files import make_folder, write_whole
from dicompile.errors import DicompileError
from dicompile.policies import get_policy
from dicompile.progress import progress

if TYPE_CHECKING:
    from dicompile.bench.machine import Machine
    from dicompile.bench.measure import Costs, Options
    from dicompile.bench.models import Subject
    from dicompile.bench.results import CompileRow, Result

WHERE = "dicompile bench"
Tick = Callable[[str], None]


def bench(  # noqa: PLR0913, PLR0917 - options
    models: Annotated[
        list[str] | None, typer.Argument(help="dit, pixart, sd3, flux, wan, cogvideox; all of them by default.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policy name or file. Default: none, fora, toca.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            "-a",
            help="Opponent, or 'all'. Default: eager, torch.compile, compile-blocks, fewer-steps. Others: first-block, "
            "taylorseer, magcache, pab, fastercache (hooks of diffusers), cache-dit.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Calls of one generation; 20 if not given.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of every contestant; 5, or 1 for compile times, if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and latents.")
    ] = "float32",
    full: Annotated[
        bool | None, typer.Option("--full/--reduced", help="Published size; reduced on a CPU if not given.")
    ] = None,
    compiling: Annotated[
        bool, typer.Option("--compiling/--no-compiling", help="Also measure compiling, in fresh processes.")
    ] = True,
    compile_times: Annotated[
        bool, typer.Option("--compile-times", help="Only compile times by depth: dit-12, dit-28, dit-57, flux-57.")
    ] = False,
    backend: Annotated[
        Literal["inductor", "eager"], typer.Option(help="'eager' compiles nothing: a rehearsal.")
    ] = "inductor",
    quick: Annotated[
        bool, typer.Option("--quick", help="Two blocks, 4 steps and 1 round if not given, no compiling.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this file; what else is in it stays.")
    ] = None,
) -> None:
    """Measure time, memory and compilation, interleaved; random weights, so nothing about quality."""
    from dicompile.bench.machine import Machine
    from dicompile.bench.tables import all_sheets

    _require(device)
    name = f"{'compile' if compile_times else 'step'} times on {torch.device(device).type}"
    files = Files(name, json_file, markdown)
    machine = Machine.of(device, shlex.join(["dicompile", *sys.argv[1:]]))
    results: list[Result] = []
    compiled: list[CompileRow] = []
    if compile_times:
        _refuse(policy, against, steps, quick, full is not None, not compiling, backend != "inductor")
        for rows in _compile_times(models or [], rounds or 1, device, dtype):
            compiled += rows
            files.write(machine, results, compiled)
    else:
        from dicompile.bench.measure import Options

        size = "quick" if quick else "full" if (device != "cpu" if full is None else full) else "reduced"
        options = Options(
            tuple(policy or _policies()), _opponents(against or []), steps or (4 if quick else 20),
            rounds or (1 if quick else 5), device, getattr(torch, dtype), size, backend,
        )  # fmt: skip
        for result in _measure(models or [], options, compiling=compiling and not quick and backend == "inductor"):
            results.append(result)
            files.write(machine, results, compiled)
    console = Console()
    for line in machine.lines():
        console.print(line, highlight=False)
    for sheet in all_sheets(results, compiled):
        console.print(sheet.rich())


@dataclass(frozen=True)
class Files:
    """Where results go, whole, after every model: who stops in the middle keeps what is done.

    Attributes:
        part: name of what is measured; another part of a Markdown file stays.
        json: file for everything.
        markdown: file for the tables.
    """

    part: str
    json: Path | None
    markdown: Path | None

    def __post_init__(self) -> None:
        for file in filter(None, (self.json, self.markdown)):
            make_folder(file, WHERE)

    def write(self, machine: Machine, results: Sequence[Result], compiled: Sequence[CompileRow]) -> None:
        """Write what was measured so far."""
        from dicompile.bench.tables import all_sheets, in_place_of, to_json, to_markdown

        if self.json is not None:
            write_whole(self.json, to_json(machine, results, compiled))
        if self.markdown is not None:
            before = self.markdown.read_text(encoding="utf-8") if self.markdown.is_file() else ""
            text = to_markdown(machine, all_sheets(results, compiled))
            write_whole(self.markdown, in_place_of(self.part, text, before))


def _measure(names: Sequence[str], options: Options, compiling: bool) -> Iterator[Result]:
    """One model after the other; processes that compile run before the model is in memory here."""
    from dicompile.bench.measure import measure
    from dicompile.bench.models import get_subjects

    subjects = get_subjects(names)
    for policy in options.policies:
        get_policy(policy)
    turns = (len(options.against) + len(options.policies)) * (1 + options.rounds + compiling)
    with _progress(len(subjects) * turns) as tick:
        for subject in subjects:
            costs = _costs(subject, options, tick) if compiling else {}
            yield measure(subject, options, costs, tick)


def _costs(subject: Subject, options: Options, tick: Tick) -> Costs:
    """Cold and warm cost of every contestant that compiles; those that do not fit are named later."""
    from dicompile.bench.compiling import Job, run
    from dicompile.bench.contestants import EAGER, FEWER, DoesNotFit

    dtype = str(options.dtype).removeprefix("torch.")
    named = [(name, False) for name in options.against if name not in (EAGER, FEWER)]
    named += [(name, True) for name in options.policies]
    costs: Costs = {}
    for name, is_policy in named:
        job = Job(subject.name, subject.size(options.size), name, is_policy, options.steps, options.device, dtype)
        tick(f"{subject.name}: compiling {job.name}")
        try:
            cold, warm = run(job)
        except DoesNotFit:
            continue
        costs[job.name] = cold, warm
    return costs


def _compile_times(names: Sequence[str], rounds: int, device: str, dtype: str) -> Iterator[list[CompileRow]]:
    from dicompile.bench.compiling import compile_times, get_depths

    depths = get_depths(names)
    with _progress(len(depths) * 4 * rounds) as tick:
        yield from compile_times(depths, rounds, device, dtype, tick)


def _policies() -> tuple[str, ...]:
    from dicompile.bench.contestants import POLICIES

    return POLICIES


def _opponents(names: Sequence[str]) -> tuple[str, ...]:
    from dicompile.bench.contestants import AGAINST, FEWER
    from dicompile.bench.rivals import RIVALS

    known = (*RIVALS, FEWER)
    for name in names:
        if name not in (*known, "all"):
            raise DicompileError(
                f"there is no opponent {name!r}", where=WHERE, fix=f"use some of: {', '.join(known)}, all"
            )
    return known if "all" in names else tuple(names) or AGAINST


def _refuse(*options: object) -> None:
    """Refuse options that say nothing about compile times.

    Raises:
        DicompileError: one of them was given.
    """
    if any(options):
        raise DicompileError(
            "compile times have options of their own",
            where="dicompile bench --compile-times",
            why="contestants and steps are those of the targets",
            fix="give it names of depths, --rounds, --device, --dtype, --json and --markdown",
        )


def _require(device: str) -> None:
    """Check that there is such a device.

    Raises:
        DicompileError: there is not.
    """
    try:
        kind = torch.device(device)
        there = kind.type == "cpu" or (kind.type == "cuda" and (kind.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        there = False
    if not there:
        raise DicompileError(
            f"there is no device {device!r}",
            where=WHERE,
            why=f"this torch sees {torch.cuda.device_count()} CUDA devices",
            fix="--device cpu, or run where a GPU and a CUDA build of torch are",
        )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Tick]:
    """A bar; what is inside says what comes next."""
    advances = itertools.chain([0], itertools.repeat(1))
    with progress("", total) as update:
        yield lambda text: update(description=text, advance=next(advances))
