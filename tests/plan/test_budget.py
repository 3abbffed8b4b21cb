"""A memory budget: a plan that needs more is refused, or computes what saves the least, and says what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.analysis import ModelStructure
from dicompile.errors import CacheTooLarge
from dicompile.plan import CacheOptions, Plan, Policy, TimestepSchedule, make_plan
from dicompile.policies import FORA, DuCa, DuCaFlux, NoCache, TaylorSeer, TaylorSeerLite, ToCa, ToCaFlux, get_policy
from tests.capture.captured import structure
from tests.plan.test_planner import Simulation
from tests.plan.toys import FLOPS, TOKENS, toy

VALUE = 2 * TOKENS * 8 * 4
MIXED = toy([("self-attention", "cross-attention", "mlp"), ("self-attention", "mlp"), ("parallel",)], spans=True)
POLICIES: dict[str, Policy] = {
    "fora": FORA(interval=3), "toca": ToCa(grid_cell=0), "duca": DuCa(grid_cell=0), "taylorseer": TaylorSeer(),
    "taylorseer-lite": TaylorSeerLite(), "random": ToCa(score="random", grid_cell=0),
}  # fmt: skip


def planned(policy: Policy, budget: int | None, over: str = "degrade", found: ModelStructure = MIXED) -> Plan:
    return make_plan(found, policy, TimestepSchedule(20), CacheOptions(budget, over))


def labels(plan: Plan) -> list[str]:
    return [label for item in plan.dropped for label in item.labels]


@pytest.mark.parametrize("over", ["refuse", "degrade"])
def test_a_plan_that_fits_is_left_as_it_is(over: str) -> None:
    free = planned(FORA(interval=3), None)
    plan = planned(FORA(interval=3), free.cache_bytes, over)
    assert (plan.steps, plan.dropped, plan.drops()) == (free.steps, (), "")


def test_a_plan_that_does_not_fit_is_refused_with_what_it_needs_and_what_would_fit() -> None:
    with pytest.raises(CacheTooLarge) as caught:
        planned(FORA(interval=3), 4 * VALUE, "refuse")
    assert str(caught.value) == (
        "policy 'fora-3' needs a cache of 6.00 KiB, but only 4.00 KiB are allowed\n"
        "  where: plan of 20 steps, for one guidance context\n"
        "  why:   after step 2 it holds 2 x value of mlp (1.00 KiB each), "
        "2 x value of self-attention (1.00 KiB each), 1 x value of cross-attention (1.00 KiB each)\n"
        "  fix:   max_cache_bytes=6144, or cache_dtype='bfloat16' (needs 3.00 KiB), "
        "or over_budget='degrade' (1.94x fewer FLOPs instead of 2.32x)"
    )


def test_the_error_names_a_dtype_only_if_everything_fits_in_it() -> None:
    with pytest.raises(CacheTooLarge) as caught:
        planned(FORA(interval=3), 2 * VALUE + VALUE // 4, "refuse")
    assert "cache_dtype='float8_e4m3fn'" in caught.value.fix
    with pytest.raises(CacheTooLarge) as caught:
        planned(FORA(interval=3), 1, "refuse")
    assert "cache_dtype" not in caught.value.fix


def test_what_saves_least_per_byte_goes_first() -> None:
    assert min(FLOPS, key=FLOPS.__getitem__) == "cross-attention"
    assert labels(planned(FORA(interval=3), 5 * VALUE)) == ["0.cross-attention"]
    assert labels(planned(FORA(interval=3), 4 * VALUE)) == ["0.self-attention", "0.cross-attention"]
    assert labels(planned(FORA(interval=3), VALUE)) == [
        "0.self-attention", "0.cross-attention", "0.mlp", "1.self-attention", "1.mlp",
    ]  # fmt: skip


def test_a_dropped_site_is_computed_at_every_step_and_the_others_as_before() -> None:
    free, plan = planned(FORA(interval=3), None), planned(FORA(interval=3), 5 * VALUE)
    (dropped,) = plan.dropped
    for before, after in zip(free.steps, plan.steps, strict=True):
        for i, (was, now) in enumerate(zip(before.sites, after.sites, strict=True)):
            assert now.action.is_full if i in dropped.sites else now.action == was.action
    assert dropped.bytes == VALUE
    reused = sum(not step.sites[dropped.sites[0]].action.computes for step in free.steps)
    assert plan.flops - free.flops == dropped.flops == FLOPS["cross-attention"] * reused


def test_nothing_at_all_may_be_remembered() -> None:
    for policy in POLICIES.values():
        plan = planned(policy, 0)
        assert plan.cache_bytes == 0
        assert plan.slots == ()
        assert plan.flops == plan.baseline_flops
    assert planned(NoCache(), 0, "refuse").dropped == ()


@pytest.mark.parametrize("name", POLICIES)
@given(share=st.floats(0, 1))
@settings(deadline=None, max_examples=8)
def test_a_degraded_plan_fits_reads_what_was_written_and_costs_at_least_as_much(name: str, share: float) -> None:
    free = planned(POLICIES[name], None)
    budget = int(free.cache_bytes * share)
    plan = planned(POLICIES[name], budget)
    assert plan.cache_bytes <= budget
    assert free.flops <= plan.flops <= plan.baseline_flops
    assert (plan.wanted_bytes, plan.wanted_flops) == ((free.cache_bytes, free.flops) if plan.dropped else (0, 0))
    simulation = Simulation(MIXED)
    for number, step in enumerate(plan.steps):
        simulation.run(number, step)


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
@pytest.mark.parametrize("policy", ["fora", "toca", "duca", "taylorseer"])
def test_real_models_degrade_too(name: str, policy: str) -> None:
    found, schedule = structure(name), TimestepSchedule(12)
    free = make_plan(found, get_policy(policy), schedule)
    last = free.flops
    for share in (0.9, 0.5, 0.1):
        plan = make_plan(found, get_policy(policy), schedule, CacheOptions(int(free.cache_bytes * share), "degrade"))
        assert plan.cache_bytes <= free.cache_bytes * share
        assert last <= plan.flops
        last = plan.flops


def test_sites_that_share_an_attention_go_together() -> None:
    found = structure("flux")
    free = make_plan(found, ToCaFlux(), TimestepSchedule(20))
    plan = make_plan(found, ToCaFlux(), TimestepSchedule(20), CacheOptions(free.cache_bytes - 1, "degrade"))
    dropped = [item for item in plan.dropped if "joint-attention" in item.labels[0]]
    assert dropped
    for item in dropped:
        first, second = (found.sites[i] for i in item.sites)
        assert first.attention == second.attention
        assert first.stream != second.stream


def test_the_spans_of_all_streams_go_together_and_the_blocks_then_run() -> None:
    found = structure("flux")
    policy = DuCaFlux(aggressive="stream")
    free = make_plan(found, policy, TimestepSchedule(20))
    plan = make_plan(found, policy, TimestepSchedule(20), CacheOptions(0, "degrade"))
    assert any(site.action.is_skip for step in free.steps for site in step.sites)
    assert not any(site.action.is_skip for step in plan.steps for site in step.sites)
    (stack,) = [item for item in plan.dropped if "stack" in item.labels[0]]
    assert len(stack.sites) == sum(span.kind.value == "stack" for span in found.spans) > 1


def test_a_site_that_ranks_by_the_score_of_a_dropped_one_reads_the_fresh_score() -> None:
    found = toy([("self-attention", "mlp")])
    rules: dict[str, Any] = {"name": "mine", "cadence": {"interval": 4}}
    refresh = {"do": {"do": "refresh", "ratio": 0.5, "score": {"base": "attention"}}, "sites": ["mlp"]}
    policy = Policy.from_dict({**rules, "rules": [refresh, {"do": {"do": "reuse"}}]})
    plan = make_plan(found, policy, TimestepSchedule(9), CacheOptions(VALUE + 300, "degrade"))
    assert labels(plan) == ["0.self-attention"]
    for step in plan.steps:
        attention, mlp = step.sites
        assert attention.action.is_full
        assert (attention.score is not None) == (mlp.source is not None)
    assert not any(slot.kind.value == "score" for slot in plan.slots)


def test_the_plan_tells_what_it_dropped() -> None:
    plan = planned(FORA(interval=3), VALUE)
    text = (
        "dropped, as 1.00 KiB do not hold 6.00 KiB: self-attention of blocks 0-1, cross-attention of block 0, "
        f"mlp of blocks 0-1; computing them at every step costs {(plan.flops - plan.wanted_flops) / 1e9:.3f} GFLOP more"
    )
    assert plan.drops() == text
    assert str(plan).splitlines()[1] == text
    assert planned(DuCa(grid_cell=0), 0).drops().startswith("dropped, as 0 bytes do not hold")
    assert "the stack;" in planned(DuCa(grid_cell=0), 0).drops()
