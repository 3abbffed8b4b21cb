"""From policy to plan: actions first, then, backwards through the run, which slots anybody will still read."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dicompile.analysis import WHOLE, ModelStructure, Probe, Site, SiteId, SiteKind, TokenWise
from dicompile.plan.action import (
    COMPUTE,
    HISTORIC,
    SKIP,
    Action,
    Context,
    Score,
    ScoreBase,
    Selection,
    Slot,
    SlotKind,
    What,
)
from dicompile.plan.budget import fit_budget
from dicompile.plan.cost import baseline_time, with_adapters, with_check, with_cost, with_predictor
from dicompile.plan.fits import (
    check_stint,
    check_timesteps,
    choose_setting,
    named_by,
    reused_whole,
    score_source,
    unmatched_rules,
)
from dicompile.plan.gate import Gate
from dicompile.plan.memory import UNLIMITED, CacheOptions, slot_bytes, stored_value
from dicompile.plan.plan import Plan, SiteStep, StepPlan, replaced, sites_by_block
from dicompile.plan.recall import Aligned, DuringRun, Forecast, GatedRecall, Reuse, WeightedBands
from dicompile.plan.rows import Gated, Row, make_rows
from dicompile.plan.schedule import TimestepSchedule
from dicompile.plan.schema import Policy
from dicompile.plan.timing import FULL, MOST_STORED, Level, kind_name


def make_plan(
    structure: ModelStructure, policy: Policy, schedule: TimestepSchedule, cache: CacheOptions = UNLIMITED
) -> Plan:
    """Plan a run; the plan's name tells which setting of the policy the model got.

    Args:
        structure: the model.
        policy: the caching policy.
        schedule: the timesteps.
        cache: how much may be remembered, and in which numbers.

    Raises:
        PolicyDoesNotFit: see `choose_setting`, `check_stint`, `check_timesteps` and `make_rows`.
        CacheTooLarge: the plan needs more than `cache` allows, and is not to be degraded.
    """
    if policy.trunk not in (WHOLE, structure.trunk):
        raise ValueError(
            f"policy {policy.name!r} is for another trunk than the structure: analyse(capture, policy.trunk)"
        )
    policy, meant_for, note = choose_setting(policy, structure)
    check_stint(policy, schedule)
    check_timesteps(policy, schedule)

    def plan_without(dropped: frozenset[int], cache: CacheOptions) -> Plan:
        rows = make_rows(structure, policy, schedule.whole, dropped, schedule.numbers, schedule.timesteps)
        plan = plan_actions(structure, rows, schedule, policy.name, cache, policy.gate)
        whole = tuple((structure.everything[i].label, reason) for i, reason in reused_whole(structure, policy).items())
        ranked = (with_predictor(structure, step, policy.predictor_cost) for step in plan.steps)
        planned = tuple(with_adapters(structure, step, policy.adapters) for step in ranked)
        unmatched = unmatched_rules(structure, policy)
        return replace(
            plan,
            steps=planned,
            whole=whole,
            unmatched=unmatched,
            meant_for=meant_for,
            first_that_fits=note,
            recalls=_recalls(structure, policy, schedule) if plan.gate is not None else {},
        )

    return fit_budget(structure, plan_without, cache)


def plan_actions(
    structure: ModelStructure,
    rows: Sequence[Row | Gated],
    schedule: TimestepSchedule,
    name: str,
    cache: CacheOptions = UNLIMITED,
    gate: Gate | None = None,
) -> Plan:
    """Plan a run from explicit actions: one row per step, one action per site, and per span if there are any.

    The budget of `cache` is not looked at.

    Args:
        structure: the model.
        rows: the actions; where a gate decides, those of a step that recalls.
        schedule: the timesteps.
        name: of the policy.
        cache: in which numbers values are stored.
        gate: what decides, where something does.

    Raises:
        ValueError: a row has the wrong length.
    """
    rows = [
        (*row, *[COMPUTE] * len(structure.spans))
        if not isinstance(row, Gated) and len(row) == len(structure.sites)
        else row
        for row in rows
    ]
    if len(rows) != schedule.steps or any(len(row) != len(structure.everything) for row in _ways(rows)):
        raise ValueError(f"{schedule.steps} rows of {len(structure.sites)} actions are needed")
    whats = _whats(_ways(rows))
    if structure.probe is not None:
        is_update = structure.trunk.probe is Probe.RESIDUAL
        whats[structure.probe.id] = What.UPDATE if is_update else What.CORE
    if structure.trace is not None:
        whats[structure.trace.id] = What.UPDATE
    plan_steps = tuple(_plan_steps(structure, rows, whats, cache, gate))
    whole = structure.whole
    all_slots = {slot for step in plan_steps for slot in step.live}
    clusters = {i: site.score.clusters.count for step in plan_steps for i, site in enumerate(step.sites)
                if site.score is not None and site.score.clusters is not None}  # fmt: skip
    return Plan(
        policy=name,
        schedule=schedule,
        steps=plan_steps,
        baseline_flops=structure.flops * schedule.steps,
        baseline_time=baseline_time(structure) * schedule.steps,
        slot_bytes={
            slot: slot_bytes(
                structure.everything[slot.site],
                slot.kind,
                whats.get(slot.site, What.CORE),
                cache,
                clusters.get(slot.site, 0),
            )
            for slot in all_slots
        },
        block_sites=sites_by_block(structure),
        block_spans={
            int(block.sites[0]): tuple(
                int(s.id) for s in structure.spans if s.kind is SiteKind.BLOCK and s.block == block.id
            )
            for block in structure.blocks
        },
        stack=tuple(int(span.id) for span in structure.stack),
        model=() if whole is None else (int(whole.id),),
        labels=tuple(site.label for site in structure.everything),
        cache=cache,
        gate=gate if any(step.full is not None for step in plan_steps) else None,
        probe=None if structure.probe is None else structure.probe.id,
        trace=None if structure.trace is None else structure.trace.id,
    )


def _plan_steps(
    structure: ModelStructure,
    rows: Sequence[Row | Gated],
    whats: Mapping[int, What],
    cache: CacheOptions,
    gate: Gate | None,
) -> Iterator[StepPlan]:
    """Steps with reads, liveness and cost, whichever way a gate will decide."""
    recalled = _with_reads(structure, _with_whats(_ways(rows), whats))
    full: list[tuple[SiteStep, ...] | None] = [None] * len(rows)
    probe = structure.probe
    watched: tuple[Slot, ...] = ()
    pinned: tuple[Slot, ...] = ()
    if gate is not None:
        everything = _with_reads(structure, _with_whats([(COMPUTE,) * len(structure.everything)], whats))[0]
        full = [everything if isinstance(row, Gated) else None for row in rows]
        anchors = _anchors(structure, gate)
        pinned = anchors if gate.probe == "partner" else ()
        watched = (*([] if probe is None else [Slot.of(probe.id, SlotKind.VALUE)]), *anchors)
        recalled = [
            _anchored(sites, anchors, compares=number > 0 and not pinned) if otherwise is None
            else _watched(structure, sites, gate)
            for number, (sites, otherwise) in enumerate(zip(recalled, full, strict=True))
        ]  # fmt: skip
        full = [None if sites is None else _anchored(sites, anchors, compares=not pinned) for sites in full]
    found = _with_liveness(recalled, full, watched, pinned)
    for kept in found if gate is None else _written(found):
        scaled = _with_scales(structure, kept, whats, cache)
        step = StepPlan(_kind(scaled.sites, len(structure.sites)), scaled.sites, scaled.live)
        if scaled.full is None:
            yield with_cost(structure, step)
        else:
            otherwise = with_cost(structure, StepPlan("full", scaled.full, scaled.live))
            gated = with_cost(structure, replace(step, kind="gated", full=otherwise))
            last = structure.last if gate is not None and gate.verifies else None
            yield gated if last is None else with_check(structure, gated, last)


def _watched(structure: ModelStructure, sites: tuple[SiteStep, ...], gate: Gate) -> tuple[SiteStep, ...]:
    """The sites of a step that recalls, which stores nothing of what is watched but a probe for the next step."""
    if structure.probe is not None and gate.reference == "full":
        sites = replaced(sites, structure.probe.id, writes=())
    trace = structure.trace
    if trace is None:
        return sites
    needed = max((len(site.action.weights) - 1 for site in sites if site.action.is_aligned), default=0)
    reads = tuple(Slot.of(trace.id, SlotKind.VALUE, age) for age in range(needed))
    return (*sites[: trace.id], replace(sites[trace.id], reads=reads, writes=()), *sites[trace.id + 1 :])


def _anchors(structure: ModelStructure, gate: Gate) -> tuple[Slot, ...]:
    """Slots of what a gate compares from one full step to the next beside its probe, or of what partners read."""
    spans = [structure.probe, structure.whole] if gate.relative_to == "output" else []
    if gate.probe == "partner":
        spans = [structure.whole]
    return tuple(Slot.of(span.id, SlotKind.ANCHOR) for span in spans if span is not None)


def _anchored(sites: tuple[SiteStep, ...], anchors: Sequence[Slot], *, compares: bool) -> tuple[SiteStep, ...]:
    """The sites of a full step, which could write anchors, and may compare them with those of the one before it."""
    result = list(sites)
    for anchor in anchors:
        site = result[anchor.site]
        reads = (*site.reads, anchor) if compares else site.reads
        result[anchor.site] = replace(site, reads=reads, writes=(*site.writes, anchor))
    return tuple(result)


def _ways(rows: Sequence[Row | Gated]) -> list[Row]:
    """What every step does, a gated one where its gate recalls."""
    return [row.recalled if isinstance(row, Gated) else row for row in rows]


def _recalls(structure: ModelStructure, policy: Policy, schedule: TimestepSchedule) -> dict[int, GatedRecall]:
    """What stands in for every site and span of a gated policy, whose weights follow from the steps that ran."""
    recalls: dict[int, GatedRecall] = {}
    timesteps, begin = schedule.timesteps, schedule.numbers.start
    for rule in reversed(policy.rules):
        do = rule.do.during(timesteps, begin) if isinstance(rule.do, WeightedBands) else rule.do
        if isinstance(do, (Reuse, Forecast, Aligned, DuringRun)):
            recalls |= {int(site.id): do for site in named_by(rule, structure)}
    return recalls


def recording_plan(structure: ModelStructure, schedule: TimestepSchedule, cache: CacheOptions = UNLIMITED) -> Plan:
    """A plan of which every step computes everything and stores what it computed until the next step.

    Of sites the core is stored, of the stack its update; they are for whoever watches the run
    (`dicompile.runtime.Observer`).
    """
    sites = tuple(
        SiteStep(Action(what=What.UPDATE if site.kind.is_span else What.CORE), writes=_recorded(site))
        for site in structure.everything
    )
    live = frozenset(slot for site in sites for slot in site.writes)
    step = with_cost(structure, StepPlan("full", sites, live))
    plan = plan_actions(structure, [(COMPUTE,) * len(structure.sites)] * schedule.steps, schedule, "record", cache)
    size = {
        slot: slot_bytes(structure.everything[slot.site], slot.kind, sites[slot.site].action.what, cache)
        for slot in live
    }
    return replace(plan, steps=(step,) * schedule.steps, slot_bytes=size)


def reusing_plan(structure: ModelStructure, level: Level) -> Plan:
    """A plan of two steps, of which the second one reuses every site, or the stack, as `recording_plan` stores them.

    Args:
        structure: the model; for "stack" one with such spans.
        level: what is reused.
    """
    reused = Action((0.0, 1.0), _WHAT[level])
    rows = [(COMPUTE,) * len(structure.everything), _recalling(structure, level, reused)]
    return plan_actions(structure, rows, TimestepSchedule(2), level)


def timing_plan(structure: ModelStructure, schedule: TimestepSchedule, cache: CacheOptions = UNLIMITED) -> Plan:
    """A plan of which the steps are, in turns, of every kind that is measured; each is named after its kind.

    As many steps as values are stored at most compute everything; then every branch is recalled from all of them, from
    fewer, and from the last one, twice over; then the same with the stack.

    Args:
        structure: the model.
        schedule: the timesteps; after `TURN` of them every kind has come.
        cache: in which numbers values are stored.
    """
    levels: list[Level] = ["site", "stack"] if structure.stack else ["site"]
    turns = itertools.cycle([(level, stored) for level in levels for stored in _TURN])
    rows: list[Row] = []
    kinds: list[str] = []
    full: list[int] = []
    for step, (level, stored) in zip(range(schedule.steps), turns, strict=False):
        if stored:
            recalled = Forecast(order=stored - 1).action(full, step)
            rows.append(_recalling(structure, level, replace(recalled, what=_WHAT[level])))
        else:
            full.insert(0, step)
            rows.append((COMPUTE,) * len(structure.everything))
        kinds.append(kind_name(level, stored) if stored else FULL)
    plan = plan_actions(structure, rows, schedule, "measure", cache)
    return replace(plan, steps=tuple(replace(s, kind=kind) for s, kind in zip(plan.steps, kinds, strict=True)))


_TURN = (*[0] * MOST_STORED, *range(MOST_STORED, 0, -1), *range(MOST_STORED, 0, -1))
"""For each level: from how many stored values the steps recall, one after the other; 0 computes everything."""
_WHAT: dict[Level, What] = {"site": What.CORE, "stack": What.UPDATE}
"""What is stored of sites, and of the stack."""
TURN = len(_WHAT) * len(_TURN)
"""Steps of `timing_plan` after which it begins anew."""


def _recalling(structure: ModelStructure, level: Level, recalled: Action) -> Row:
    """A step at which every site, or the stack, does the same."""
    inside = {int(i) for span in structure.stack for i in span.inside}
    return tuple(
        recalled if site.kind.is_span == (level == "stack") and site.kind is not SiteKind.BLOCK
        else SKIP if level == "stack" and int(site.id) in inside
        else COMPUTE
        for site in structure.everything
    )  # fmt: skip


def _recorded(site: Site) -> tuple[Slot, ...]:
    return () if site.kind is SiteKind.BLOCK else (Slot.of(site.id, SlotKind.VALUE),)


def _whats(rows: Sequence[Row]) -> dict[int, What]:
    """Which value is stored of every site and span of which one is."""
    return {i: action.what for row in rows for i, action in enumerate(row) if len(action.weights) > 1}


def _with_whats(rows: Sequence[Row], whats: Mapping[int, What]) -> list[Row]:
    """Give computing actions the `What` of those that read their values."""

    def told(action: Action, what: What) -> Action:
        return replace(action, what=what) if action.is_full and action.what is not what else action

    return [tuple(told(action, whats.get(i, action.what)) for i, action in enumerate(row)) for row in rows]


def _with_reads(structure: ModelStructure, rows: Sequence[Row]) -> list[tuple[SiteStep, ...]]:
    """Slots that every action reads and could write, before anybody asked whether they are needed."""
    clocks = [0] * len(structure.everything)
    owners = [attention_owner(structure, site) for site in structure.everything]
    own = [_own_slots(site, owner) for site, owner in zip(structure.everything, owners, strict=True)]
    result = []
    for row in rows:
        sources = _score_sources(structure, row)
        wanted = {int(source.id): score for source, score in sources.values()}
        steps = []
        for site, action in zip(structure.everything, row, strict=True):
            clocks[site.id] = 0 if action.is_full else clocks[site.id]
            source = sources.get(int(site.id))
            owner = owners[site.id]
            runs = owner is not None and row[owner].is_full  # then its fresh attention is at hand
            clock = clocks[site.id]
            steps.append(_site_step(site, own[site.id], action, clock, source[0] if source else None, owner, runs))
            clocks[site.id] += not action.is_full and not action.is_skip
        result.append((tuple(steps), wanted))
    return _with_score_bases(result)


def _asked(score: Score) -> Score:
    """What a producer of scores has to know about their consumer."""
    clusters = score.clusters and replace(score.clusters, share=0.0)
    return Score(score.base, share_guidance=score.share_guidance, clusters=clusters)


def _score_sources(structure: ModelStructure, row: Row) -> dict[int, tuple[Site, Score]]:
    sources = {}
    for site, action in zip(structure.everything, row, strict=True):
        if action.tokens is not None:
            source = score_source(structure, site, action.tokens.score.base)
            if source is not None:
                sources[int(site.id)] = (source, _asked(action.tokens.score))
    return sources


class _Own(NamedTuple):
    """The newest slots of one site, made once and not at every step, and what computing it whole could write."""

    value: Slot
    stamp: Slot
    score: Slot
    attention: Slot
    all: tuple[Slot, ...]


def _own_slots(site: Site, owner: SiteId | None) -> _Own:
    value, stamp, score = (Slot.of(site.id, kind) for kind in (SlotKind.VALUE, SlotKind.STAMP, SlotKind.SCORE))
    attention = Slot.of(site.id if owner is None else owner, SlotKind.ATTENTION)
    written = (value, stamp, score, attention) if owner == site.id else (value, stamp, score)
    return _Own(value, stamp, score, attention, written)


def _site_step(
    site: Site,
    own: _Own,
    action: Action,
    clock: int,
    source: Site | None,
    owner: SiteId | None,
    owner_runs: bool,
) -> SiteStep:
    if action.is_full:
        return SiteStep(action, clock, (), own.all)
    kind = SlotKind.ATTENTION if action.what is What.ATTENTION else SlotKind.VALUE
    reads = [Slot.of(site.id, kind, age) for age, weight in enumerate(action.weights[1:]) if weight or action.clusters]
    if action.tokens is not None:
        values = reads[:] if action.clusters else [own.value] if action.refreshes_store else []
        reads += [own.stamp] if action.tokens.score.age_weight else []
        reads += [Slot.of(source.id, SlotKind.CLUSTER if action.clusters else SlotKind.SCORE)] if source else []
        reads += [own.attention] if _reads_attention(site, action.tokens) and not owner_runs else []
        own_rows = source is not None and source.id == site.id and action.tokens.score.base is ScoreBase.ENTROPY
        writes = [*values, own.stamp, *([own.score] if own_rows else [])]
    else:
        writes = [Slot.of(site.id, kind)] if action.computes else []
        reads = reads if kind is SlotKind.VALUE or owner == site.id else []
    return SiteStep(action, clock, tuple(reads), tuple(writes), source=source.id if source else None)


def attention_owner(structure: ModelStructure, site: Site) -> SiteId | None:
    """The first site with the same attention, which keeps its output for all of them; None without attention."""
    if len(site.attention) != 1:
        return None
    return next(s.id for s in structure.sites_of(structure.blocks[site.block]) if s.attention == site.attention)


def _reads_attention(site: Site, tokens: Selection) -> bool:
    """True if the refreshed tokens take their attention from a slot."""
    return bool(site.keys[1]) and site.tokens.wise is not TokenWise.YES and tokens.context is Context.STORED


def _with_score_bases(
    steps: Sequence[tuple[tuple[SiteStep, ...], dict[int, Score]]],
) -> list[tuple[SiteStep, ...]]:
    """Tell every computing site which score base, or clusters, the following steps will ask of it."""
    result: list[tuple[SiteStep, ...]] = []
    wanted: dict[int, Score] = {}
    for number, (sites, asked) in reversed(list(enumerate(steps))):
        wanted.update(asked)
        result.append(
            tuple(
                _scoring(i, site, wanted[i], is_first=number == 0) if i in wanted and _may_score(site) else site
                for i, site in enumerate(sites)
            )
        )
    return result[::-1]


def _scoring(number: int, site: SiteStep, score: Score, *, is_first: bool) -> SiteStep:
    """A computing site that delivers scores; clusters go on from those before them."""
    if score.clusters is None:
        return replace(site, score=score)
    label, mean = (Slot.of(SiteId(number), kind) for kind in (SlotKind.CLUSTER, SlotKind.CENTROID))
    reads = site.reads if is_first else (*site.reads, mean)  # at the first step everything is computed
    return replace(site, score=score, reads=reads, writes=(*site.writes, label, mean))


def _may_score(site: SiteStep) -> bool:
    """True if the site is computed whole and could deliver a score; a refreshed site updates its own rows itself."""
    return site.action.is_full and any(slot.kind is SlotKind.SCORE for slot in site.writes)


_SCORES = (SlotKind.SCORE, SlotKind.CLUSTER, SlotKind.CENTROID)


class _Kept(NamedTuple):
    """The sites of a step with what is wanted of them.

    Attributes:
        sites: of a gated step, as its gate recalls.
        live: what is kept after it.
        full: of a gated step, its sites where everything is computed.
    """

    sites: tuple[SiteStep, ...]
    live: frozenset[Slot]
    full: tuple[SiteStep, ...] | None = None


def _with_liveness(
    steps: Sequence[tuple[SiteStep, ...]],
    full: Sequence[tuple[SiteStep, ...] | None],
    watched: Sequence[Slot],
    pinned: Sequence[Slot],
) -> list[_Kept]:
    """Keep only writes that are read later. Walks backwards, site by site, with what is still wanted of each.

    Before a gated step, what is wanted whichever way its gate decides is, and so is what is watched. What others read
    is kept after every step.
    """
    live: dict[int, set[Slot]] = defaultdict(set)
    result = []
    for sites, otherwise in zip(reversed(steps), reversed(full), strict=True):
        for slot in pinned:
            live[slot.site].add(slot)
        after = frozenset(itertools.chain.from_iterable(live.values()))
        if otherwise is None:
            result.append(_Kept(_live_sites(sites, live), after))
            continue
        other = defaultdict(set, {site: set(slots) for site, slots in live.items()})
        result.append(_Kept(_live_sites(sites, live), after, _live_sites(otherwise, other)))
        for site, slots in other.items():
            live[site] |= slots
        for slot in watched:
            live[slot.site].add(slot)
    return result[::-1]


def _written(steps: Iterable[_Kept]) -> Iterator[_Kept]:
    """Steps that keep no more values than the steps until then can have stored, whichever way a gate decided."""
    before: set[Slot] = set()
    for step in steps:
        after = set(before)
        for sites in (step.sites, step.full or step.sites):
            after.update(slot for site in sites for slot in site.writes)
            moved = (slot for slot in before if slot.kind in HISTORIC and slot.age < sites[slot.site].history)
            after.update(replace(slot, age=slot.age + 1) for slot in moved)
        before = after & step.live
        yield step._replace(live=frozenset(before))


def _live_sites(sites: tuple[SiteStep, ...], live: dict[int, set[Slot]]) -> tuple[SiteStep, ...]:
    """The sites of a step with what is wanted of them; `live` is before it then what it was behind it."""
    return tuple([_live_site(sites[number], number, live) for number in range(len(sites) - 1, -1, -1)][::-1])


def _live_site(site: SiteStep, number: int, live: dict[int, set[Slot]]) -> SiteStep:
    """The site with what is wanted of it; `live` is before it then what it was behind it."""
    if not site.writes and site.action.tokens is None:  # it stores nothing: reused, forecast or skipped
        for slot in site.reads:
            live[slot.site].add(slot)
        return site
    if site.action.is_full and not live[number]:  # what it computes whole is its own, and nobody wants that
        return SiteStep(site.action, site.clock)
    shifts = site.action.computes and site.action.tokens is None
    stored = {slot.kind for slot in site.writes} & set(HISTORIC)  # a blend computes attention without storing it
    own = {slot for slot in live[number] if slot.kind in stored}
    history = max((slot.age for slot in own), default=0) if shifts else 0
    kept = {slot.kind for slot in own} if shifts else set()
    if any(slot.kind is SlotKind.ANCHOR and slot in live[number] for slot in site.writes):
        kept.add(SlotKind.VALUE)  # which it is a second name of
    writes = tuple(slot for slot in site.writes if slot in live[slot.site] or slot.kind in kept)
    for slot in writes:
        live[slot.site].discard(slot)
    if shifts:
        live[number] = (live[number] - own) | {replace(slot, age=slot.age - 1) for slot in own if slot.age > 0}
    score = site.score if any(slot.kind in _SCORES for slot in writes) else None
    # Stamping the chosen tokens starts from the stamps of the others, even where the score does not count ages.
    stamps = [slot for slot in writes if slot.kind is SlotKind.STAMP and site.action.tokens and slot not in site.reads]
    compared = (slot for slot in site.reads if slot.kind is not SlotKind.ANCHOR or slot in writes)
    needed = (slot for slot in compared if slot.kind is not SlotKind.CENTROID or score is not None)
    reads = (*needed, *stamps)
    for slot in reads:
        live[slot.site].add(slot)
    return SiteStep(site.action, site.clock, reads, writes, history, score, site.source)


def _with_scales(structure: ModelStructure, kept: _Kept, whats: Mapping[int, What], cache: CacheOptions) -> _Kept:
    """Beside every slot of values whose dtype has little range, the slot of their scales."""
    if cache.dtype is None:
        return kept

    def scaled(slots: Iterable[Slot]) -> Iterator[Slot]:
        for slot in slots:
            yield slot
            site = structure.everything[slot.site]
            if slot.kind.scale is not None:
                _, itemsize = stored_value(site, slot.kind, whats.get(slot.site, What.CORE))
                if cache.for_site(site).scales(itemsize):
                    yield replace(slot, kind_name=slot.kind.scale.value)

    def with_scales(sites: tuple[SiteStep, ...]) -> tuple[SiteStep, ...]:
        return tuple(
            replace(site, reads=tuple(scaled(site.reads)), writes=tuple(scaled(site.writes))) for site in sites
        )

    full = None if kept.full is None else with_scales(kept.full)
    return _Kept(with_scales(kept.sites), frozenset(scaled(kept.live)), full)


def _kind(sites: Sequence[SiteStep], leaves: int) -> str:
    spans = {site.action.symbol for site in sites[leaves:]} - {"F", "-"}
    symbols = {site.action.symbol for site in sites[:leaves]} | spans
    present = symbols - {"-"}
    if present <= {"F"} and "-" not in symbols:
        return "full"
    if "F" in present:
        return "mixed"
    if "t" in present:
        return "partial"
    if present & {"f", "b"}:
        return "forecast"
    return "skip" if "-" in symbols else "reuse"
