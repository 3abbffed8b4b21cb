"""Make a plan fit its memory budget: refuse it, or compute what saves the fewest operations for the bytes it holds.

What is dropped is computed at every step, so nothing can dangle: the plan is made anew from the policy without it, and
reads, writes and liveness follow. Sites that share an attention are dropped together, since either of them has to run
it, and so are the spans of the stack, or of one block, on several streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from dicompile.analysis import ModelStructure, SiteKind
from dicompile.plan.cost import saving
from dicompile.plan.fits import is_within, too_large
from dicompile.plan.memory import DTYPES, CacheOptions
from dicompile.plan.plan import Dropped, Plan
from dicompile.text import size_text

PlanWithout = Callable[[frozenset[int], CacheOptions], Plan]
"""Plans a run that computes some sites and spans at every step."""

Group = tuple[int, ...]
"""Sites or spans that only make sense together."""


def fit_budget(structure: ModelStructure, plan_without: PlanWithout, cache: CacheOptions) -> Plan:
    """The plan that drops nothing, or as little as its budget asks for.

    Raises:
        CacheTooLarge: it needs more than the budget, and is not to be degraded.
    """
    plan = plan_without(frozenset(), cache)
    if is_within(plan):
        return plan
    degraded = _Degradation(structure, plan_without, plan).run()
    if cache.over_budget == "degrade":
        return degraded
    fewer = f"{degraded.flop_speedup:.2f}x fewer FLOPs instead of {plan.flop_speedup:.2f}x"
    raise too_large(structure, plan, [*_narrower(plan_without, cache), f"over_budget='degrade' ({fewer})"])


class _Degradation:
    """Drops groups of sites from a plan until it fits.

    Attributes:
        saved: operations of the run that each group saves.
        held: bytes that it holds at most.
    """

    def __init__(self, structure: ModelStructure, plan_without: PlanWithout, wanted: Plan) -> None:
        self.structure, self.plan_without, self.wanted = structure, plan_without, wanted
        self.budget = wanted.cache.max_bytes or 0
        groups = _groups(structure)
        self.saved = {group: _saved(structure, wanted, group) for group in groups}
        by_site = [_bytes_by_site(wanted, step) for step in range(len(wanted.steps))]
        self.held = {group: max(sum(held[i] for i in group) for held in by_site) for group in groups}

    def run(self) -> Plan:
        """Drop what saves the least per byte; then take back what turned out to have room."""
        plan, dropped = self.wanted, set[Group]()
        while plan.cache_bytes > self.budget:
            dropped |= self.least(plan)
            plan = self.plan(dropped)
        for group in sorted(dropped, key=lambda group: -self.saved[group] / max(self.held[group], 1)):
            if self.held[group] <= self.budget - plan.cache_bytes:
                larger = self.plan(dropped - {group})
                if larger.cache_bytes <= self.budget:
                    plan, dropped = larger, dropped - {group}
        told = tuple(
            Dropped(
                group,
                tuple(self.structure.everything[i].label for i in group),
                self.held[group],
                round(self.saved[group]),
            )
            for group in sorted(dropped)
        )
        return replace(plan, dropped=told, wanted_bytes=self.wanted.cache_bytes, wanted_flops=self.wanted.flops)

    def plan(self, dropped: Iterable[Group]) -> Plan:
        """The plan without some groups."""
        return self.plan_without(frozenset(i for group in dropped for i in group), self.wanted.cache)

    def least(self, plan: Plan) -> set[Group]:
        """Groups to drop so that the fullest step of `plan` fits."""
        held = _bytes_by_site(plan, plan.fullest)
        here = {group: size for group in self.saved if (size := sum(held[i] for i in group))}
        excess, chosen = plan.cache_bytes - self.budget, set()
        for group in sorted(here, key=lambda group: self.saved[group] / here[group]):
            if excess > 0:
                chosen.add(group)
                excess -= here[group]
        return chosen


def _groups(structure: ModelStructure) -> list[Group]:
    together: dict[object, list[int]] = {}
    for site in structure.everything:
        key: object = site.attention or int(site.id)
        if site.kind.is_span:
            # Without the probe of a gate, nothing is recalled.
            key = SiteKind.STACK if site.kind is not SiteKind.BLOCK else (site.kind, site.block)
        together.setdefault(key, []).append(int(site.id))
    return [tuple(sites) for sites in together.values()]


def _saved(structure: ModelStructure, plan: Plan, group: Group) -> float:
    return sum(saving(structure.everything[i], step.sites[i].action)[0] for step in plan.steps for i in group)


def _bytes_by_site(plan: Plan, step: int) -> Counter[int]:
    held: Counter[int] = Counter()
    for slot in plan.steps[step].live:
        held[int(slot.site)] += plan.slot_bytes[slot]
    return held


def _narrower(plan_without: PlanWithout, cache: CacheOptions) -> list[str]:
    """The dtype with most bits in which everything fits, as a fix."""
    for name in sorted(DTYPES, key=lambda name: -DTYPES[name].itemsize):
        plan = plan_without(frozenset(), replace(cache, dtype=name))
        if is_within(plan):
            return [f"cache_dtype={name!r} (needs {size_text(plan.cache_bytes)})"]
    return []
