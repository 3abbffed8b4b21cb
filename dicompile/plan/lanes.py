"""A plan as a picture: like sites of adjacent blocks are one lane, steps run from left to right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dicompile.plan.plan import Plan, StepPlan
from dicompile.text import ranges_text

MEANING = {
    "F": "computed",
    "t": "some tokens computed",
    "b": "blended",
    "f": "forecast",
    ".": "reused",
    "-": "skipped, a span is reused",
    "*": "not the same in all blocks",
}
"""What the symbol of an action says; see `Action.symbol`."""


class Lane(NamedTuple):
    """Sites or spans that are drawn as one.

    Attributes:
        label: "0-18 mlp": blocks, and what it is.
        sites: their numbers.
        is_span: True for runs of sites, which leave everything to these where they do nothing themselves.
    """

    label: str
    sites: tuple[int, ...]
    is_span: bool = False

    def symbol(self, step: StepPlan) -> str:
        """What they do at a step, one of `MEANING`, or a space for a span that leaves it to its sites."""
        symbols = {step.sites[i].action.symbol for i in self.sites}
        symbol = symbols.pop() if len(symbols) == 1 else "*"
        return " " if self.is_span and symbol == "F" else symbol

    def cells(self, plan: Plan) -> str:
        """One symbol per step."""
        return "".join(map(self.symbol, plan.steps))


def make_lanes(plan: Plan, *, every_site: bool = False) -> tuple[Lane, ...]:
    """Lanes of a plan, from the first block to the last; spans only where they do something.

    Args:
        plan: the plan.
        every_site: give every site a lane of its own.
    """
    lanes: list[Lane] = []
    for run in _runs(plan, every_site):
        blocks, first = ranges_text(run), plan.block_sites[run[0]][0]
        lanes += _named(plan, blocks, list(zip(*(plan.block_sites[b] for b in run), strict=True)))
        spans = [plan.block_spans.get(plan.block_sites[b][0], ()) for b in run]
        if plan.block_spans.get(first):
            lanes += _spans(plan, Lane(f"{blocks} whole block", tuple(i for span in spans for i in span), is_span=True))
    for label, members in (("whole stack", plan.stack), ("whole model", plan.model)):
        lanes += _spans(plan, Lane(label, members, is_span=True))
    return tuple(lanes)


def _spans(plan: Plan, lane: Lane) -> list[Lane]:
    """The lane of spans, if they ever do anything."""
    return [lane] if lane.sites and lane.cells(plan).strip() else []


def _runs(plan: Plan, every_site: bool) -> list[list[int]]:
    """Adjacent blocks with the same kinds of site."""
    runs: list[list[int]] = []
    for block, sites in enumerate(plan.block_sites):
        if not sites:
            continue
        alike = runs and _kinds(plan, plan.block_sites[runs[-1][-1]]) == _kinds(plan, sites)
        if alike and not every_site:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _named(plan: Plan, blocks: str, columns: Sequence[tuple[int, ...]]) -> list[Lane]:
    """Lanes of one run; of several sites of a kind the later ones are numbered."""
    seen: Counter[str] = Counter()
    lanes = []
    for column in columns:
        (kind,) = _kinds(plan, column[:1])
        seen[kind] += 1
        lanes.append(Lane(f"{blocks} {kind}" + (f" {seen[kind]}" if seen[kind] > 1 else ""), column))
    return lanes


def _kinds(plan: Plan, sites: Sequence[int]) -> tuple[str, ...]:
    return tuple(plan.labels[i].partition(".")[2] or plan.labels[i] for i in sites)
