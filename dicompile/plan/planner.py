"""From policy to plan: actions first, then, backwards through the run, which slots anybody will still read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dicompile.analysis import ModelStructure, Site
from dicompile.plan.action import COMPUTE, Action, Score, Slot, SlotKind
from dicompile.plan.plan import FLOPS_PER_BYTE, Plan, SiteStep, StepPlan, sites_by_block, slot_bytes
from dicompile.plan.policy import Policy, score_source
from dicompile.plan.schedule import TimestepSchedule

Row = tuple[Action, ...]


def make_plan(structure: ModelStructure, policy: Policy, schedule: TimestepSchedule) -> Plan:
    """Plan a run.

    Raises:
        PolicyDoesNotFit: see `Policy.check_fits`.
    """
    policy.check_fits(structure)
    return plan_actions(structure, _rows(structure, policy, schedule.steps), schedule, policy.name)


def plan_actions(structure: ModelStructure, rows: Sequence[Row], schedule: TimestepSchedule, name: str) -> Plan:
    """Plan a run from explicit actions: one row per step, one action per site.

    Raises:
        ValueError: a row has the wrong length.
    """
    if len(rows) != schedule.steps or any(len(row) != len(structure.sites) for row in rows):
        raise ValueError(f"{schedule.steps} rows of {len(structure.sites)} actions are needed")
    steps = _with_liveness(_with_reads(structure, rows))
    plan_steps = tuple(_with_cost(structure, StepPlan(_kind(sites), sites, live)) for sites, live in steps)
    all_slots = {slot for step in plan_steps for slot in step.live}
    return Plan(
        policy=name,
        schedule=schedule,
        steps=plan_steps,
        baseline_flops=structure.flops * schedule.steps,
        baseline_time=_baseline_time(structure) * schedule.steps,
        slot_bytes={slot: slot_bytes(structure, slot) for slot in all_slots},
        block_sites=sites_by_block(structure),
    )


def cold_step(structure: ModelStructure, plan: Plan, step: int) -> StepPlan:
    """The same step with everything computed, storing what later steps read: for a run that enters the schedule."""
    planned = plan.steps[step]
    wanted = {slot for slot in planned.live if slot.age == 0}
    bases = {
        int(site.source): _asked(site.action.tokens.score)
        for s in plan.steps
        for site in s.sites
        if site.source is not None and site.action.tokens is not None
    }
    sites = []
    for site in structure.sites:
        writes = tuple(slot for slot in sorted(wanted) if slot.site == site.id)
        scores = any(slot.kind is SlotKind.SCORE for slot in writes)
        compute = Action(what=planned.sites[site.id].action.what)
        sites.append(SiteStep(compute, writes=writes, score=bases.get(int(site.id)) if scores else None))
    return _with_cost(structure, StepPlan("cold", tuple(sites), planned.live))


def _rows(structure: ModelStructure, policy: Policy, steps: int) -> list[Row]:
    rows = []
    for step, (first, others) in enumerate(policy.cadence.full_steps(steps)):
        rows.append(
            tuple(
                COMPUTE
                if (first if site.block == 0 else others)
                else policy.action(site, structure.blocks[site.block].depth, step, steps)
                for site in structure.sites
            )
        )
    return rows


def _with_reads(structure: ModelStructure, rows: Sequence[Row]) -> list[tuple[SiteStep, ...]]:
    """Slots that every action reads and could write, before anybody asked whether they are needed."""
    clocks = [0] * len(structure.sites)
    result = []
    for row in rows:
        sources = _score_sources(structure, row)
        wanted = {int(source.id): score for source, score in sources.values()}
        steps = []
        for site, action in zip(structure.sites, row, strict=True):
            clocks[site.id] = 0 if action == COMPUTE else clocks[site.id]
            source = sources.get(int(site.id))
            steps.append(_site_step(site, action, clocks[site.id], source[0] if source else None))
            clocks[site.id] += action != COMPUTE
        result.append((tuple(steps), wanted))
    return _with_score_bases(result)


def _asked(score: Score) -> Score:
    """What a producer of scores has to know about their consumer."""
    return Score(score.base, share_guidance=score.share_guidance)


def _score_sources(structure: ModelStructure, row: Row) -> dict[int, tuple[Site, Score]]:
    sources = {}
    for site, action in zip(structure.sites, row, strict=True):
        if action.tokens is not None:
            source = score_source(structure, site, action.tokens.score.base)
            if source is not None:
                sources[int(site.id)] = (source, _asked(action.tokens.score))
    return sources


def _site_step(site: Site, action: Action, clock: int, source: Site | None) -> SiteStep:
    value, stamp = Slot.of(site.id, SlotKind.VALUE), Slot.of(site.id, SlotKind.STAMP)
    score = Slot.of(site.id, SlotKind.SCORE)
    if action.tokens is not None:
        reads = [value, stamp] if action.tokens.score.age_weight else [value]
        reads += [Slot.of(source.id, SlotKind.SCORE)] if source else []
        writes = [value, stamp] + ([score] if source is not None and source.id == site.id else [])
        return SiteStep(action, clock, tuple(reads), tuple(writes), source=source.id if source else None)
    reads = [Slot.of(site.id, SlotKind.VALUE, age) for age, weight in enumerate(action.weights[1:]) if weight]
    writes = [value, stamp, score] if action == COMPUTE else [value] if action.computes else []
    return SiteStep(action, clock, tuple(reads), tuple(writes))


def _with_score_bases(
    steps: Sequence[tuple[tuple[SiteStep, ...], dict[int, Score]]],
) -> list[tuple[SiteStep, ...]]:
    """Tell every computing attention site which score base the following steps will ask of it."""
    result: list[tuple[SiteStep, ...]] = []
    wanted: dict[int, Score] = {}
    for sites, asked in reversed(steps):
        wanted.update(asked)
        result.append(
            tuple(replace(site, score=wanted.get(i)) if _may_score(site) else site for i, site in enumerate(sites))
        )
    return result[::-1]


def _may_score(site: SiteStep) -> bool:
    """True if the site is computed whole and could deliver a score; a refreshed site updates its own rows itself."""
    return site.action == COMPUTE and any(slot.kind is SlotKind.SCORE for slot in site.writes)


def _with_liveness(steps: Sequence[tuple[SiteStep, ...]]) -> list[tuple[tuple[SiteStep, ...], frozenset[Slot]]]:
    """Keep only writes that are read later. Walks backwards, site by site, with the set of slots still wanted."""
    live: set[Slot] = set()
    result = []
    for sites in reversed(steps):
        after = frozenset(live)
        kept = []
        for number in range(len(sites) - 1, -1, -1):
            site, live = _live_site(sites[number], number, live)
            kept.append(site)
        result.append((tuple(kept[::-1]), after))
    return result[::-1]


def _live_site(site: SiteStep, number: int, live: set[Slot]) -> tuple[SiteStep, set[Slot]]:
    shifts = site.action.computes and site.action.tokens is None
    own = {slot for slot in live if slot.site == number and slot.kind is SlotKind.VALUE}
    history = max((slot.age for slot in own), default=0) if shifts else 0
    writes = tuple(slot for slot in site.writes if slot in live or (slot.kind is SlotKind.VALUE and shifts and own))
    live = live - set(writes)
    if shifts:
        live = (live - own) | {replace(slot, age=slot.age - 1) for slot in own if slot.age > 0}
    score = site.score if any(slot.kind is SlotKind.SCORE for slot in writes) else None
    # Stamping the chosen tokens starts from the stamps of the others, even where the score does not count ages.
    stamps = [slot for slot in writes if slot.kind is SlotKind.STAMP and site.action.tokens and slot not in site.reads]
    reads = (*site.reads, *stamps)
    return replace(site, reads=reads, writes=writes, history=history, score=score), live | set(reads)


def _kind(sites: Sequence[SiteStep]) -> str:
    symbols = {site.action.symbol for site in sites}
    if symbols <= {"F"}:
        return "full"
    if "F" in symbols:
        return "mixed"
    return "partial" if "t" in symbols else "reuse"


def _with_cost(structure: ModelStructure, step: StepPlan) -> StepPlan:
    flops, size, time = float(structure.flops), float(structure.bytes), _baseline_time(structure)
    for site, planned in zip(structure.sites, step.sites, strict=True):
        saved_flops, saved_bytes = _saving(site, planned.action)
        before = _roofline(site.flops, site.bytes)
        after = _roofline(site.flops - saved_flops, site.bytes - saved_bytes)
        flops, size, time = flops - saved_flops, size - saved_bytes, time - before + after
    return replace(step, flops=round(flops), bytes=round(size), time=time)


def _saving(site: Site, action: Action) -> tuple[float, float]:
    if not action.computes:
        return site.flops, site.bytes - min(site.core_bytes, site.bytes)
    if action.tokens is None:
        return 0.0, 0.0
    share = 1 - action.tokens.count / site.tokens.count
    return site.token_flops * share, site.bytes * share * (site.token_flops / site.flops if site.flops else 0)


def _baseline_time(structure: ModelStructure) -> float:
    inside = sum(_roofline(site.flops, site.bytes) for site in structure.sites)
    rest_flops = structure.flops - sum(site.flops for site in structure.sites)
    rest_bytes = structure.bytes - sum(site.bytes for site in structure.sites)
    return inside + _roofline(rest_flops, rest_bytes)


def _roofline(flops: float, size: float) -> float:
    return max(flops, size * FLOPS_PER_BYTE)
