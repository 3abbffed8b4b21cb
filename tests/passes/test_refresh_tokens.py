"""refresh-tokens: the highest-ranked tokens are computed, the others keep their stored value, nothing else leaks in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicompile.ops import scores, select_tokens
from dicompile.passes import (
    Chosen,
    LocalStep,
    Noise,
    Predicted,
    ReuseClock,
    SlotRef,
    TokenCount,
    Value,
    Weights,
)
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.open_spans import OpenSpans
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.plan import Context, Score, ScoreBase, SlotKind, What
from tests.passes.segments import (
    BATCH,
    FULL,
    HEADS,
    TOKENS,
    WIDTH,
    Attention,
    Both,
    Cut,
    Parallel,
    Positioned,
    chain,
    cross_attention_block,
    cut,
    mlp_block,
    modulated_block,
    reported,
    rewritten,
    run_segment,
)

POISON = 1e9
FEWER_ROWS = 1e-5
"""A product with fewer rows may be summed in another order: a few units in the last place of float32."""

VALUE, STAMP, SCORE = (SlotRef(0, kind) for kind in (SlotKind.VALUE, SlotKind.STAMP, SlotKind.SCORE))
COUNT, CLOCK, NOISE = TokenCount(0), ReuseClock(0), Noise(0, share_guidance=False)
REFRESH = (1.0, 1.0)
RANDOM = LocalStep(REFRESH, refresh=Score(ScoreBase.RANDOM), writes=(SlotKind.VALUE,))
MLP = """\
value0: f32[2,16,8] = input
value1: f32[16,8] = input
value2: f32[16] = input
value3: f32[8,16] = input
value4: f32[8] = input
value5: f32[8] = input
count[0]: int = input
noise[0]: f32[2,16] = input
value[0]: f32[2,16,8] = input
%9: i64[2,16] = aten.argsort.stable(noise[0], stable=True, descending=True)  # blocks.0
%10: i64[2,count[0]] = aten.slice.Tensor(%9, 1, 0, count[0])  # blocks.0
%11: i64[16] = aten.arange.default(16, device=cpu, pin_memory=False)  # blocks.0
%12: i64[2,16] = aten.expand_as.default(%11, %9)  # blocks.0
%13: i64[2,16] = aten.scatter.src(%9, 1, %9, %12)  # blocks.0
%14: int = add(count[0], -1)  # blocks.0
%15: b8[2,16] = aten.lt.Scalar(%13, count[0])  # blocks.0
%16: i64[2,16] = aten.clamp_max.default(%13, %14)  # blocks.0
%17: i64[2,count[0],1] = aten.view.default(%10, [2, count[0], 1])  # blocks.0
%18: i64[2,count[0],8] = aten.expand.default(%17, [2, count[0], 8])  # blocks.0
%19: f32[2,count[0],8] = aten.gather.default(value0, 1, %18)  # blocks.0
%20: f32[2,count[0],8] = aten.layer_norm.default(%19, [8])  # blocks.0
%21: f32[2,count[0],16] = aten.linear.default(%20, value1, value2)  # blocks.0.up
%22: f32[2,count[0],16] = aten.gelu.default(%21)  # blocks.0
%23: f32[2,count[0],8] = aten.linear.default(%22, value3, value4)  # blocks.0.down
%24: b8[2,16,1] = aten.unsqueeze.default(%15, 2)  # blocks.0
%25: i64[2,16,1] = aten.unsqueeze.default(%16, 2)  # blocks.0
%26: i64[2,16,8] = aten.expand.default(%25, [2, 16, 8])  # blocks.0
%27: f32[2,16,8] = aten.gather.default(%23, 1, %26)  # blocks.0
%28: f32[2,16,8] = aten.where.self(%24, %27, value[0])  # blocks.0
%29: f32[2,16,8] = aten.mul.Tensor(value5, %28)  # blocks.0
%30: f32[2,16,8] = aten.add.Tensor(value0, %29)  # blocks.0
return value0 = %30
return chosen[0] = %10
return value[0] = %28"""


def check_poisoned(block: Cut, count: int, step: LocalStep = RANDOM, **others: Any) -> None:
    """The cache holds the true branch output except on the chosen tokens: the output must be that of computing all."""
    segment = rewritten(block.segment, [step], RefreshTokens(), DropDead())
    values = {**block.arguments, VALUE: block.core(), COUNT: count, NOISE: torch.rand(BATCH, TOKENS), **others}
    chosen = run_segment(segment, values)[Chosen(0)]
    assert chosen.shape == (BATCH, count)
    rows = chosen[..., None].expand(-1, -1, WIDTH)
    poisoned = block.core().scatter(1, rows, POISON)
    results = run_segment(segment, {**values, VALUE: poisoned})
    torch.testing.assert_close(results[Value(0)], block.output(), rtol=FEWER_ROWS, atol=FEWER_ROWS)
    torch.testing.assert_close(results[VALUE], block.core(), rtol=FEWER_ROWS, atol=FEWER_ROWS)
    kept = torch.ones(BATCH, TOKENS, dtype=torch.bool).scatter(1, chosen, False)
    assert torch.equal(results[Value(0)][kept], block.output()[kept])
    assert torch.equal(results[VALUE][kept], block.core()[kept])


def test_the_branch_runs_on_chosen_tokens_alone() -> None:
    segment, reports = reported(mlp_block().segment, [RANDOM], RefreshTokens(), DropDead())
    assert str(segment) == MLP
    assert reports[0].changed == ("site 0: tokens by random",)


@pytest.mark.parametrize("count", [1, 2, 5, TOKENS - 1, TOKENS])
def test_refreshing_an_mlp_reads_only_the_kept_tokens_of_the_cache(count: int) -> None:
    check_poisoned(mlp_block(), count)


def test_modulation_is_shared_by_all_tokens() -> None:
    check_poisoned(modulated_block(), 5)


@pytest.mark.parametrize("leading", [(), (1,), (BATCH,)], ids=["[n,d]", "[1,n,d]", "[b,n,d]"])
def test_a_position_table_inside_the_branch_is_gathered_too(leading: tuple[int, ...]) -> None:
    check_poisoned(cut(chain(Positioned(*leading))), 5)


def test_a_position_table_with_as_many_tokens_as_samples_is_not_taken_for_a_batch() -> None:
    sample = chain(Positioned())._replace(inputs={"x": torch.randn(TOKENS, TOKENS, WIDTH)})
    made = cut(sample)
    segment = rewritten(made.segment, [RANDOM], RefreshTokens())
    values = {**made.arguments, VALUE: made.core(), COUNT: 5, NOISE: torch.rand(TOKENS, TOKENS)}
    torch.testing.assert_close(run_segment(segment, values)[Value(0)], made.output(), rtol=FEWER_ROWS, atol=FEWER_ROWS)


def test_cross_attention_is_refreshed_by_query_through_its_reshapes() -> None:
    check_poisoned(cross_attention_block(), 5)


class Rotated(Attention):
    """Cross-attention whose queries are scaled by a table with one row per token, after the heads were split."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(HEADS, TOKENS, WIDTH // HEADS))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            self.split(self.query(x)) * self.table, self.split(self.key(c)), self.split(self.value(c))
        )
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_a_table_per_head_and_token_is_gathered_along_its_tokens() -> None:
    check_poisoned(cut(chain(Rotated(), c=torch.randn(BATCH, 5, WIDTH))), 5)


@pytest.mark.parametrize("tokens", [4, 6, 9])
def test_a_model_with_few_tokens_can_be_refreshed(tokens: int) -> None:
    model = chain(Positioned())
    model.model.blocks[0].table = nn.Parameter(torch.randn(tokens, WIDTH))
    block = cut(model._replace(inputs={"x": torch.randn(BATCH, tokens, WIDTH)}))
    segment = rewritten(block.segment, [RANDOM], RefreshTokens())
    for count in range(1, tokens + 1):
        values = {**block.arguments, VALUE: block.core(), COUNT: count, NOISE: torch.rand(BATCH, tokens)}
        assert run_segment(segment, values)[Chosen(0)].shape == (BATCH, count)


def test_the_count_is_taken_for_no_other_size() -> None:
    assert TOKENS // 4 == WIDTH // HEADS  # the size that an example of the count could be mistaken for
    lines = str(rewritten(cross_attention_block().segment, [RANDOM], RefreshTokens(), DropDead())).splitlines()
    first, last = (next(i for i, line in enumerate(lines) if op in line) for op in ("aten.gather", "aten.unsqueeze"))
    assert last - first > 7
    assert all("count[0]" in line.split(" = ")[0] for line in lines[first:last])


def test_highest_scores_win_and_ties_go_to_the_earlier_token() -> None:
    block = mlp_block()
    segment = rewritten(block.segment, [RANDOM], RefreshTokens())
    noise = torch.zeros(BATCH, TOKENS)
    noise[0, 9], noise[1, 3] = 2.0, 1.0
    values = {**block.arguments, VALUE: block.core(), COUNT: 3, NOISE: noise}
    assert run_segment(segment, values)[Chosen(0)].tolist() == [[9, 0, 1], [3, 0, 1]]


def test_waiting_raises_a_token_by_the_age_weight_per_reuse_step() -> None:
    score = Score(ScoreBase.RANDOM, age_weight=0.5)
    step = LocalStep(REFRESH, refresh=score, writes=(SlotKind.VALUE, SlotKind.STAMP))
    block = mlp_block()
    segment = rewritten(block.segment, [step], RefreshTokens())
    noise, stamp = torch.zeros(BATCH, TOKENS), torch.full((BATCH, TOKENS), 3, dtype=torch.int32)
    stamp[:, 7] = 1  # waits for 2 steps longer than the others: worth 1.0
    noise[0, 2], noise[1, 2] = 0.9, 1.1
    values = {**block.arguments, VALUE: block.core(), COUNT: 1, NOISE: noise, STAMP: stamp, CLOCK: 3}
    results = run_segment(segment, values)
    assert results[Chosen(0)].tolist() == [[7], [2]]
    assert results[STAMP].dtype == torch.int32
    assert results[STAMP][0].tolist() == [4 if i == 7 else 3 for i in range(TOKENS)]
    assert results[STAMP][1].tolist() == [4 if i == 2 else 1 if i == 7 else 3 for i in range(TOKENS)]


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_replaces_the_entropies_of_the_tokens_it_computed(shared: bool) -> None:
    block = cross_attention_block()
    score = Score(ScoreBase.ENTROPY, share_guidance=shared)
    step = LocalStep(REFRESH, refresh=score, writes=(SlotKind.VALUE, SlotKind.SCORE), source=0)
    segment = rewritten(block.segment, [step], RefreshTokens())
    fresh = run_segment(
        rewritten(block.segment, [LocalStep(produces=score, writes=(SlotKind.SCORE,))], ScoreTokens()),
        block.arguments,
    )[SCORE]
    old = torch.rand(BATCH, TOKENS)
    results = run_segment(segment, {**block.arguments, VALUE: block.core(), COUNT: 4, SCORE: old})
    chosen = results[Chosen(0)]
    torch.testing.assert_close(results[SCORE], old.scatter(1, chosen, fresh.gather(1, chosen)))
    expected = old.sum(0, keepdim=True).expand(BATCH, -1) if shared else old
    assert chosen.tolist() == expected.argsort(dim=1, descending=True, stable=True)[:, :4].tolist()


@pytest.mark.parametrize(("device", "tokens", "is_there"), [("cpu", 16, 0), ("cuda", 8192, 1), ("cuda", 8193, 0)])
def test_pairs_of_tokens_are_compared_where_that_is_cheaper_than_a_sort(
    device: str, tokens: int, is_there: bool
) -> None:
    pytest.importorskip("triton")
    found = select_tokens.operator_for(torch.device(device), tokens)
    assert found is (torch.ops.dicompile.select_tokens_cuda_triton.default if is_there else None)


@torch.library.custom_op("dicompile_tests::select_tokens", mutates_args=())
def selected_by_sorting(
    score: Tensor,
    stamp: Tensor | None,
    count: int,
    clock: int,
    age_weight: float,
    grid: list[int],
    cell: int,
    bonus: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, see `tests.runtime.interpreted`, for a machine that cannot run it."""
    ranked = score if stamp is None else score + age_weight * (clock - stamp)
    ranked = scores.with_grid_bonus(ranked, tuple(grid), cell, bonus) if cell else ranked
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = order.argsort(-1)
    stamped = score.new_empty(0, dtype=torch.int32) if stamp is None else stamp.where(places >= count, clock + 1)
    return order[:, :count].contiguous(), places, stamped


@selected_by_sorting.register_fake
def _(score: Tensor, stamp: Tensor | None, count: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    stamped = score.new_empty(0, dtype=torch.int32) if stamp is None else torch.empty_like(stamp)
    return score.new_empty((len(score), count), dtype=torch.int64), torch.empty_like(score, dtype=torch.int64), stamped


@pytest.mark.parametrize("count", [1, 5, TOKENS])
@pytest.mark.parametrize("grid_cell", [0, 2])
@pytest.mark.parametrize("age_weight", [0.0, 0.25])
@pytest.mark.sampled
def test_a_kernel_that_selects_is_one_operator_and_chooses_what_sorting_does(
    count: int, grid_cell: int, age_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = mlp_block()
    block.segment.grid = (TOKENS // 4, 4)
    score = Score(ScoreBase.RANDOM, age_weight=age_weight, grid_cell=grid_cell)
    kinds = (SlotKind.VALUE, SlotKind.STAMP) if age_weight else (SlotKind.VALUE,)
    steps = [LocalStep(REFRESH, refresh=score, writes=kinds)]
    values = {**block.arguments, VALUE: torch.randn_like(block.core()), COUNT: count, CLOCK: 3}
    values[STAMP] = torch.randint(3, (BATCH, TOKENS), dtype=torch.int32)
    values[NOISE] = torch.randn(BATCH, TOKENS).round()  # many are equal
    sorting = rewritten(block.segment, steps, RefreshTokens(), DropDead())
    operator_ = torch.ops.dicompile_tests.select_tokens.default
    monkeypatch.setattr(select_tokens, "operator_for", lambda *_: operator_)
    counting = rewritten(block.segment, steps, RefreshTokens(), DropDead())
    assert "sort" not in str(counting)
    assert [node.target for node in counting.graph.nodes].count(operator_) == 1
    expected, found = (
        run_segment(segment, {reference: values[reference] for reference in segment.inputs})
        for segment in (sorting, counting)
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_computed_site_is_left_alone() -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [FULL], RefreshTokens())
    assert str(segment) == str(block.segment)
    assert report.changed == ()


# Attention over its own tokens ----------------------------------------------------------------------------------------

ATTENTION = SlotRef(0, SlotKind.ATTENTION)
CONTEXTS = list(Context)


def taken(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens; [b, k, d]."""
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def put(values: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    return values.scatter(1, chosen[..., None].expand(-1, -1, rows.shape[-1]), rows)


@pytest.mark.parametrize("count", [1, 5, TOKENS])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.sampled
def test_a_parallel_branch_sees_the_attention_that_its_context_names(context: Context, count: int) -> None:
    sample = chain(Parallel())
    block, module = cut(sample), sample.model.blocks[0]
    step = LocalStep(REFRESH, refresh=Score(ScoreBase.RANDOM), context=context, writes=(SlotKind.VALUE,), attention=0)
    segment = rewritten(block.segment, [step], RefreshTokens(), DropDead())
    x, stored = block.arguments[Value(0)], torch.randn(BATCH, TOKENS, WIDTH)
    kept = torch.randn(BATCH, HEADS, TOKENS, WIDTH // HEADS)
    assert (ATTENTION in segment.inputs) == (context is Context.STORED)
    values = {**block.arguments, VALUE: stored, COUNT: count, NOISE: torch.rand(BATCH, TOKENS), ATTENTION: kept}
    results = run_segment(segment, values)
    chosen = results[Chosen(0)]
    with torch.no_grad():
        rows = taken(x, chosen)
        attended = {
            Context.STORED: lambda: taken(kept.transpose(1, 2).reshape(BATCH, TOKENS, WIDTH), chosen),
            Context.ALL: lambda: module.attended(rows, x),
            Context.KEPT: lambda: module.attended(rows, rows),
        }[context]()
        expected = put(stored, chosen, module.joined(rows, attended))
    torch.testing.assert_close(results[VALUE], expected, rtol=FEWER_ROWS, atol=FEWER_ROWS)
    torch.testing.assert_close(results[Value(0)], x + expected, rtol=FEWER_ROWS, atol=FEWER_ROWS)


def test_stored_attention_runs_none() -> None:
    step = LocalStep(REFRESH, refresh=Score(ScoreBase.RANDOM), writes=(SlotKind.VALUE,), attention=0)
    text = str(rewritten(cut(chain(Parallel())).segment, [step], RefreshTokens(), DropDead()))
    assert "attention.default" not in text
    assert text.count("aten.linear.default") == 2  # up and out: no queries, keys, values


@pytest.mark.parametrize("count", [1, 5, TOKENS])
@pytest.mark.parametrize("context", [Context.ALL, Context.KEPT])
@pytest.mark.sampled
def test_a_whole_block_runs_on_chosen_tokens(context: Context, count: int) -> None:
    sample = chain(Both())
    block, module = cut(sample, with_span=True), sample.model.blocks[0]
    skip, value = LocalStep((0.0,)), SlotRef(2, SlotKind.VALUE)
    step = LocalStep(
        REFRESH, what=What.UPDATE, refresh=Score(ScoreBase.RANDOM), context=context, writes=(SlotKind.VALUE,)
    )
    segment = rewritten(block.segment, [skip, skip, step], OpenSpans(), RefreshTokens(), DropDead())
    x, stored = block.arguments[Value(0)], torch.randn(BATCH, TOKENS, WIDTH)
    noise = torch.rand(BATCH, TOKENS)
    values = {**block.arguments, value: stored, TokenCount(2): count, Noise(2, share_guidance=False): noise}
    results = run_segment(segment, values)
    chosen = results[Chosen(2)]
    with torch.no_grad():
        rows = taken(x, chosen)
        fresh = module.through(rows, x if context is Context.ALL else rows) - rows
    expected = put(stored, chosen, fresh)
    torch.testing.assert_close(results[value], expected, rtol=FEWER_ROWS, atol=FEWER_ROWS)
    torch.testing.assert_close(results[Value(0)], x + expected, rtol=FEWER_ROWS, atol=FEWER_ROWS)
    assert set(chosen[0].tolist()) == set(noise[0].argsort(descending=True)[:count].tolist())


def test_beside_a_forecast_fresh_tokens_are_not_stored() -> None:
    block = mlp_block()
    step = LocalStep((1.0, 1.0, 1.0), variable=True, refresh=Score(ScoreBase.RANDOM))
    segment = rewritten(block.segment, [step], RefreshTokens(), DropDead())
    newest, older = torch.randn_like(block.core()), torch.randn_like(block.core())
    values = {
        **block.arguments, VALUE: newest, SlotRef(0, SlotKind.VALUE, 1): older, COUNT: 5,
        NOISE: torch.rand(BATCH, TOKENS), Weights(0): torch.tensor([1.0, 2.0, -1.0]),
    }  # fmt: skip
    results = run_segment(segment, values)
    assert set(results) == {Value(0), Chosen(0)}
    chosen = results[Chosen(0)]
    branch = put(2 * newest - older, chosen, taken(block.core(), chosen))
    with torch.no_grad():
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * branch
    torch.testing.assert_close(results[Value(0)], expected, rtol=FEWER_ROWS, atol=FEWER_ROWS)


@pytest.mark.parametrize("base", [ScoreBase.NORM, ScoreBase.SIMILARITY, ScoreBase.PREDICTED])
def test_scores_that_need_no_attention(base: ScoreBase) -> None:
    block = mlp_block()
    segment = rewritten(block.segment, [LocalStep(REFRESH, refresh=Score(base))], RefreshTokens(), DropDead())
    stream, stored, predicted = block.arguments[Value(0)], torch.randn_like(block.core()), torch.rand(BATCH, TOKENS)
    values = {**block.arguments, VALUE: stored, COUNT: 6, Predicted(0): predicted}
    score = {
        ScoreBase.NORM: stream.norm(dim=-1),
        ScoreBase.SIMILARITY: -F.cosine_similarity(stream, stored, dim=-1),
        ScoreBase.PREDICTED: predicted,
    }[base]
    assert run_segment(segment, values)[Chosen(0)].tolist() == score.argsort(1, descending=True)[:, :6].tolist()
