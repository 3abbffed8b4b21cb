"""``dicompile inspect MODEL``: what is cacheable, what each policy would do and save; nothing is compiled."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dicompile.analysis import Block, ModelStructure, Pace, Site, SiteKind, TokenWise
from dicompile.cli import options
from dicompile.cli.kernels import check_can_count, kernel_rows, kernel_table
from dicompile.cli.models import Loaded
from dicompile.cli.show import (
    BAD,
    FAINT,
    Candidates,
    candidates,
    lane_lines,
    make_console,
    plan_table,
    refusals,
)
from dicompile.garbage import uncollected
from dicompile.plan import Timing
from dicompile.plan.plan import FLOPS_PER_BYTE, ROOFLINE
from dicompile.policies import POLICIES, required_options
from dicompile.progress import progress
from dicompile.text import operations_text, ranges_text

MOST_RUNS = 6
"""Runs of equal blocks that are shown if not all are asked for."""

_NUMBER = re.compile(r"\.\d+(?=\.|\b)")


@options.spread
def inspect(  # noqa: PLR0913 - options
    subject: options.Subject,
    *,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policy name or file; may be repeated. Default: all.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid/--no-grid", help="Also print what every site does at every step.")] = (
        False
    ),
    everything: Annotated[bool, typer.Option("--all", help="Every run of blocks and every reason.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="More columns than fit 80 or 120.")] = False,
    graph: Annotated[
        Path | None, typer.Option(help="Draw the dataflow of the first block of each kind, sites marked: SVG, PNG.")
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Count what steps launch on an H200, in bfloat16; no GPU is needed.")
    ] = False,
    timing: options.TimingFile = None,
    as_json: options.AsJson = False,
    cache: options.Cache,
) -> None:
    """Show blocks, sites and costs of a model, and what each policy would do to it."""
    options.check_picture_file(graph)
    names = policy or [name for name in POLICIES if not required_options(name)]
    remembered = cache.options("dicompile inspect")
    if kernels:
        check_can_count()
    with uncollected(), progress(f"looking at {subject.model}"):
        loaded = subject.load().in_bfloat16() if kernels else subject.load()
        analysis = loaded.analysis()
        timed = options.timing_of(timing, loaded, analysis)
        found = candidates(analysis, names, subject.schedule, remembered, timed)
    capture, structure = analysis.capture, analysis.structure()
    rows = kernel_rows(capture, found.plans) if kernels else []
    if graph is not None:
        from dicompile.cli.pictures import draw_blocks

        draw_blocks(graph, capture, structure)
    if as_json:
        counted = {"kernels": [dataclasses.asdict(row) for row in rows]} if kernels else {}
        typer.echo(json.dumps(as_data(loaded.name, structure, found) | counted, indent=2))
        return
    console = make_console(wide=wide)
    _print_model(console, loaded, structure, everything=everything, wide=wide)
    _print_policies(console, found, subject.steps, everything=everything, is_default=not policy)
    console.print(_prediction(timed), style=FAINT)
    for item in found.plans if grid else ():
        console.print(Text(f"\n{item.label}", "bold"))
        for line in lane_lines(item.plan, console.width, every_site=everything):
            console.print(line, no_wrap=True, overflow="crop")
    if kernels:
        console.print(Text("\nlaunched by one step on an H200, bfloat16", "bold"))
        console.print(Padding(kernel_table(rows), (0, 0, 0, 2), expand=False))
        for item in (item for item in found.plans if item.plan.gate is not None):
            console.print(Text(f"not counted: {item.label}: a gate decides while sampling what its steps are", BAD))
    if graph is not None:
        console.print(f"\ndataflow: {graph}")


def _print_model(console: Console, loaded: Loaded, structure: ModelStructure, *, everything: bool, wide: bool) -> None:
    name, *about = model_lines(loaded, structure)
    console.print(name)
    for line in about:
        console.print(Padding(line, (0, 0, 0, 2), expand=False))
    console.print()
    console.print(site_table(structure, everything=everything, wide=wide))
    for fact in facts(structure, everything=everything):
        console.print(Padding(fact, (0, 0, 0, 2), expand=False))
    console.print()


def _print_policies(console: Console, found: Candidates, steps: int, *, everything: bool, is_default: bool) -> None:
    console.print(Text(f"policies, {steps} steps, the fastest first", "bold"))
    console.print(Padding(plan_table(found.plans), (0, 0, 0, 2), expand=False))
    if everything or not is_default:
        for item in found.plans:
            for note in item.plan.notes():
                console.print(Text(f"note: {item.label}: {note}", BAD))
    for names, reason in refusals(found.refused):
        console.print(Text.assemble(("does not fit: ", BAD), f"{names}: {reason}"))
    if everything:
        for name, error in found.refused.items():
            console.print(Text(f"  {name}: {error}", FAINT))
    if is_default:
        trained = ", ".join(name for name in POLICIES if required_options(name))
        console.print(f"need a file that was trained for the model: {trained}")


def _prediction(timing: Timing | None) -> str:
    """What time and speedup follow from."""
    by = ROOFLINE if timing is None else timing.clock
    more = f", {FLOPS_PER_BYTE:.0f} operations a byte, nothing fused" if timing is None else ""
    return f"time and speedup are predicted: {by}{more}. What the pictures lose is not; dicompile demo shows it."


def model_lines(loaded: Loaded, structure: ModelStructure) -> Iterator[Text]:
    """What the model is."""
    count = loaded.parameters
    size = f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
    work = operations_text(structure.flops)
    yield Text.assemble((loaded.name, "bold"), f": {size} parameters, ", (work, "bold"), " a call")
    for about in loaded.about:
        yield Text(about, FAINT)
    kinds = Counter(site.kind.value for site in structure.sites)
    sites = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    yield Text(f"{len(structure.blocks)} blocks of {structure.block_kinds} kinds, {_streams(structure)}")
    yield Text(f"{len(structure.sites)} sites: {sites}" if sites else "no sites: nothing can be cached")


def _streams(structure: ModelStructure) -> str:
    """How many residual streams there are, and how many tokens each has."""
    counts: dict[int, dict[int, None]] = {}
    for site in structure.sites:
        counts.setdefault(site.stream, {})[site.tokens.count] = None
    texts = [" then ".join(map(str, tokens)) for tokens in counts.values()]
    return f"{len(texts)} stream{'s'[: len(texts) != 1]} of {' and '.join(texts)} tokens"


def site_table(structure: ModelStructure, *, everything: bool = False, wide: bool = False) -> Table:
    """One row per kind of site in a run of equal blocks."""
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    for head, justify in (("blocks and their sites", "left"), ("shape", "right"), ("share", "right")):
        table.add_column(head, justify=justify, overflow="fold")  # type: ignore[arg-type] # rich's literal
    if wide:
        for head in ("stream", "work", "read and written", "heaviest operator"):
            table.add_column(head, justify="left" if head == "heaviest operator" else "right", no_wrap=True)
    table.add_column("single tokens?")
    numbers = {reason: number for number, reason in enumerate(_reasons(structure), 1)}
    runs = structure.runs()
    shown = runs if everything else sorted(runs, key=lambda run: -_flops(structure, run))[:MOST_RUNS]
    for run in (run for run in runs if run in shown):
        path = run[0].path.rpartition(".")[0]
        label = path if wide else path.rpartition(".")[2]
        table.add_row(Text(f"{label or 'blocks'} {ranges_text(int(b.id) for b in run)}", "bold"))
        for i, site in enumerate(structure.sites_of(run[0])):
            table.add_row(*_site_row(structure, run, i, numbers.get(_reason(site), 0), wide=wide))
    if left := [run for run in runs if run not in shown]:
        share = sum(_flops(structure, run) for run in left) / structure.flops
        table.add_row(f"{len(left)} more runs of blocks (--all)", "", f"{share:.1%}")
    rest = 1 - sum(site.flops for site in structure.sites) / structure.flops
    table.add_row("outside: embeddings, modulation, head", "", f"{rest:.1%}")
    return table


def _site_row(structure: ModelStructure, run: Sequence[Block], i: int, number: int, *, wide: bool) -> list[Text]:
    sites = [structure.sites_of(block)[i] for block in run]
    site, flops = sites[0], sum(site.flops for site in sites)
    row = [f"  {site.kind.value}", "x".join(map(str, site.shape)), f"{flops / structure.flops:.1%}"]
    if wide:
        moved = f"{sum(s.bytes for s in sites) / 2**30:.2f} GiB"
        row += [f"{site.stream}", operations_text(flops), moved, site.name]
    style = {TokenWise.YES: "green", TokenWise.NO: BAD}.get(site.tokens.wise, "")
    mark = f" ({number})" if number else ""
    kind = BAD if site.kind is SiteKind.UNKNOWN else ""
    return [Text(row[0], kind), *map(Text, row[1:]), Text(f"{site.tokens.wise.value}{mark}", style)]


def _flops(structure: ModelStructure, run: Sequence[Block]) -> int:
    return sum(site.flops for block in run for site in structure.sites_of(block))


def _reason(site: Site) -> str:
    return _NUMBER.sub(".*", site.tokens.reason)


def _reasons(structure: ModelStructure) -> list[str]:
    """What keeps tokens together, by operator and module."""
    return list(dict.fromkeys(_reason(site) for site in structure.sites if site.tokens.reason))


def facts(structure: ModelStructure, *, everything: bool = False) -> Iterator[Text]:
    """What cannot be refreshed alone or cached, and by which operator; what leaves the steps."""
    reasons = _reasons(structure)
    shown = reasons if everything else reasons[:MOST_RUNS]
    for number, reason in enumerate(shown, 1):
        yield Text(f"({number}) {reason}", FAINT)
    if len(shown) < len(reasons):
        yield Text(f"and {len(reasons) - len(shown)} more (--all)", FAINT)
    unknown = [site for site in structure.sites if site.kind is SiteKind.UNKNOWN]
    if unknown:
        yield Text(f"of kind unknown, with an operator that nobody registered: {len(unknown)} sites", BAD)
    yield Text.assemble(("leaves the steps: ", "bold"), invariant_text(structure) or "nothing")


def invariant_text(structure: ModelStructure) -> str:
    """What does not depend on the latent, and is computed once for many steps."""
    counts = Counter(structure.invariants.values())
    shares = {pace: structure.invariant_flops[pace] / structure.flops for pace in counts}
    return "; ".join(
        f"{counts[pace]} value{'s'[: counts[pace] - 1]}, {shares[pace]:.2%} of the work, {pace.value}"
        for pace in Pace
        if counts[pace]
    )


def as_data(name: str, structure: ModelStructure, found: Candidates) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    return {
        "model": name,
        "flops": structure.flops,
        "bytes": structure.bytes,
        "invariants": {name: pace.name.lower() for name, pace in structure.invariants.items()},
        "inputs": {item.name: item.role.value for item in structure.inputs if item.role.is_given},
        "blocks": [{"id": b.id, "path": b.path, "kind": b.kind, "sites": list(b.sites)} for b in structure.blocks],
        "sites": [_site_data(site) for site in structure.sites],
        "policies": {name: options.plan_data(item.plan) for item in found.plans for name in item.names},
        "refused": {name: error.what for name, error in found.refused.items()},
    }


def _site_data(site: Site) -> dict[str, Any]:
    data = dataclasses.asdict(site)
    tokens = data.pop("tokens")
    data["kind"] = site.kind.value
    data["tokens"] = {**tokens, "wise": site.tokens.wise.value}
    return data
