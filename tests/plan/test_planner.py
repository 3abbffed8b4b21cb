"""Liveness against brute force: the plan is simulated beside a run that remembers everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.analysis import ModelStructure, SiteId, SiteKind
from dicompile.plan import (
    COMPUTE,
    REUSE,
    SKIP,
    Action,
    Clusters,
    Context,
    Plan,
    Score,
    ScoreBase,
    Selection,
    SiteStep,
    Slot,
    SlotKind,
    StepPlan,
    TimestepSchedule,
    What,
    make_plan,
    plan_actions,
)
from dicompile.policies import FORA, DuCa, DuCaFlux, NoCache, TaylorSeer, TaylorSeerLite, ToCa, ToCaPixArt
from tests.plan.toys import TOKENS, toy

STRUCTURE = toy([("self-attention", "cross-attention", "mlp"), ("self-attention", "mlp"), ("parallel",)], spans=True)
LEAVES = len(STRUCTURE.sites)
VALUE, STAMP, SCORE, ATTENTION = SlotKind.VALUE, SlotKind.STAMP, SlotKind.SCORE, SlotKind.ATTENTION
CLUSTER, CENTROID = SlotKind.CLUSTER, SlotKind.CENTROID
FORECASTS = (Action((0.0, 2.0, -1.0)), Action((0.0, 3.0, -3.0, 1.0)))
BLEND = Action((0.5, 0.5))


def refresh(base: ScoreBase = ScoreBase.ATTENTION, age_weight: float = 0.25, count: int = 4) -> Action:
    clusters = Clusters(count, rounds=9, share=0.1) if base is ScoreBase.CLUSTER else None
    return Action.refresh(Selection(Score(base, age_weight=age_weight, clusters=clusters), count))


class Simulation:
    """A plan, run beside a run that remembers everything. Contents of slots are numbered as they are made."""

    def __init__(self, structure: ModelStructure) -> None:
        self.structure = structure
        self.everything: dict[Slot, int] = {}
        self.kept: dict[Slot, int] = {}
        self.made = 0
        self.last_read: dict[int, int] = {}
        self.written: list[tuple[Slot, int, int]] = []
        self.held: list[tuple[Slot, int, int]] = []
        self.delivered: dict[int, Score] = {}
        self.clocks = [0] * len(structure.everything)

    def run(self, number: int, planned: StepPlan) -> None:
        for i, step in enumerate(planned.sites):
            self.clocks[i] = 0 if step.action.is_full else self.clocks[i]
            assert step.clock == self.clocks[i], f"step {number}, site {i}"
            self.clocks[i] += not step.action.is_full and not step.action.is_skip
            self.read(number, i, step)
            self.write(number, i, step)
        self.kept = {slot: content for slot, content in self.kept.items() if slot in planned.live}
        assert set(self.kept) == set(planned.live), f"step {number} keeps slots that nobody wrote"
        self.held += [(slot, content, number) for slot, content in self.kept.items()]

    def read(self, number: int, site: int, step: SiteStep) -> None:
        wanted = needed(self.structure, site, step)
        if number and step.score is not None and step.score.clusters is not None:
            wanted.add(Slot.of(SiteId(site), CENTROID))
        assert set(step.reads) == wanted, f"step {number}, site {site}"
        for slot in step.reads:
            assert slot in self.kept, f"step {number}, site {site} reads {slot}, which is not there"
            assert self.kept[slot] == self.everything[slot], f"step {number}, site {site} reads an old {slot}"
            self.last_read[self.kept[slot]] = number
            if slot.kind in (SCORE, CLUSTER):
                assert step.action.tokens is not None
                assert self.delivered[int(slot.site)].base is step.action.tokens.score.base

    def write(self, number: int, site: int, step: SiteStep) -> None:
        fresh = self.fresh(site, step.action)
        assert set(step.writes) <= set(fresh)
        for slot in fresh:
            self.made += 1
            ages = slot.kind in (VALUE, ATTENTION) and step.action.tokens is None
            rebind(self.everything, slot, self.made, 9 if ages else 0)
            if slot in step.writes:
                rebind(self.kept, slot, self.made, step.history if ages else 0)
                self.written.append((slot, self.made, number))
                if slot.kind in (SCORE, CLUSTER) and step.action.is_full:
                    assert step.score is not None
                    self.delivered[int(slot.site)] = step.score

    def fresh(self, site: int, action: Action) -> list[Slot]:
        """Slots that an action gives a new content."""
        kinds: list[SlotKind] = []
        if action.is_full:
            kinds = [VALUE, STAMP, SCORE, CLUSTER, CENTROID]
            kinds += [ATTENTION] if owner(self.structure, site) == site else []
        elif action.tokens is not None:
            own_rows = action.tokens.score.base is ScoreBase.ENTROPY
            own_rows = own_rows and attention_of(self.structure, site, ScoreBase.ENTROPY) == site
            kinds = [STAMP] + [VALUE] * (len(action.weights) == 2) + [SCORE] * own_rows
        elif action.computes:
            kinds = [ATTENTION if action.what is What.ATTENTION else VALUE]
        older = range(1, len(action.weights) - 1) if action.clusters else ()
        kinds += [VALUE] if older else []
        own = self.structure.everything[site].id
        return [*(Slot.of(own, kind) for kind in kinds), *(Slot.of(own, VALUE, age) for age in older)]


def rebind(slots: dict[Slot, int], slot: Slot, content: int, ages: int) -> None:
    """Give a slot a new content; older values first move up, as far as `ages`."""
    for age in range(ages, 0, -1):
        younger = replace(slot, age=age - 1)
        if younger in slots:
            slots[replace(slot, age=age)] = slots[younger]
    slots[slot] = content


def needed(structure: ModelStructure, site: int, step: SiteStep) -> set[Slot]:
    """What an action cannot do without."""
    own, action = structure.everything[site].id, step.action
    kind = ATTENTION if action.what is What.ATTENTION else VALUE
    slots = {Slot.of(own, kind, age) for age, weight in enumerate(action.weights[1:]) if weight}
    if kind is ATTENTION and owner(structure, site) != site:
        return set()  # the owner replaces the attention for all
    if action.tokens is None:
        return slots
    if action.tokens.score.age_weight or Slot.of(own, STAMP) in step.writes:
        slots.add(Slot.of(own, STAMP))
    if structure.everything[site].kind is SiteKind.PARALLEL and action.tokens.context is Context.STORED:
        slots.add(Slot.of(SiteId(owner(structure, site)), ATTENTION))
    source = attention_of(structure, site, action.tokens.score.base)
    kind = CLUSTER if action.clusters else SCORE
    return slots if source is None else slots | {Slot.of(structure.sites[source].id, kind)}


def owner(structure: ModelStructure, site: int) -> int | None:
    """The first site with the same attention."""
    own = structure.everything[site]
    return next((int(s.id) for s in structure.sites if s.attention == own.attention), None) if own.attention else None


def attention_of(structure: ModelStructure, site: int, base: ScoreBase) -> int | None:
    if base in (ScoreBase.RANDOM, ScoreBase.NORM, ScoreBase.SIMILARITY, ScoreBase.PREDICTED):
        return None
    if base is ScoreBase.CLUSTER:
        alike = structure.everything[site].kind, structure.everything[site].stream, structure.everything[site].shape
        return next((int(s.id) for s in structure.sites[::-1] if (s.kind, s.stream, s.shape) == alike), None)
    kinds = [SiteKind.SELF_ATTENTION, SiteKind.JOINT_ATTENTION, SiteKind.PARALLEL]
    kinds = [SiteKind.CROSS_ATTENTION] if base is ScoreBase.ENTROPY else kinds
    own = structure.everything[site]
    block = structure.blocks[own.block]
    return next((int(s.id) for s in structure.sites_of(block) if s.kind in kinds and s.stream == own.stream), None)


def simulate(structure: ModelStructure, steps: Sequence[StepPlan]) -> None:
    """Run steps; fails if a read does not find the latest content, or if anything is kept or stored for nobody."""
    run = Simulation(structure)
    for number, planned_step in enumerate(steps):
        run.run(number, planned_step)
    for slot, content, number in run.written:
        assert content in run.last_read, f"step {number} writes {slot}, which nobody reads"
    for slot, content, number in run.held:
        assert run.last_read.get(content, -1) > number, f"{slot} is kept after step {number} for nobody"


def possible(structure: ModelStructure, site: int, stores: int, what: What, base: ScoreBase) -> list[Action]:
    """Actions that make sense for a site that stored `stores` values so far."""
    forecasts = [f for f in FORECASTS if len(f.weights) - 1 <= stores]
    actions = [COMPUTE, *(replace(action, what=what) for action in (REUSE, BLEND, *forecasts))]
    kind = structure.everything[site].kind
    is_scored = attention_of(structure, site, base) is not None or not base.needs_attention
    if kind is not SiteKind.SELF_ATTENTION and not kind.is_span and what is not What.ATTENTION and is_scored:
        refreshes = [refresh(base), refresh(base, age_weight=0.0)]
        actions += [replace(action, what=what) for action in refreshes]
        actions += [Action((1.0, *f.weights[1:]), what, refreshes[0].tokens) for f in forecasts]
    return actions


def whats(structure: ModelStructure, site: int) -> list[What]:
    """Values that a site could store."""
    own = structure.everything[site]
    if own.kind.is_span:
        return [What.UPDATE, What.STREAM]
    return [What.CORE, What.UPDATE] + [What.ATTENTION] * bool(own.attention)


@st.composite
def rows(draw: st.DrawFn, *, forecasts: bool = True) -> list[tuple[Action, ...]]:
    """Steps of leaves that do anything, and steps at which a span is reused and the leaves inside it are skipped."""
    base = draw(st.sampled_from(list(ScoreBase)))
    sites = range(len(STRUCTURE.everything))
    stored_as = [draw(st.sampled_from(whats(STRUCTURE, i))) for i in sites]
    stores = [1] * len(sites)
    result = [(COMPUTE,) * len(sites)]
    for _ in range(draw(st.integers(0, 9))):
        reused = draw(st.none() | st.sampled_from(STRUCTURE.spans))
        row = []
        for i in sites:
            choices = [
                a for a in possible(STRUCTURE, i, stores[i], stored_as[i], base) if forecasts or len(a.weights) <= 2
            ]
            if i >= LEAVES and (reused is None or i != reused.id):
                choices = [COMPUTE]
            elif i >= LEAVES:
                choices = [a for a in choices if not a.computes]
            elif reused is not None and i in reused.inside:
                choices = [SKIP]
            row.append(draw(st.sampled_from(choices)))
            stores[i] += row[-1].computes and row[-1].tokens is None
        result.append(tuple(row))
    return result


def planned(structure: ModelStructure, actions: Sequence[tuple[Action, ...]]) -> Plan:
    return plan_actions(structure, actions, TimestepSchedule(len(actions)), "test")


@settings(max_examples=120, deadline=None)
@given(rows())
def test_every_read_finds_the_latest_write_and_nothing_is_stored_or_kept_for_nobody(
    actions: list[tuple[Action, ...]],
) -> None:
    plan = planned(STRUCTURE, actions)
    simulate(STRUCTURE, plan.steps)
    assert plan.steps[-1].live == frozenset()
    assert plan.cache_bytes == max(sum(plan.slot_bytes[slot] for slot in step.live) for step in plan.steps)


@pytest.mark.parametrize("policy", [FORA(interval=3), ToCa(grid_cell=2), DuCa(grid_cell=0), TaylorSeer(interval=3)])
@pytest.mark.parametrize("begin", range(1, 12))
def test_a_run_that_enters_at_any_step_computes_there_and_reads_what_it_stored_itself(
    policy: object, begin: int
) -> None:
    plan = make_plan(STRUCTURE, policy, TimestepSchedule(12).rest(begin))  # type: ignore[arg-type]
    assert len(plan.steps) == 12 - begin
    assert all(site.action.is_full and not site.reads for site in plan.steps[0].sites)
    simulate(STRUCTURE, plan.steps)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (FORA(interval=3), 12),
        (ToCa(grid_cell=2), 50),
        (ToCa(score="random", grid_cell=0, decide="block"), 50),
        (ToCa(score="value-norm", age_weight=0.0), 20),
        (NoCache(), 5),
    ],
)
def test_published_policies_read_only_what_is_there(policy: object, steps: int) -> None:
    plan = make_plan(STRUCTURE, policy, TimestepSchedule(steps))  # type: ignore[arg-type]
    simulate(STRUCTURE, plan.steps)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (DuCa(decide="block", grid_cell=0), 50),
        (DuCa(aggressive="update", score="random", grid_cell=0), 20),
        (DuCaFlux(interval=4), 20),
        (TaylorSeer(interval=3, order=3), 20),
        (TaylorSeerLite(interval=3, what="stream"), 20),
    ],
)
def test_policies_with_spans_and_history_read_only_what_is_there(policy: object, steps: int) -> None:
    structure = toy([("self-attention", "mlp"), ("parallel",)], spans=True)
    plan = make_plan(structure, policy, TimestepSchedule(steps))  # type: ignore[arg-type]
    simulate(structure, plan.steps)
    assert plan.flops < plan.baseline_flops


def test_a_forecast_of_the_stack_holds_as_many_tensors_as_its_order_and_nothing_else() -> None:
    plan = make_plan(STRUCTURE, TaylorSeerLite(interval=3, order=2), TimestepSchedule(20))
    stack = STRUCTURE.spans[-1]
    assert [str(slot) for slot in plan.slots] == [f"value[{stack.id}]{age}" for age in ("", "-1", "-2")]
    assert plan.cache_bytes == 3 * stack.core_bytes


def test_a_skipped_step_costs_what_lies_outside_the_blocks() -> None:
    plan = make_plan(STRUCTURE, DuCa(grid_cell=0, decide="step"), TimestepSchedule(50))
    outside = STRUCTURE.flops - sum(site.flops for site in STRUCTURE.sites)
    skips = [step for step in plan.steps if step.kind == "skip"]
    assert len(skips) == 8
    assert [step.flops for step in skips] == [outside] * 8


def test_a_first_block_that_is_computed_and_thrown_away_is_paid_for() -> None:
    plan = make_plan(STRUCTURE, DuCa(grid_cell=0, decide="block"), TimestepSchedule(50))
    step = plan.steps[49 - 32]
    block = STRUCTURE.sites_of(STRUCTURE.blocks[0])
    assert [step.sites[site.id].action for site in block] == [COMPUTE] * 3
    assert step.sites[STRUCTURE.spans[-1].id].action.symbol == "."
    outside = STRUCTURE.flops - sum(site.flops for site in STRUCTURE.sites)
    assert step.flops == outside + sum(site.flops for site in block)


def test_values_outlive_the_steps_that_skip_them() -> None:
    structure = toy([("self-attention", "mlp")], spans=True)
    spans = (COMPUTE, COMPUTE)
    skip = (SKIP, SKIP, COMPUTE, Action(REUSE.weights, What.UPDATE))
    plan = planned(structure, [(COMPUTE, COMPUTE, *spans), skip, (REUSE, REUSE, *spans)])
    assert [sorted(map(str, step.live)) for step in plan.steps] == [
        ["value[0]", "value[1]", "value[3]"], ["value[0]", "value[1]"], [],
    ]  # fmt: skip
    assert [step.sites[0].clock for step in plan.steps] == [0, 0, 0]  # a skipped step ages no token


def test_a_blend_does_not_lose_the_attention_that_a_later_refresh_reads() -> None:
    structure = toy([("parallel",)])
    plan = planned(structure, [(COMPUTE,), (BLEND,), (refresh(ScoreBase.RANDOM),)])
    attention = Slot.of(structure.sites[0].id, ATTENTION)
    assert [attention in step.live for step in plan.steps] == [True, True, False]


def test_branches_of_one_attention_are_refreshed_with_what_the_first_of_them_stored() -> None:
    structure = toy([("parallel", "parallel")])
    first, second = structure.sites
    structure = replace(structure, sites=(first, replace(second, attention=first.attention)))
    tokens = refresh(ScoreBase.RANDOM, age_weight=0.0)
    plan = planned(structure, [(COMPUTE, COMPUTE), (tokens, tokens), (REUSE, tokens), (COMPUTE, tokens)])
    kept = Slot.of(first.id, ATTENTION)
    assert [[kept in site.reads for site in step.sites] for step in plan.steps] == [
        [False, False], [True, True], [False, True], [False, False],  # at last the attention runs itself
    ]  # fmt: skip
    assert [kept in step.live for step in plan.steps] == [True, True, False, False]
    assert Slot.of(second.id, ATTENTION) not in plan.slots


def test_toca_for_pixart_reads_only_what_is_there() -> None:
    structure = toy([("self-attention", "cross-attention", "mlp")] * 2)
    for decide in ("step", "block"):
        plan = make_plan(structure, ToCaPixArt(decide=decide), TimestepSchedule(20))  # type: ignore[arg-type]
        simulate(structure, plan.steps)


def test_no_cache_remembers_nothing() -> None:
    plan = make_plan(STRUCTURE, NoCache(), TimestepSchedule(4))
    assert plan.slots == ()
    assert all(site == SiteStep(COMPUTE) for step in plan.steps for site in step.sites)


def test_a_full_step_before_another_one_stores_nothing() -> None:
    plan = planned(toy([("mlp",)]), [(COMPUTE,), (COMPUTE,), (REUSE,), (REUSE,)])
    value = Slot.of(STRUCTURE.sites[0].id, VALUE)
    assert [step.sites[0].writes for step in plan.steps] == [(), (value,), (), ()]
    assert [sorted(step.live) for step in plan.steps] == [[], [value], [value], []]


def test_a_forecast_keeps_as_many_values_as_it_reads() -> None:
    plan = planned(toy([("mlp",)]), [(COMPUTE,), (COMPUTE,), (COMPUTE,), (FORECASTS[0],), (COMPUTE,)])
    assert [step.sites[0].history for step in plan.steps] == [0, 0, 1, 0, 0]
    assert [[str(slot) for slot in sorted(step.live)] for step in plan.steps] == [
        [],
        ["value[0]"],
        ["value[0]", "value[0]-1"],
        [],
        [],
    ]


def test_only_the_full_step_before_a_refresh_scores_its_attention() -> None:
    structure = toy([("self-attention", "mlp")])
    partial = (REUSE, refresh(ScoreBase.VALUE_NORM))
    plan = planned(structure, [(COMPUTE, COMPUTE)] * 2 + [partial] * 2 + [(COMPUTE, COMPUTE)] * 2)
    score = Score(ScoreBase.VALUE_NORM)
    assert [step.sites[0].score for step in plan.steps] == [None, score, None, None, None, None]
    assert [step.sites[1].source for step in plan.steps] == [None, None, 0, 0, None, None]


def test_attention_that_runs_in_the_same_step_scores_for_it() -> None:
    structure = toy([("self-attention", "mlp")])
    plan = planned(structure, [(COMPUTE, COMPUTE), (COMPUTE, refresh())])
    assert [step.sites[0].score for step in plan.steps] == [None, Score(ScoreBase.ATTENTION)]
    assert Slot.of(structure.sites[0].id, SCORE) not in plan.steps[0].live


def test_only_the_first_block_is_full_where_the_reference_code_decides_twice() -> None:
    structure = toy([("self-attention", "mlp")] * 3)
    plan = make_plan(structure, ToCa(decide="block"), TimestepSchedule(50))
    step = plan.steps[4]  # s = 45
    assert [site.action.symbol for site in step.sites] == ["F", "F", ".", ".", ".", "."]
    assert step.kind == "mixed"


@pytest.mark.parametrize("actions", [[], [(COMPUTE,)], [(COMPUTE, COMPUTE), (COMPUTE,)]])
def test_a_table_of_the_wrong_size_is_refused(actions: list[tuple[Action, ...]]) -> None:
    with pytest.raises(ValueError, match="2 rows of 2 actions are needed"):
        plan_actions(toy([("self-attention", "mlp")]), actions, TimestepSchedule(2), "test")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ((COMPUTE, COMPUTE), "full"),
        ((REUSE, REUSE), "reuse"),
        ((REUSE, refresh(count=TOKENS)), "partial"),
        ((REUSE, COMPUTE), "mixed"),
        ((FORECASTS[0], REUSE), "forecast"),
        ((SKIP, SKIP), "skip"),
        ((COMPUTE, SKIP), "mixed"),
    ],
)
def test_the_kind_of_a_step(row: tuple[Action, ...], kind: str) -> None:
    plan = planned(toy([("self-attention", "mlp")]), [(COMPUTE, COMPUTE), (COMPUTE, COMPUTE), row])
    assert [step.kind for step in plan.steps] == ["full", "full", kind]


def test_steps_that_differ_in_token_counts_and_clocks_only_share_a_program() -> None:
    structure = toy([("self-attention", "mlp")])
    rows = [
        (COMPUTE, COMPUTE),
        (REUSE, refresh(count=4)),
        (REUSE, refresh(count=5)),
        (REUSE, refresh()),
        (REUSE, REUSE),
    ]
    signatures = [step.signature for step in planned(structure, rows).steps]
    assert signatures[1] == signatures[2]
    assert len(set(signatures)) == 4  # the last refresh writes no stamp, since nobody reads it
