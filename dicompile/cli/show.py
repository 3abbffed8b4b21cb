"""What several commands print: plans as lanes of coloured symbols, and the policies that fit a model, by speed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dicompile.analysis import Analysis
from dicompile.errors import CacheTooLarge, PolicyDoesNotFit
from dicompile.plan import CacheOptions, Plan, Policy, TimestepSchedule, Timing, choose_setting, make_plan
from dicompile.plan.lanes import MEANING, make_lanes
from dicompile.plan.plan import WORTHWHILE
from dicompile.policies import get_policy
from dicompile.text import operations_text, size_text

STYLES = {
    "F": "bold blue", "t": "cyan", "b": "magenta", "f": "green", ".": "default", "-": "dim", "*": "yellow", " ": ""
}  # fmt: skip
"""Colour of every symbol of an action."""

GOOD, BAD, FAINT = "green", "yellow", "dim"
WIDE = 160
_LEVELS = "▁▂▃▄▅▆▇█"
_POLICY = re.compile(r"^policy '[^']*' ")

Refusal = PolicyDoesNotFit | CacheTooLarge


def make_console(*, wide: bool = False) -> Console:
    """The console for results; `wide` prints more columns than the terminal may have."""
    console = Console(highlight=False, markup=False)  # names of files and policies may hold brackets
    if wide and console.width < WIDE:
        return Console(highlight=False, markup=False, width=WIDE)
    return console


@dataclass(frozen=True)
class Candidate:
    """A plan, and every name that leads to it.

    Attributes:
        names: published names or files, in the order in which they were asked for.
        plan: what they do to the model.
    """

    names: tuple[str, ...]
    plan: Plan

    @property
    def label(self) -> str:
        """The names in one."""
        return " = ".join(self.names)


class Candidates(NamedTuple):
    """What policies do to a model.

    Attributes:
        plans: the fastest first.
        refused: by name, why the others do not fit.
    """

    plans: tuple[Candidate, ...]
    refused: dict[str, Refusal]


def candidates(
    analysis: Analysis,
    names: Sequence[str],
    schedule: TimestepSchedule,
    cache: CacheOptions,
    timing: Timing | None = None,
) -> Candidates:
    """Plan every policy once, however many names it has; with what was timed, if anything was."""
    settings: dict[str, Policy] = {}
    refused: dict[str, Refusal] = {}
    plans: list[Candidate] = []
    for name in dict.fromkeys(names):
        try:
            policy = get_policy(name)
            known = analysis.structure(policy.trunk)
            setting = choose_setting(policy, known).policy.model_copy(update={"name": "", "elsewhere": ()})
            alias = next((other for other, chosen in settings.items() if chosen == setting), None)
            if alias is None:
                plan = make_plan(known, policy, schedule, cache)
                plans.append(Candidate((name,), plan if timing is None else timing.on(plan)))
                settings[name] = setting
            else:
                plans = [Candidate((*c.names, name), c.plan) if alias in c.names else c for c in plans]
        except (PolicyDoesNotFit, CacheTooLarge) as error:
            refused[name] = error
    return Candidates(tuple(sorted(plans, key=lambda item: -item.plan.predicted_speedup)), refused)


def plan_table(plans: Sequence[Candidate]) -> Table:
    """One row per plan: steps, work, time, memory."""
    table = Table(box=None, pad_edge=False, header_style=FAINT, show_edge=False)
    table.add_column("policy", overflow="fold")
    for head in ("full steps", "FLOPs", "fewer", "time", "speedup", "cache"):
        table.add_column(head, justify="right", no_wrap=True)
    for item in plans:
        plan = item.plan
        full = sum(step.kind == "full" for step in plan.at_best)
        least, most = ("", "") if plan.gate is None else (">=", "<=")  # a gate decides while sampling
        table.add_row(
            Text(item.label),
            f"{least}{full} of {len(plan.steps)}",
            f"{least}{operations_text(plan.flops)}",
            f"{most}{plan.flop_speedup:.2f}x",
            f"{least}{1 / plan.predicted_speedup:.0%}",
            Text(f"{most}{plan.predicted_speedup:.2f}x", GOOD if plan.predicted_speedup >= WORTHWHILE else BAD),
            size_text(plan.cache_bytes) if plan.cache_bytes else "-",
        )
    return table


def refusals(refused: Mapping[str, Refusal]) -> Iterator[tuple[str, str]]:
    """Names of what does not fit, together with the one reason that they share."""
    by_reason: dict[str, list[str]] = {}
    for name, error in refused.items():
        by_reason.setdefault(_POLICY.sub("", error.what), []).append(name)
    for reason, names in by_reason.items():
        yield ", ".join(names), reason


def lane_lines(plan: Plan, width: int, *, every_site: bool = False) -> Iterator[Text]:
    """The step x site grid, steps from left to right, folded to the width of the terminal."""
    lanes = make_lanes(plan, every_site=every_site)
    label = max((len(lane.label) for lane in lanes), default=0) + 2
    room = max((width - label) // 10 * 10, 10)
    for start in range(0, len(plan.steps), room):
        part = slice(start, start + room)
        yield from [Text()] if start else []
        yield Text("step".ljust(label) + _ruler(plan, part), FAINT)
        yield from (_cells(lane.label.ljust(label), lane.cells(plan)[part]) for lane in lanes)
        yield from _bars(plan, part, label)
    yield Text()
    yield _key("".join(lane.cells(plan) for lane in lanes))


def _ruler(plan: Plan, part: slice) -> str:
    """Numbers of the steps, every fifth or tenth one."""
    first, numbers = plan.schedule.before, range(len(plan.steps))[part]
    apart = 5 if first + len(plan.steps) < 1000 else 10
    return "".join(f"{first + number}".ljust(apart)[: numbers[-1] + 1 - number] for number in numbers[::apart])


def _bars(plan: Plan, part: slice, label: int) -> Iterator[Text]:
    """Work of the steps and bytes that are held after them."""
    whole = plan.baseline_flops / len(plan.steps) or 1
    yield Text("work".ljust(label) + "".join(_level(step.flops / whole) for step in plan.steps[part]), FAINT)
    if plan.cache_bytes:
        held = [plan.held(i) / plan.cache_bytes for i in range(len(plan.steps))]
        yield Text("cache held".ljust(label) + "".join(map(_level, held[part])), FAINT)


def _level(share: float) -> str:
    return _LEVELS[min(int(share * len(_LEVELS)), len(_LEVELS) - 1)] if share > 0 else " "


def _key(used: str) -> Text:
    key = Text()
    for symbol, meaning in MEANING.items():
        if symbol in used:
            key.append("   " if key else "")
            key.append(symbol, STYLES[symbol])
            key.append(f" {meaning}")
    return key


def difference_lines(one: Plan, other: Plan, width: int) -> Iterator[Text]:
    """Lanes in which two plans of one model differ, one above the other, and the steps at which they do."""
    names = max(len(one.policy), len(other.policy)) + 4
    room = max((width - names) // 10 * 10, 10)
    alike: list[str] = []
    used = ""
    for (first, second), labels in _paired(one, other).items():
        if first == second:
            alike += labels
            continue
        yield Text(", ".join(labels), "bold")
        marks = "".join("^" if a != b else " " for a, b in zip(first, second, strict=True))
        for start in range(0, len(marks), room):
            part = slice(start, start + room)
            yield _cells(f"  {one.policy}".ljust(names), first[part])
            yield _cells(f"  {other.policy}".ljust(names), second[part])
            yield Text(" " * names + marks[part], BAD)
        used += first + second
    if alike:
        yield Text(f"the same in both: {', '.join(alike)}", FAINT)
    if used:
        yield _key(used)


def _paired(one: Plan, other: Plan) -> dict[tuple[str, str], list[str]]:
    """Labels of lanes by what both plans do there."""
    lanes = {lane.label: lane for plan in (other, one) for lane in make_lanes(plan)}
    pairs: dict[tuple[str, str], list[str]] = {}
    for lane in sorted(lanes.values(), key=lambda lane: lane.sites):
        pairs.setdefault((lane.cells(one), lane.cells(other)), []).append(lane.label)
    return pairs


def _cells(label: str, symbols: str) -> Text:
    line = Text(label)
    for symbol in symbols:
        line.append(symbol, STYLES[symbol])
    return line
