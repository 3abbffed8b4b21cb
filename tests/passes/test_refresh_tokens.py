"""refresh-tokens: the highest-ranked tokens are computed, the others keep their stored value, nothing else leaks in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicompile.passes import Chosen, LocalStep, Noise, ReuseClock, SlotRef, TokenCount, Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.plan import Score, ScoreBase, SlotKind
from tests.passes.segments import (
    BATCH,
    FULL,
    HEADS,
    TOKENS,
    WIDTH,
    Attention,
    Cut,
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
%9: (f32[2,16], i64[2,16]) = aten.sort.stable(noise[0], stable=True, dim=1, descending=True)  # blocks.0
%10: i64[2,16] = getitem(%9, 1)  # blocks.0
%11: i64[2,count[0]] = aten.slice.Tensor(%10, 1, 0, count[0])  # blocks.0
%12: i64[2,count[0],1] = aten.view.default(%11, [2, count[0], 1])  # blocks.0
%13: i64[2,count[0],8] = aten.expand.default(%12, [2, count[0], 8])  # blocks.0
%14: f32[2,count[0],8] = aten.gather.default(value0, 1, %13)  # blocks.0
%15: f32[2,count[0],8] = aten.layer_norm.default(%14, [8])  # blocks.0
%16: f32[2,count[0],16] = aten.linear.default(%15, value1, value2)  # blocks.0.up
%17: f32[2,count[0],16] = aten.gelu.default(%16)  # blocks.0
%18: f32[2,count[0],8] = aten.linear.default(%17, value3, value4)  # blocks.0.down
%19: i64[2,count[0],1] = aten.view.default(%11, [2, count[0], 1])  # blocks.0
%20: i64[2,count[0],8] = aten.expand.default(%19, [2, count[0], 8])  # blocks.0
%21: f32[2,16,8] = aten.scatter.src(value[0], 1, %20, %18)  # blocks.0
%22: f32[2,16,8] = aten.mul.Tensor(value5, %21)  # blocks.0
%23: f32[2,16,8] = aten.add.Tensor(value0, %22)  # blocks.0
return value0 = %23
return chosen[0] = %11
return value[0] = %21"""


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
    first, last = (next(i for i, line in enumerate(lines) if op in line) for op in ("aten.slice", "aten.scatter"))
    assert last - first > 10
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


def test_a_computed_site_is_left_alone() -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [FULL], RefreshTokens())
    assert str(segment) == str(block.segment)
    assert report.changed == ()
