"""``dicompile plan MODEL --policy NAME``: what every site does at every step, work, memory, and what it should save."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dicompile.analysis import ModelStructure
from dicompile.cli import options
from dicompile.cli.files import make_folder, write_whole
from dicompile.cli.show import BAD, FAINT, GOOD, Candidate, difference_lines, lane_lines, make_console, plan_table
from dicompile.errors import DicompileError
from dicompile.garbage import uncollected
from dicompile.html import page
from dicompile.plan import Plan, make_plan
from dicompile.policies import get_policy
from dicompile.progress import progress
from dicompile.text import operations_text, size_text

WHERE = "dicompile plan"


@options.spread
def plan_command(  # noqa: PLR0913 - options
    subject: options.Subject,
    *,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Policy name or file.")],
    against: Annotated[
        str | None, typer.Option("--against", "-a", help="Another policy: show in what the two plans differ.")
    ] = None,
    every_site: Annotated[bool, typer.Option("--all", help="A line for every site, not one for like blocks.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Lines longer than the terminal.")] = False,
    picture: Annotated[
        list[Path] | None, typer.Option("--png", "--svg", help="Draw it to this file; may be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write it as a page that needs nothing else.")] = None,
    timing: options.TimingFile = None,
    as_json: options.AsJson = False,
    cache: options.Cache,
) -> None:
    """Show what a policy does to a model at every step; nothing is compiled."""
    remembered = cache.options(WHERE)
    for file in picture or ():
        options.check_picture_file(file)
    if html is not None:
        make_folder(html, WHERE)
    spelled = tuple(filter(None, (policy, against)))
    policies = [get_policy(name) for name in spelled]
    with uncollected(), progress(f"looking at {subject.model}"):
        loaded = subject.load()
        analysis = loaded.analysis()
        plans = [make_plan(analysis.structure(each.trunk), each, subject.schedule, remembered) for each in policies]
        timed = options.timing_of(timing, loaded, analysis)
        plans = told_apart(spelled, plans if timed is None else list(map(timed.on, plans)))
    structure = analysis.structure()
    _write(loaded.name, structure, plans, picture or (), html)
    if as_json:
        data = {plan.policy: options.plan_data(plan) for plan in plans}
        typer.echo(json.dumps({"model": loaded.name, "plans": data}, indent=2))
        return
    console = make_console(wide=wide)
    about = ", ".join((loaded.name, *loaded.about[:1]))
    console.print(Text(about, "bold"))
    if len(plans) > 1:
        _print_difference(console, plans)
    else:
        _print_plan(console, plans[0], every_site=every_site)
    for file in (*(picture or ()), *filter(None, [html])):
        console.print(f"written: {file}", style=FAINT)


def told_apart(spelled: Sequence[str], plans: Sequence[Plan]) -> list[Plan]:
    """Plans by their policies' names, or, where two are called alike, by what the user wrote.

    Raises:
        DicompileError: that is the same, too.
    """
    if len(set(spelled)) < len(spelled):
        raise DicompileError(
            f"{spelled[0]} is compared with itself", where="--against", fix="name another policy, or a file"
        )
    if len({plan.policy for plan in plans}) == len(plans):
        return list(plans)
    return [dataclasses.replace(plan, policy=name) for name, plan in zip(spelled, plans, strict=True)]


def _write(
    name: str, structure: ModelStructure, plans: list[Plan], pictures: tuple[Path, ...] | list[Path], html: Path | None
) -> None:
    for file in pictures:
        from dicompile.cli.pictures import draw_plans

        draw_plans(file, name, plans)
    if html is not None:
        parts = [f"<h2>{escape(plan.policy)}</h2>{plan._repr_html_()}" for plan in plans]
        write_whole(html, page(name, structure._repr_html_(), *parts))


def _print_plan(console: Console, plan: Plan, *, every_site: bool) -> None:
    for line in head_lines(plan):
        console.print(line)
    console.print()
    for line in lane_lines(plan, console.width, every_site=every_site):
        console.print(line, no_wrap=True, overflow="crop") if line.plain else console.print()
    console.print()
    console.print(Padding(kinds_table(plan), (0, 0, 0, 2), expand=False))
    for note in plan.notes():
        console.print(Text(f"note: {note}", BAD))


def head_lines(plan: Plan) -> Iterator[Text]:
    """The plan in figures, and plainly whether it is worth anything."""
    setting = f", the setting for {plan.meant_for}" if plan.meant_for else ""
    yield Text.assemble((plan.policy, "bold"), f"{setting}: {len(plan.steps)} steps")
    yield Text(
        f"  {operations_text(plan.flops)} instead of {operations_text(plan.baseline_flops)}, "
        f"{plan.flop_speedup:.2f}x fewer"
        + (f", at best: a gate decides while sampling, up to {operations_text(plan.most_flops)}" if plan.gate else "")
    )
    none = plan.no_gain()
    yield Text(f"  {none}", BAD) if none else Text(f"  predicted {plan.prediction(' faster')}", GOOD)
    held = f"{size_text(plan.cache_bytes)} in {len(plan.slots)} slots" if plan.cache_bytes else "nothing"
    where = f" ({plan.cache})" if str(plan.cache) else ""
    yield Text(f"  remembers {held} for each guidance context{where}")


def kinds_table(plan: Plan) -> Table:
    """One row per kind of step: how often, work, memory traffic, and how much faster than a step without caching."""
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    table.add_column("kind of step")
    for head in ("steps", "operations", "of a full step", "read and written", "speedup"):
        table.add_column(head, justify="right", no_wrap=True)
    whole = plan.baseline_flops / len(plan.steps) or 1
    for kind, count in Counter(step.kind for step in plan.steps).items():
        numbers = [i for i, step in enumerate(plan.steps) if step.kind == kind]
        flops = sum(plan.steps[i].flops for i in numbers) / count
        moved = sum(plan.steps[i].bytes for i in numbers) / count
        time = sum(plan.steps[i].time for i in numbers) / count
        speedup = plan.baseline_time / len(plan.steps) / time if time else 1.0
        cells = (f"{count}", operations_text(flops), f"{flops / whole:.1%}", size_text(moved), f"{speedup:.2f}x")
        table.add_row(kind, *cells)
    return table


def _print_difference(console: Console, plans: list[Plan]) -> None:
    one, other = plans
    console.print(plan_table([Candidate((plan.policy,), plan) for plan in plans]))
    for plan in plans:
        for note in filter(None, (plan.no_gain(), *plan.notes())):
            console.print(Text(f"{plan.policy}: {note}", BAD))
    console.print()
    for line in difference_lines(one, other, console.width):
        console.print(line, no_wrap=True, overflow="crop") if "same in" not in line.plain else console.print(line)
