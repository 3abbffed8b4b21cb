"""Results as tables, for a terminal of 80 columns and for Markdown, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dicompile.bench.machine import Machine
from dicompile.bench.results import CompileRow, Cost, Kind, Result, Row
from dicompile.text import size_text


@dataclass(frozen=True)
class Sheet:
    """A table whose first column is text, and all others figures.

    Attributes:
        title: above it.
        headings: of the columns.
        rows: cells, as text.
        notes: below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For a terminal."""
        title, notes = Text(self.title), Text("\n".join(self.notes))  # plain: a note may name 'dicompile[bench]'
        table = Table(title=title, caption=notes or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.title_justify = table.caption_justify = "left"
        first, *others = self.headings
        table.add_column(first, no_wrap=True)
        for heading in others:
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """With a heading of the third level."""
        lines = [self.headings, ("---",) + ("---:",) * (len(self.headings) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"### {self.title}", table, *self.notes])


def sheets_of(result: Result) -> list[Sheet]:
    """Time and operations; then memory and compilation."""
    fits = (f"{name} is left out: {why}" for name, why in result.refused)
    settings = (f"{row.name}: {row.setting}" for row in result.rows if row.setting)
    speed = Sheet(
        f"{result.model}: {result.size}",
        ("", "ms per step", "ms per run", "speedup", "fewer FLOPs", "arrival"),
        tuple(_speed(row) for row in result.rows),
        (f"Speedup over {result.baseline}.", *fits, *settings),
    )
    costs = [_costs(row) for row in result.rows if row.memory.held or row.memory.peak or row.cold]
    if not costs:
        return [speed]
    headings = ("", "cache, planned", "held", "hoisted", "peak on GPU", "cold, wall", "CPU", "warm, wall", "CPU")
    return [speed, _without_empty(Sheet(f"{result.model}: memory, and seconds of compiling", headings, tuple(costs)))]


def all_sheets(results: Sequence[Result], compiled: Sequence[CompileRow]) -> list[Sheet]:
    """Everything that was measured."""
    return [*itertools.chain.from_iterable(map(sheets_of, results)), *([compile_sheet(compiled)] if compiled else [])]


def compile_sheet(rows: Sequence[CompileRow]) -> Sheet:
    """Cold compile times of all variants, with targets."""
    cells: list[tuple[str, ...]] = []
    for model, contestants in itertools.groupby(rows, lambda row: row.model):
        cells.append((model, *[""] * 6))
        for row in contestants:
            ratios = ((row.whole, row.most_whole), (row.blocks, row.most_blocks))
            compared = [text for ratio, most in ratios for text in (_times(ratio), _most(most))]
            cells.append((row.name, f"{row.cost.wall:.1f}", f"{row.cost.cpu:.1f}", *compared))
    headings = ("", "wall s", "CPU s", "vs whole", "at most", "vs blocks", "at most")
    notes = (
        "Seconds from the first call to the end of the first generation, with empty caches. Ratios are of CPU "
        "seconds: to torch.compile of the uncached model as a whole, and to diffusers' compile_repeated_blocks.",
    )
    return Sheet("Compile times, cold, all variants", headings, tuple(cells), notes)


def to_json(machine: Machine, results: Sequence[Result], compiled: Sequence[CompileRow]) -> str:
    """Everything, with what follows from it."""
    content = {
        "machine": dataclasses.asdict(machine),
        "models": [
            {
                **dataclasses.asdict(result),
                "rows": [
                    {**dataclasses.asdict(row), "milliseconds": row.milliseconds, "arrival": row.arrival}
                    for row in result.rows
                ],
                "refused": dict(result.refused),
            }
            for result in results
        ],
        "compile_times": [dataclasses.asdict(row) for row in compiled],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_markdown(machine: Machine, sheets: Sequence[Sheet]) -> str:
    """All tables, under a line about the machine and the command."""
    head = [*machine.lines(), f"`{machine.command}`"]
    return "\n\n".join(["\n".join(head), *(sheet.markdown() for sheet in sheets)]) + "\n"


def in_place_of(part: str, text: str, before: str) -> str:
    """A file with one part of it written anew: between its marks, else at the end.

    Args:
        part: name of the part.
        text: its new content.
        before: what the file holds.
    """
    begin, end = f"<!-- dicompile bench: {part} -->\n", f"<!-- end of {part} -->\n"
    head, found, rest = before.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        head, tail = before + ("\n" if before else ""), ""
    return f"{head}{begin}{text}{end}{tail}"


def _speed(row: Row) -> tuple[str, ...]:
    return (
        row.name, _kinds(row.kinds), f"{row.milliseconds:.1f}", _times(row.speedup), _times(row.flop_speedup),
        f"{row.arrival:.2f}",
    )  # fmt: skip


def _kinds(kinds: Sequence[Kind]) -> str:
    return ", ".join(f"{kind.count} {kind.name} {kind.milliseconds:.2f}" for kind in kinds)


def _costs(row: Row) -> tuple[str, ...]:
    memory = row.memory
    sizes = (memory.planned, memory.held, memory.hoisted, memory.peak)
    return (row.name, *("" if size is None else size_text(size) for size in sizes), *_cost(row.cold), *_cost(row.warm))


def _cost(cost: Cost | None) -> tuple[str, str]:
    return ("", "") if cost is None else (f"{cost.wall:.1f}", f"{cost.cpu:.1f}")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _most(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:g}x"


def _without_empty(sheet: Sheet) -> Sheet:
    """The table without columns that say nothing."""
    kept = [i for i in range(len(sheet.headings)) if any(row[i] for row in sheet.rows)]

    def chosen(cells: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(cells[i] for i in kept)

    return Sheet(sheet.title, chosen(sheet.headings), tuple(chosen(row) for row in sheet.rows), sheet.notes)
