"""Plans with a gate: whichever way it decides, what a step reads was stored, and the counts hold."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.analysis import SiteKind, analyse
from dicompile.plan import (
    HISTORIC,
    Cadence,
    Forecast,
    Gate,
    Plan,
    Policy,
    Rule,
    Slot,
    StepPlan,
    TimestepSchedule,
    make_plan,
)
from tests.capture.captured import captured, structure

STEPS = 8


@functools.cache
def plan(
    name: str, order: int, warmup: int, reference: str = "full", longest: int | None = None, by: str = "probe"
) -> Plan:
    gate = Gate(reference=reference, relative_to=by, threshold=0.1, longest=longest, last=1)  # type: ignore[arg-type]
    policy = Policy(
        name="gated",
        cadence=Cadence(warmup=warmup, gate=gate),
        outside=(1, 0),
        rules=(Rule(sites=("stack",), do=Forecast(order=order, what="update")),),
    )
    return make_plan(analyse(captured(name), policy.trunk), policy, TimestepSchedule(STEPS))


def followed(made: Plan, decisions: list[bool]) -> list[StepPlan]:
    """The rows of a run in which the gate decides like this; true recalls."""
    rows = []
    for step, recalls in zip(made.steps, decisions, strict=True):
        rows.append(step if step.full is None or recalls else step.full)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["plain_dit", "flux"]),
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from(["full", "previous"]),
    st.sampled_from(["probe", "output"]),
    st.lists(st.booleans(), min_size=STEPS, max_size=STEPS),
)
def test_whichever_way_a_gate_decides_what_is_read_was_stored(
    name: str, order: int, warmup: int, reference: str, by: str, decisions: list[bool]
) -> None:
    made = plan(name, order, warmup, reference, None, by)
    probe = Slot(made.probe, "value")  # type: ignore[arg-type]
    anchors = [Slot(site, "anchor") for site in (made.probe, *made.model) if by == "output"]  # type: ignore[arg-type]
    held: dict[Slot, int] = {}
    full: list[int] = []
    for number, row in enumerate(followed(made, decisions)):
        if made.steps[number].full is not None:
            assert held[probe] == (number - 1 if reference == "previous" else full[0])
            assert [held[anchor] for anchor in anchors] == [full[0]] * len(anchors)
        for site in row.sites:
            for slot in site.reads:
                sooner = slot.age < len(full)  # or else a forecast has no weight for it, and no value
                assert held.get(slot) == (full[slot.age] if sooner else None), "age k is the k-th full step before"
        before, recalls = dict(held), row.full is not None
        for i, site in enumerate(row.sites):
            for slot in site.writes:
                for age in range(site.history if slot.kind in HISTORIC else 0, 0, -1):
                    if Slot(slot.site, slot.kind_name, age - 1) in before:
                        held[Slot(slot.site, slot.kind_name, age)] = before[Slot(slot.site, slot.kind_name, age - 1)]
                held[slot] = number
            assert not (recalls and site.writes and i != made.probe)
        held = {slot: step for slot, step in held.items() if slot in row.live}
        full = full if recalls else [number, *full]
        assert set(held) <= set(row.live), "bytes are those of either way"
        assert all(slot.age >= len(full) for slot in row.live - set(held)), "or less, where gates let less be stored"
        assert set(held) == set(row.live) or len(full) <= number


@given(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
def test_no_run_takes_less_than_the_plan_says_nor_more(decisions: list[bool]) -> None:
    made = plan("plain_dit", 0, 1)
    flops = sum(row.flops for row in followed(made, decisions))
    assert made.flops <= flops <= made.most_flops == made.baseline_flops


def test_its_limits_count_in_the_least_that_a_run_takes() -> None:
    free, limited = plan("plain_dit", 0, 1), plan("plain_dit", 0, 1, "full", 2)
    recalled = next(step for step in free.steps if step.full is not None)
    assert [step.full is not None for step in free.steps] == [False, *[True] * 6, False]
    assert free.flops == 2 * free.steps[0].flops + 6 * recalled.flops
    assert limited.flops == 4 * free.steps[0].flops + 4 * recalled.flops  # F..F..FF
    assert f"{free.flops / 1e9:.3f} to {free.most_flops / 1e9:.3f} GFLOP (at most " in free.summary()
    assert "gated steps do this where the probe has drifted little" in str(free)


def test_the_blocks_outside_of_the_stack_run_at_every_step() -> None:
    made = plan("plain_dit", 0, 1)
    recalled = made.steps[2]
    assert [site.action.symbol for site in recalled.sites[:6]] == ["F", "F", "-", "-", "-", "-"]
    assert recalled.kind == "gated"
    assert {slot.site for slot in recalled.live} == {made.probe, made.stack[0]}


def test_a_policy_without_its_trunk_is_a_mistake_of_the_caller() -> None:
    policy = Policy(name="x", cadence=Cadence(gate=Gate(threshold=0.1)), outside=(1, 0))
    with pytest.raises(ValueError, match=r"analyse\(capture, policy.trunk\)"):
        make_plan(structure("plain_dit"), policy, TimestepSchedule(4))


def test_a_probe_is_only_there_where_a_policy_asks_for_one() -> None:
    assert not any(span.kind is SiteKind.PROBE for span in structure("flux").spans)


@pytest.mark.parametrize(("drift", "expected"), [(0.0, 3.0), (1.0, 6.0), (2.0, 11.0)])
def test_a_drift_is_rescaled_by_a_polynomial_with_the_highest_power_first(drift: float, expected: float) -> None:
    assert Gate(threshold=1, rescale=(1, 2, 3)).rescaled(drift) == expected


def test_it_recalls_as_often_as_its_limits_allow() -> None:
    gated = [False, True, True, True, True, True, False, True]
    for limits, pattern in (({}, "01111101"), ({"longest": 2}, "01101101"), ({"longest": 1, "most": 2}, "01010000")):
        recalled = Gate(threshold=1, **limits).most_recalled(gated)  # type: ignore[arg-type]
        assert "".join(str(int(recalls)) for recalls in recalled) == pattern
