"""What a plan costs, what it holds, and how it prints."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dicompile.plan import (
    COMPUTE,
    REUSE,
    SKIP,
    Action,
    Plan,
    Score,
    ScoreBase,
    Selection,
    TimestepSchedule,
    What,
    make_plan,
    plan_actions,
)
from dicompile.plan.plan import FLOPS_PER_BYTE
from dicompile.policies import FORA, NoCache, ToCa
from tests.plan.toys import FLOPS, REST, SITE_BYTES, TOKENS, toy

BLOCKS = [("self-attention", "mlp")] * 3
STRUCTURE = toy(BLOCKS)
CALL = 3 * (FLOPS["self-attention"] + FLOPS["mlp"]) + REST
VALUE_BYTES = 2 * TOKENS * 8 * 4


def refresh(count: int, base: ScoreBase = ScoreBase.ATTENTION) -> Action:
    return Action.refresh(Selection(Score(base, age_weight=0.25), count))


def planned(*rows: tuple[Action, ...]) -> Plan:
    return plan_actions(STRUCTURE, rows, TimestepSchedule(len(rows)), "test")


FULL, REUSED = (COMPUTE,) * 6, (REUSE,) * 6


@pytest.mark.parametrize(("steps", "interval", "full"), [(10, 4, 4), (11, 3, 5), (50, 3, 18)])
def test_fora_pays_for_sites_on_full_steps_only(steps: int, interval: int, full: int) -> None:
    plan = make_plan(STRUCTURE, FORA(interval=interval), TimestepSchedule(steps))
    assert plan.flops == full * CALL + (steps - full) * REST
    assert plan.baseline_flops == steps * CALL
    assert plan.flop_speedup == pytest.approx(steps * CALL / (full * CALL + (steps - full) * REST))


def test_no_cache_costs_what_the_model_costs() -> None:
    plan = make_plan(STRUCTURE, NoCache(), TimestepSchedule(7))
    assert plan.flops == plan.baseline_flops == 7 * CALL
    assert plan.flop_speedup == plan.predicted_speedup == 1.0
    assert plan.cache_bytes == 0


@pytest.mark.parametrize("count", [1, 5, TOKENS])
def test_refreshed_tokens_cost_their_share_of_the_branch(count: int) -> None:
    row = (REUSE, refresh(count), REUSE, REUSE, REUSE, refresh(count, ScoreBase.RANDOM))
    step = planned(FULL, row).steps[1]
    assert step.flops == REST + round(2 * FLOPS["mlp"] * count / TOKENS)


SCORE = 48


def scored(kinds: str, *rows: tuple[Action, ...]) -> list[int]:
    """Operations of the scores of each step of a block of `kinds`, of which any score of all tokens takes `SCORE`."""
    structure = toy([tuple(kinds.split())])
    sites = tuple(replace(site, score_flops=SCORE, attention=site.attention and ("one",)) for site in structure.sites)
    with_scores = replace(structure, sites=sites)
    steps = plan_actions(with_scores, rows, TimestepSchedule(len(rows)), "test").steps
    free = plan_actions(structure, rows, TimestepSchedule(len(rows)), "test").steps
    assert [step.flops - step.score_flops for step in steps] == [step.flops for step in free]
    return [step.score_flops for step in steps]


def test_a_score_costs_the_steps_that_make_it_and_only_those_that_another_one_reads() -> None:
    full, by_attention = (COMPUTE,) * 2, (REUSE, refresh(4))
    assert scored("self-attention mlp", full, by_attention, full, full) == [SCORE, 0, 0, 0]
    by_norm = (REUSE, refresh(4, ScoreBase.VALUE_NORM))
    assert scored("self-attention mlp", full, by_norm) == [0, 0]


def test_rows_of_refreshed_tokens_are_scored_alone() -> None:
    by_entropy = (refresh(4, ScoreBase.ENTROPY), REUSE)
    assert scored("cross-attention mlp", (COMPUTE,) * 2, by_entropy, by_entropy) == [SCORE, SCORE * 4 // TOKENS, 0]


def test_one_attention_is_scored_once_for_both_of_its_streams() -> None:
    by_attention = (REUSE, REUSE, refresh(4), refresh(4))
    assert scored("joint-attention joint-attention mlp mlp", (COMPUTE,) * 4, by_attention) == [SCORE, 0]


def test_forecasts_cost_nothing_and_blends_cost_the_branch() -> None:
    forecast, blend = Action((0.0, 2.0, -1.0)), Action((0.5, 0.5))
    steps = planned(FULL, FULL, (forecast,) * 6, (REUSE, blend, *REUSED[2:])).steps
    assert [step.flops for step in steps[2:]] == [REST, REST + FLOPS["mlp"]]


def test_reused_branches_still_read_their_value() -> None:
    step = planned(FULL, REUSED).steps[1]
    assert step.bytes == STRUCTURE.bytes - 6 * (SITE_BYTES - VALUE_BYTES)


def test_the_predicted_time_is_a_roofline_per_site() -> None:
    full, reused = planned(FULL, REUSED).steps
    outside = 300 * FLOPS_PER_BYTE
    # A site of the toy takes longer to read than to compute; its stored value takes longer to read than nothing.
    assert full.time == 6 * SITE_BYTES * FLOPS_PER_BYTE + outside
    assert reused.time == 6 * VALUE_BYTES * FLOPS_PER_BYTE + outside
    heavy = replace(STRUCTURE, sites=tuple(replace(site, flops=10**7) for site in STRUCTURE.sites), flops=6 * 10**7)
    step = plan_actions(heavy, [FULL], TimestepSchedule(1), "heavy").steps[0]
    assert step.time == 6 * 10**7 + outside


def test_a_step_that_skips_the_stack_pays_for_nothing_in_it() -> None:
    structure = toy(BLOCKS, spans=True)
    stack = structure.spans[-1]
    modulated = replace(stack, flops=stack.flops + 100, bytes=stack.bytes + 200)  # what is in no site
    structure = replace(structure, spans=(*structure.spans[:-1], modulated))
    update = Action((0.0, 1.0), What.UPDATE)
    skipped = (*[SKIP] * 6, *[COMPUTE] * 3, update)
    full, step = plan_actions(structure, [(COMPUTE,) * 10, skipped], TimestepSchedule(2), "skip").steps
    assert step.flops == REST - 100
    assert step.bytes == full.bytes - 6 * SITE_BYTES - 200 + VALUE_BYTES
    assert step.time == step.bytes * FLOPS_PER_BYTE


def test_a_forecast_reads_every_value_that_it_takes() -> None:
    full, _, forecast = planned(FULL, FULL, (Action((0.0, 2.0, -1.0)),) * 6).steps
    assert full.bytes - forecast.bytes == 6 * (SITE_BYTES - 2 * VALUE_BYTES)


def test_the_cache_is_as_large_as_what_is_held_at_once() -> None:
    plan = make_plan(STRUCTURE, FORA(interval=3), TimestepSchedule(10))
    assert plan.cache_bytes == 6 * VALUE_BYTES
    assert [str(slot) for slot in plan.slots] == [f"value[{i}]" for i in range(6)]
    two = planned(FULL, FULL, (Action((0.0, 2.0, -1.0)),) * 6)
    assert two.cache_bytes == 2 * 6 * VALUE_BYTES
    assert len(two.slots) == 12


def test_stamps_and_scores_are_counted_with_four_bytes_a_token() -> None:
    row = (REUSE, refresh(4), *REUSED[2:])
    plan = planned(FULL, row, row)
    per_token = 2 * TOKENS * 4
    assert {str(slot): size for slot, size in plan.slot_bytes.items() if slot.site <= 1} == {
        "value[0]": VALUE_BYTES,
        "score[0]": per_token,
        "value[1]": VALUE_BYTES,
        "stamp[1]": per_token,
    }
    assert plan.cache_bytes == 6 * VALUE_BYTES + 2 * per_token


def test_the_text_has_one_line_per_step_with_one_letter_per_site() -> None:
    blend = Action((0.5, 0.5))
    plan = plan_actions(
        STRUCTURE,
        [FULL, (REUSE, refresh(4), REUSE, REUSE, COMPUTE, COMPUTE), (Action((0.0, 1.5)), *REUSED[1:5], blend)],
        TimestepSchedule.of([999.0, 500.0, 1.5]),
        "mine",
    )
    assert plan.grid().splitlines() == [
        "   0  999.00 full      100.0%  FF FF FF",
        "   1  500.00 mixed      42.1%  .t .. FF",  # (500 outside + 2000 / 4 + 3000) of 9500
        "   2    1.50 forecast   26.3%  f. .. .b",  # (500 outside + 2000) of 9500
    ]
    assert str(plan).splitlines()[2:] == plan.grid().splitlines()
    assert str(plan).splitlines()[1] == (
        "F computed   t some tokens   . reused   f forecast   b blended   - skipped, a span is reused"
    )


@pytest.mark.parametrize("policy", [FORA(interval=4), ToCa(), NoCache()])
def test_every_step_prints_in_every_plan(policy: object) -> None:
    plan = make_plan(STRUCTURE, policy, TimestepSchedule(50))  # type: ignore[arg-type]
    lines = plan.grid().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(50))
    assert all(re.search(r"  ([Ft.fb]{2} ){2}[Ft.fb]{2}$", line) for line in lines)


def test_the_summary_has_the_figures() -> None:
    plan = make_plan(STRUCTURE, FORA(interval=3), TimestepSchedule(10))
    assert plan.summary() == (
        f"fora-3: 10 steps (4 full, 6 reuse), {plan.flops / 1e9:.3f} GFLOP ({plan.flop_speedup:.2f}x fewer), "
        f"predicted {plan.predicted_speedup:.2f}x (FLOPs and bytes by roofline), "
        f"cache {plan.cache_bytes / 2**20:.2f} MiB in 6 slots"
    )
    assert str(plan).splitlines()[0] == plan.summary()


def test_equal_inputs_give_equal_plans() -> None:
    first, second = (make_plan(toy(BLOCKS), ToCa(), TimestepSchedule(50)) for _ in range(2))
    assert first == second
    assert str(first) == str(second)
