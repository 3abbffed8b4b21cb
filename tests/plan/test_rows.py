"""From policies to actions: published patterns of steps, tables, and spans that stand in for what is inside them."""

from __future__ import annotations

from collections import Counter

import pytest

from dicompile.analysis import ModelStructure
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan import (
    COMPUTE,
    REUSE,
    SKIP,
    Action,
    Cadence,
    Context,
    Fitted,
    Forecast,
    Policy,
    Refresh,
    Reuse,
    Rule,
    Table,
    TimestepSchedule,
    TokenScore,
    TokenTable,
    What,
    make_plan,
    make_rows,
)
from dicompile.policies import (
    DuCa,
    DuCaFlux,
    DuCaOpenSora,
    DuCaPixArt,
    TaylorSeer,
    TaylorSeerLite,
    ToCaFlux,
    ToCaOpenSora,
)
from tests.capture.captured import structure
from tests.plan.toys import TOKENS, toy

DIT = toy([("self-attention", "mlp")] * 3, spans=True)
PIXART = toy([("self-attention", "cross-attention", "mlp")] * 3, spans=True)
STEP = {("F", "F"): "F", (".", "."): "t", ("-", "-"): "a", ("F", "."): "F|t", ("F", "-"): "F|a"}
REUSED = {What.STREAM: Action((0.0, 1.0), What.STREAM), What.UPDATE: Action((0.0, 1.0), What.UPDATE)}


def kinds(found: ModelStructure, policy: Policy, steps: int) -> list[str]:
    """Per step, by the attention of the first two blocks: F full, t partial, a aggressive, F| only the first block."""
    first, second = (found.blocks[block].sites[0] for block in (0, 1))
    rows = make_rows(found, policy, steps)
    return [STEP[row[first].symbol, row[second].symbol] for row in rows]


def test_duca_on_dit_with_50_steps_repeats_the_reference_code() -> None:
    found = kinds(DIT, DuCa(decide="block"), 50)
    assert Counter(found) == {"F": 18, "t": 22, "a": 8, "F|t": 1, "F|a": 1}
    assert {kind: 49 - found.index(kind) for kind in ("F|t", "F|a")} == {"F|t": 45, "F|a": 32}
    assert set(found[50 - 20 :]) == {"F", "t"}  # with an interval of two there is no aggressive step


def test_duca_on_pixart_is_full_then_partial_then_aggressive() -> None:
    assert kinds(PIXART, DuCaPixArt(), 20) == (["F", "t", "a"] * 7)[:20]


def test_toca_on_open_sora_has_two_cycles() -> None:
    rows = make_rows(PIXART, ToCaOpenSora(), 30)
    full = {
        kind: [s for s, row in enumerate(rows) if row[i] == COMPUTE] for i, kind in enumerate(("attn", "cross", "mlp"))
    }
    assert full["attn"] == full["mlp"] == [0, 1, 2, *range(3, 30, 3)]
    assert full["cross"] == [0, 1, 2, *range(6, 30, 6)]
    assert (len(full["attn"]), len(full["cross"])) == (12, 7)
    assert all(row[2].symbol == "t" for s, row in enumerate(rows) if s not in full["mlp"])


def test_duca_on_open_sora_has_as_many_partial_as_aggressive_steps() -> None:
    rows = make_rows(PIXART, DuCaOpenSora(), 30)
    assert Counter("".join(row[i].symbol for i in range(3)) for row in rows) == {
        "FFF": 7, "F.F": 5, "..t": 9, "---": 9,
    }  # fmt: skip


@pytest.mark.parametrize(("interval", "ratio", "full"), [(4, 0.2, 14), (5, 0.2, 12), (6, 0.2, 10), (3, 0.0, 17)])
def test_toca_on_flux_counts_from_the_last_full_step(interval: int, ratio: float, full: int) -> None:
    rows = make_rows(toy([("joint-attention", "mlp"), ("parallel",)]), ToCaFlux(interval, ratio), 50)
    assert sum(all(action == COMPUTE for action in row) for row in rows) == full
    between = next(row for row in rows if row[0] != COMPUTE)
    assert between[0] == Action((0.0, 1.0), What.ATTENTION)
    assert [action.symbol for action in between[1:]] == (["t", "t"] if ratio else [".", "."])


@pytest.mark.parametrize("aggressive", ["stream", "update"])
def test_an_aggressive_step_reuses_the_stack_and_skips_all_inside(aggressive: str) -> None:
    what = What(aggressive)
    rows = make_rows(DIT, DuCa(aggressive=aggressive), 50)  # type: ignore[arg-type]
    skipping = [row for row in rows if row[0] == SKIP]
    assert len(skipping) == 8
    for row in skipping:
        assert row[:6] == (SKIP,) * 6
        assert row[6:9] == (COMPUTE,) * 3
        assert row[9] == REUSED[what]


def test_of_a_reused_stream_only_what_the_output_reads_is_remembered() -> None:
    """FLUX has three stacks, of which the joined one comes last; their updates are needed from the first on."""
    found = structure("flux")
    stacks = [site for site in found.spans if site.kind.value == "stack"]
    assert [site.is_last for site in stacks] == [False, False, True]
    for what, first in (("stream", SKIP), ("update", REUSED[What.UPDATE])):
        rows = make_rows(found, DuCaFlux(aggressive=what), 20)  # type: ignore[arg-type]
        row = next(row for row in rows if row[0] == SKIP)
        assert set(row[: len(found.sites)]) == {SKIP}
        assert [row[site.id] for site in stacks] == [first, first, REUSED[What(what)]]


def test_a_reused_block_skips_its_own_sites_only() -> None:
    skip = Rule(sites=("block",), do=Reuse(what="update"))
    rows = make_rows(DIT, Policy(name="mine", cadence=Cadence(interval=2), rules=(skip,)), 4)
    assert rows[2] == (SKIP,) * 6 + (REUSED[What.UPDATE],) * 3 + (COMPUTE,)
    table = Table(compute=((True,) * 3, (True, False, True)), otherwise=Reuse(what="stream"))
    rows = make_rows(DIT, Policy(name="mine", rules=(Rule(sites=("block",), do=table),)), 2)
    assert rows[1][:6] == (COMPUTE, COMPUTE, SKIP, SKIP, COMPUTE, COMPUTE)
    assert rows[1][6:9] == (COMPUTE, REUSED[What.STREAM], COMPUTE), "the block behind it reads it"


def test_of_blocks_that_recall_their_streams_the_last_one_is_read() -> None:
    rule = Rule(sites=("block",), do=Reuse(what="stream"))
    rows = make_rows(DIT, Policy(name="mine", cadence=Cadence(interval=2), rules=(rule,)), 4)
    assert rows[2] == (SKIP,) * 8 + (REUSED[What.STREAM], COMPUTE)
    rows = make_rows(DIT, Policy(name="mine", cadence=Cadence(interval=2), rules=(rule,), outside=(0, 1)), 4)
    assert rows[2] == ((SKIP,) * 4 + (COMPUTE,) * 2 + (SKIP, REUSED[What.STREAM], COMPUTE, COMPUTE))


def test_tokens_of_a_block_are_refreshed_as_one() -> None:
    tokens = TokenTable(counts=((TOKENS,) * 3, (4, 0, TOKENS)), context="kept")
    first, second = make_rows(DIT, Policy(name="mine", rules=(Rule(sites=("block",), do=tokens),)), 2)
    assert first == (COMPUTE,) * 10
    assert second[:6] == (SKIP,) * 4 + (COMPUTE,) * 2
    chosen = second[6].tokens
    assert chosen is not None
    assert (second[6].what, chosen.count, chosen.context) == (What.UPDATE, 4, Context.KEPT)
    assert second[7:] == (REUSED[What.UPDATE], COMPUTE, COMPUTE)


# Forecasts ------------------------------------------------------------------------------------------------------------


def test_taylorseer_builds_up_its_order_one_per_full_step() -> None:
    rows = make_rows(toy([("mlp",)]), TaylorSeer(interval=3, order=2, warmup=1), 12)
    assert [len(row[0].weights) for row in rows] == [1, 2, 2, 1, 3, 3, 1, 4, 4, 1, 4, 4]
    assert rows[1][0] == REUSE
    assert rows[4][0].weights == pytest.approx((0.0, 4 / 3, -1 / 3))


def test_the_lite_form_forecasts_the_stack_alone() -> None:
    rows = make_rows(DIT, TaylorSeerLite(interval=3, order=1, warmup=2), 8)
    assert [row[9].symbol for row in rows] == list("FFffFffF")
    assert all(row[:6] == (SKIP,) * 6 for row in rows if row[9].symbol == "f")


def test_a_refresh_beside_a_forecast_has_fresh_tokens_and_a_history_of_full_steps() -> None:
    do = Refresh(ratio=0.5, score=TokenScore(base="random"), otherwise=Forecast(order=1))
    rows = make_rows(
        toy([("mlp",)]), Policy(name="mine", cadence=Cadence(interval=2, counting="up"), rules=(Rule(do=do),)), 6
    )
    assert [row[0].symbol for row in rows] == list("FtFtFt")
    assert rows[5][0].weights == (1.0, 1.5, -0.5)
    assert not rows[5][0].refreshes_store
    assert rows[1][0].refreshes_store  # one stored value alone is reused


# Tables ---------------------------------------------------------------------------------------------------------------


def table_policy(do: Table | TokenTable | Fitted, *kinds: str, **options: object) -> Policy:
    return Policy(name="mine", rules=(Rule(sites=kinds, do=do),), **options)  # type: ignore[arg-type]


def test_a_table_has_one_column_for_each_site_that_its_rule_names() -> None:
    table = Table(compute=((True,) * 3, (False, True, False), (True, False, False)))
    rows = make_rows(DIT, table_policy(table, "mlp"), 3)
    assert [[row[i].symbol for i in (1, 3, 5)] for row in rows] == [list("FFF"), list(".F."), list("F..")]
    assert all(row[i] == COMPUTE for row in rows for i in (0, 2, 4))


def test_a_table_may_recall_by_forecasts_of_what_each_site_stored() -> None:
    table = Table(compute=((True, True), (False, True), (False, False)), otherwise=Forecast(order=1))
    rows = make_rows(toy([("self-attention", "mlp")]), table_policy(table), 3)
    assert rows[1:] == [(REUSE, COMPUTE), (REUSE, Action((0.0, 2.0, -1.0)))]


@pytest.mark.parametrize(
    ("do", "steps", "text"),
    [
        (Table(compute=((True, True),)), 2, "the table of policy 'mine' has 1 steps, the schedule 2"),
        (Table(compute=((True,) * 3,)), 1, "the table of policy 'mine' is for 3 sites, the model has 2"),
        (TokenTable(counts=((TOKENS,) * 3,)), 1, "the table of policy 'mine' is for 3 sites, the model has 2"),
        (
            Table(compute=((True, False), (True, True))),
            2,
            "policy 'mine' reuses site 1 at step 1, before it was ever computed",
        ),
        (
            TokenTable(counts=((TOKENS, 3),)),
            1,
            "policy 'mine' reuses site 1 at step 1, before it was ever computed",
        ),
    ],
)
def test_a_table_for_something_else_is_refused(do: Table | TokenTable, steps: int, text: str) -> None:
    with pytest.raises(PolicyDoesNotFit) as error:
        make_rows(toy([("self-attention", "mlp")]), table_policy(do), steps)
    assert str(error.value).startswith(text + "\n")


def test_fitted_weights_are_taken_as_they_are() -> None:
    fitted = Fitted(weights=((), (), (1.5, -0.5), (0.9,)), what="update")
    cadence = Cadence(interval=9, counting="up", warmup=2)
    rows = make_rows(toy([("mlp",)]), table_policy(fitted, cadence=cadence), 4)
    assert [row[0] for row in rows[2:]] == [
        Action((0.0, 1.5, -0.5), What.UPDATE),
        Action((0.0, 0.9), What.UPDATE),
    ]


@pytest.mark.parametrize("weights", [(), (0.5, 0.5)])
def test_fitted_weights_for_another_cadence_are_refused(weights: tuple[float, ...]) -> None:
    fitted = Fitted(weights=((), weights))
    with pytest.raises(PolicyDoesNotFit) as error:
        make_rows(toy([("mlp",)]), table_policy(fitted, cadence=Cadence(interval=9, counting="up")), 2)
    assert str(error.value) == (
        f"fitted weights for step 2 are for {len(weights)} stored values, there are 1\n"
        "  where: Fitted\n"
        "  why:   weights were fitted for another cadence\n"
        "  fix:   fit them again for this cadence: recording.fitted(cadence)"
    )


def test_a_branch_keeps_one_kind_of_value() -> None:
    rules = (
        Rule(sites=("mlp",), when="odd", do=Reuse(what="core")),
        Rule(sites=("mlp",), do=Reuse(what="update")),
    )
    policy = Policy(name="both", cadence=Cadence(interval=3), rules=rules)
    with pytest.raises(PolicyDoesNotFit, match="two values of one branch") as caught:
        make_plan(structure("dit"), policy, TimestepSchedule(6))
    assert "core and update" in str(caught.value)
