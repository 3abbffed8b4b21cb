"""Token counts, actions by rule, and what a policy says when a model cannot do what it asks for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.analysis import ModelStructure, TokenFact, TokenWise
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan import (
    COMPUTE,
    REUSE,
    Action,
    Cadence,
    Forecast,
    Line,
    Policy,
    Refresh,
    Reuse,
    Rule,
    Score,
    ScoreBase,
    Table,
    TimestepSchedule,
    TokenScore,
    make_plan,
    make_rows,
)
from dicompile.policies import PAB
from tests.plan.toys import TOKENS, toy

# Token counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "tokens", "count"),
    [
        (0.0, 256, 0),
        (1.0, 256, 256),
        (0.5, 7, 3),  # truncated, not rounded
        (0.07, 256, 17),
        (0.29, 100, 29),  # in double precision it would be 28
        (0.53, 100, 52),  # and here 53
        (0.999, 3, 2),
    ],
)
def test_the_number_of_tokens_is_the_ratio_in_single_precision_truncated(ratio: float, tokens: int, count: int) -> None:
    assert Refresh(ratio=ratio).count(0.5, (0, 1), tokens) == count
    assert int(torch.tensor(ratio, dtype=torch.float32).clamp(0, 1) * tokens) == count, "not what the reference does"


@pytest.mark.parametrize(("factor", "count"), [(-1.0, 0), (3.0, 16), (0.5, 4)])
def test_the_share_is_clamped_to_none_and_all(factor: float, count: int) -> None:
    assert Refresh(ratio=0.5, factor=factor).count(0.0, (0, 1), 16) == count


@pytest.mark.parametrize(
    ("s", "block", "ratio"),
    [
        (49, 0, 0.0),  # step factor 3 - 4 q is negative for s > 37
        (37, 0, 0.07 * (3 - 4 * 37 / 50) * 0.8 * 2.5),
        (20, 0, 0.07 * (3 - 4 * 20 / 50) * 0.8 * 2.5),
        (20, 27, 0.07 * (3 - 4 * 20 / 50) * 1.2 * 2.5),
        (1, 13, 0.07 * (3 - 4 / 50) * (0.8 + 0.4 * 13 / 27) * 2.5),
    ],
)
def test_toca_refreshes_the_published_share(s: int, block: int, ratio: float) -> None:
    refresh = Refresh(ratio=0.07, factor=2.5, by_step=Line(start=3, slope=-4), by_depth=Line(start=0.8, slope=0.4))
    assert refresh.count(s / 50, (block, 28), 256) == int(np.float32(ratio) * 256)


def test_depth_runs_from_the_first_to_the_last_block_unless_a_denominator_is_given() -> None:
    refresh = Refresh(ratio=1.0, by_depth=Line(start=0.0, slope=1.0))
    assert [refresh.count(0, (block, 5), 100) for block in range(5)] == [0, 25, 50, 75, 100]
    assert refresh.count(0, (0, 1), 100) == 0
    reference = refresh.model_copy(update={"depth_denominator": 10})
    assert [reference.count(0, (block, 5), 100) for block in range(5)] == [0, 10, 20, 30, 40]


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(-5, 5), st.floats(0, 1), st.integers(1, 40), st.integers(1, 5000))
def test_there_are_never_fewer_tokens_than_none_or_more_than_all(
    ratio: float, factor: float, q: float, blocks: int, tokens: int
) -> None:
    refresh = Refresh(ratio=ratio, factor=factor, by_step=Line(start=1.9, slope=-1.8), by_depth=Line(start=2, slope=-3))
    assert all(0 <= refresh.count(q, (block, blocks), tokens) <= tokens for block in range(blocks))


# Actions --------------------------------------------------------------------------------------------------------------


def policy(*rules: Rule, interval: int = 3) -> Policy:
    return Policy(name="mine", cadence=Cadence(interval=interval), rules=rules)


def actions_of(structure: ModelStructure, chosen: Policy, steps: int = 10) -> tuple[Action, ...]:
    """What the sites do at the third step, which is not full with intervals of 3 or 4."""
    return make_rows(structure, chosen, steps)[2]


def test_the_first_rule_that_names_the_kind_of_a_site_wins_and_a_site_without_rule_is_computed() -> None:
    structure = toy([("self-attention", "cross-attention", "mlp")])
    half = Refresh(ratio=0.5)
    chosen = policy(Rule(sites=("mlp",), do=half), Rule(sites=("mlp", "self-attention"), do=Reuse()))
    actions = actions_of(structure, chosen)
    assert actions[:2] == (REUSE, COMPUTE)
    assert actions[2].tokens is not None
    assert actions[2].tokens.count == TOKENS // 2


def test_a_rule_without_sites_names_them_all() -> None:
    structure = toy([("self-attention", "cross-attention", "mlp", "parallel", "joint-attention")])
    assert actions_of(structure, policy(Rule(do=Reuse()))) == (REUSE,) * 5


def test_refreshing_no_token_is_reusing() -> None:
    assert actions_of(toy([("mlp",)]), policy(Rule(do=Refresh(ratio=0.01)))) == (REUSE,)


def test_the_age_weight_of_a_score_is_per_interval() -> None:
    score = TokenScore(base="value-norm", age_weight=0.25, grid_cell=2, grid_bonus=0.6, share_guidance=True)
    (action,) = actions_of(toy([("mlp",)]), policy(Rule(do=Refresh(ratio=0.5, score=score)), interval=4))
    assert action.tokens is not None
    assert action.tokens.score == Score(ScoreBase.VALUE_NORM, 0.0625, 2, 0.6, True)


def test_the_step_factor_follows_the_direction_in_which_steps_are_counted() -> None:
    rule = Rule(do=Refresh(ratio=1.0, by_step=Line(start=0.0, slope=1.0)))
    (down,) = actions_of(toy([("mlp",)]), Policy(name="d", cadence=Cadence(interval=3), rules=(rule,)), 8)
    counting_up = Policy(name="u", cadence=Cadence(interval=3, counting="up"), rules=(rule,))
    (up,) = actions_of(toy([("mlp",)]), counting_up, 8)
    assert down.tokens is not None and up.tokens is not None
    assert (down.tokens.count, up.tokens.count) == (TOKENS * 5 // 8, TOKENS * 2 // 8)


# Fit ------------------------------------------------------------------------------------------------------------------

DIT = toy([("self-attention", "mlp")] * 2)
PIXART = toy([("self-attention", "cross-attention", "mlp")] * 2)


def refusal(structure: ModelStructure, *rules: Rule) -> str:
    with pytest.raises(PolicyDoesNotFit) as error:
        make_plan(structure, policy(*rules), TimestepSchedule(4))
    return str(error.value)


def on(kind: str, **score: object) -> Rule:
    return Rule(sites=(kind,), do=Refresh(ratio=0.5, score=TokenScore(**score)))  # type: ignore[arg-type]


def test_a_branch_that_mixes_tokens_cannot_be_refreshed() -> None:
    mixing = TokenFact(
        TokenWise.NO, 1, TOKENS, "aten.conv1d.default in blocks.0.conv is not known to keep tokens apart"
    )
    structure = replace(DIT, sites=(DIT.sites[0], replace(DIT.sites[1], tokens=mixing), *DIT.sites[2:]))
    assert refusal(structure, on("mlp")) == (
        "policy 'mine' refreshes single tokens, which this branch does not allow\n"
        "  where: site 1, blocks.0.mlp (mlp)\n"
        "  why:   aten.conv1d.default in blocks.0.conv is not known to keep tokens apart\n"
        "  fix:   set where_mixed='reuse' to reuse it whole, or use a policy that does, "
        "such as dicompile.FORA(interval=3)"
    )
    assert "site 0, blocks.0.self-attention" in refusal(DIT, on("self-attention", base="random"))


def test_a_score_needs_the_attention_it_comes_from() -> None:
    assert refusal(DIT, on("mlp", base="entropy")) == (
        "policy 'mine' ranks tokens by entropy, for which there is no cross-attention in the block\n"
        "  where: site 1, blocks.0.mlp (mlp)\n"
        "  why:   the block has self-attention, mlp\n"
        "  fix:   choose another score, for example score='random'"
    )
    among_ranks = replace(PIXART, sites=tuple(replace(site, ranks=2) for site in PIXART.sites))
    assert "every rank has other heads" in refusal(among_ranks, on("mlp", base="entropy"))
    assert "value-norm, for which there is no self-attention" in refusal(toy([("mlp",)]), on("mlp", base="value-norm"))


@pytest.mark.parametrize(
    ("grid", "cell", "why"),
    [
        ((2, 8), 4, "the token grid is 2x8"),
        (None, 2, "the token grid is unknown"),
        ((2, 4), 2, "the branch has 16 tokens, the token grid is 2x4"),  # text beside a picture
    ],
)
def test_the_grid_bonus_needs_a_grid_of_whole_cells_that_holds_the_tokens(
    grid: tuple[int, int] | None, cell: int, why: str
) -> None:
    structure = toy([("self-attention", "mlp")], grid=grid)
    assert refusal(structure, on("mlp", grid_cell=cell)) == (
        f"policy 'mine' gives a bonus per {cell}x{cell} cell of tokens\n"
        "  where: site 1, blocks.0.mlp (mlp)\n"
        f"  why:   {why}\n"
        "  fix:   set grid_cell=0 to switch the bonus off"
    )


def test_sharing_between_guidance_halves_needs_both_in_one_batch() -> None:
    assert refusal(toy([("self-attention", "mlp")], batch=3), on("mlp", share_guidance=True)) == (
        "policy 'mine' shares tokens between guidance halves, but the batch is 3\n"
        "  where: site 1, blocks.0.mlp (mlp)\n"
        "  why:   the two halves of classifier-free guidance must be in one batch\n"
        "  fix:   set share_guidance=False"
    )


def test_one_attention_cannot_deliver_two_scores() -> None:
    rules = on("cross-attention", base="attention"), on("mlp", base="value-norm")
    assert refusal(PIXART, *rules) == (
        "policy 'mine' asks two different scores of one attention\n"
        "  where: site 2, blocks.0.mlp (mlp)\n"
        "  why:   site 0 keeps one score per token: attention for site 1, value-norm for this one\n"
        "  fix:   rank both kinds of site by the same base, with the same share_guidance"
    )
    entropies = on("cross-attention", base="entropy", share_guidance=True), on("mlp", base="entropy")
    assert "two different scores" in refusal(PIXART, *entropies)


@pytest.mark.parametrize(
    "rules",
    [
        (on("mlp"), Rule(do=Reuse())),
        (on("cross-attention", base="entropy"), on("mlp", base="entropy")),
        (on("cross-attention", base="entropy"), on("mlp", base="attention")),
        (on("cross-attention", base="attention", share_guidance=True), on("mlp", base="attention")),
        (on("cross-attention", base="random"), on("mlp", base="value-norm", grid_cell=2)),
        (on("mlp", base="random", share_guidance=True, grid_cell=4),),
    ],
)
def test_what_a_model_can_do_is_not_refused(rules: tuple[Rule, ...]) -> None:
    assert len(make_plan(PIXART, policy(*rules), TimestepSchedule(4)).steps) == 4


SPANS = toy([("self-attention", "mlp")] * 2, spans=True)
MIXED = toy([("self-attention", "mlp"), ("parallel",)], spans=True)


def of(kind: str, do: object) -> Rule:
    return Rule(sites=(kind,), do=do)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["block", "stack"])
def test_a_model_without_spans_cannot_reuse_them(kind: str) -> None:
    assert refusal(DIT, of(kind, Reuse(what="update"))) == (
        f"policy 'mine' reuses a whole {kind}, but the model has none\n"
        "  where: analysis\n"
        "  why:   no two branches follow each other on one stream\n"
        "  fix:   use a policy that reuses single branches, such as dicompile.FORA(interval=3)"
    )


@pytest.mark.parametrize(
    ("structure", "rule", "text"),
    [
        (SPANS, of("stack", Reuse()), "stores the core of a stack, which has none"),
        (SPANS, of("block", Forecast(what="attention")), "stores the attention of a block, which has none"),
        (SPANS, of("mlp", Reuse(what="stream")), "stores the stream of a mlp, which has none"),
        (SPANS, of("mlp", Reuse(what="attention")), "stores the output of attention, but the branch has 0"),
        (SPANS, of("mlp", Refresh(ratio=0.5, otherwise=Reuse(what="stream"))), "stores the stream of a mlp"),
        (SPANS, of("mlp", Table(compute=(), otherwise=Forecast(what="stream"))), "stores the stream of a mlp"),
    ],
)
def test_a_value_that_a_site_does_not_have_cannot_be_stored(structure: ModelStructure, rule: Rule, text: str) -> None:
    assert text in refusal(structure, rule)


@pytest.mark.parametrize(
    ("structure", "kind", "number"), [(MIXED, "parallel", 2), (PIXART, "cross-attention", 1)], ids=["parallel", "cross"]
)
@pytest.mark.parametrize("recall", [Reuse(what="attention"), Forecast(what="attention")])
def test_single_tokens_have_no_place_in_a_stored_attention(
    structure: ModelStructure, kind: str, number: int, recall: Reuse | Forecast
) -> None:
    score = TokenScore(base="random", age_weight=0.0)
    site = structure.sites[number]
    assert refusal(structure, of(kind, Refresh(ratio=0.5, score=score, context="all", otherwise=recall))) == (
        "policy 'mine' refreshes single tokens of a branch of which it stores the output of attention\n"
        f"  where: site {number}, {site.name} ({kind})\n"
        f"  why:   from that, {site.attention[0]}, every token of the branch is computed anew: none is left to choose\n"
        "  fix:   store 'core' or 'update' beside Refresh, or recall the attention without it: Reuse(what='attention')"
    )
    assert make_plan(structure, policy(of(kind, recall)), TimestepSchedule(4))


def test_a_span_has_no_attention_to_store_and_a_stack_mixes_tokens() -> None:
    random = TokenScore(base="random", age_weight=0.0)
    stored = of("block", Refresh(ratio=0.5, score=random, otherwise=Reuse(what="update")))
    assert "  why:   a span stores no attention\n  fix:   set context='all' or 'kept'" in refusal(SPANS, stored)
    tokens = of("stack", Refresh(ratio=0.5, score=random, context="all", otherwise=Reuse(what="update")))
    assert "refreshes single tokens, which this span does not allow" in refusal(SPANS, tokens)


def test_a_predicted_score_needs_a_predictor() -> None:
    assert "ranks tokens by a predictor, but names none" in refusal(DIT, on("mlp", base="predicted"))


@pytest.mark.parametrize("context", ["stored", "all", "kept"])
def test_parallel_branches_are_refreshed_in_any_context(context: str) -> None:
    do = Refresh(ratio=0.5, context=context)  # type: ignore[arg-type]
    plan = make_plan(MIXED, policy(of("parallel", do)), TimestepSchedule(4))
    assert [step.sites[2].action.symbol for step in plan.steps] == list("FttF")


def test_cells_of_a_film_may_be_cut_off_at_its_edges() -> None:
    film = toy([("self-attention", "mlp")], grid=(2, 2, 4))
    assert len(make_plan(film, policy(on("mlp", grid_cell=3)), TimestepSchedule(4)).steps) == 4


def test_policies_are_refused_in_one_file_only() -> None:
    root = Path(__file__).resolve().parents[2]
    sources = [file for part in ("dicompile", "passes", "runtime") for file in (root / part).rglob("*.py")]
    refusing = [file for file in sources if re.search(r"raise PolicyDoesNotFit\(", file.read_text(encoding="utf-8"))]
    assert [file.relative_to(root) for file in refusing] == [Path("dicompile/plan/fits.py")]


def test_a_window_of_timesteps_asks_for_timesteps() -> None:
    structure = toy([("self-attention", "mlp")])
    with pytest.raises(PolicyDoesNotFit, match=r"between timesteps 100 and 850, and no timesteps are known") as caught:
        make_plan(structure, PAB(), TimestepSchedule(20))
    assert "schedule=scheduler" in str(caught.value)
    plan = make_plan(structure, PAB(), TimestepSchedule.of([1000.0 - 50 * step for step in range(20)]))
    assert [step.kind for step in plan.steps].count("mixed") == 7
