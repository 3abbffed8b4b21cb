"""propagate-tokens: one token of every cluster is computed, and every stored value moves by the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.passes import Chosen, Labels, LocalStep, Noise, SlotRef, TokenCount, Value, Weights
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.propagate_tokens import PropagateTokens
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.plan import Clusters, Score, ScoreBase, SlotKind
from tests.passes.segments import (
    BATCH,
    FULL,
    TOKENS,
    WIDTH,
    Cut,
    mlp_block,
    modulated_block,
    reported,
    rewritten,
    run_segment,
)

LABELS, NOISE, COUNT, CHOSEN = Labels(0), Noise(0, share_guidance=False), TokenCount(0), Chosen(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""A product with fewer rows may be summed in another order."""
CLUSTERS = 4


MOVING = """\
%32: f32[2,16,8] = aten.lerp.Scalar(value[0], %31, 0.25)  # blocks.0
%33: b8[2,16,1] = aten.unsqueeze.default(%21, 2)  # blocks.0
%34: i64[2,16,1] = aten.unsqueeze.default(labels[0], 2)  # blocks.0
%35: i64[2,16,8] = aten.expand.default(%34, [2, 16, 8])  # blocks.0
%36: f32[2,16,8] = aten.gather.default(%28, 1, %35)  # blocks.0
%37: f32[2,16,8] = aten.where.self(%33, %36, %32)  # blocks.0
%38: f32[2,16,8] = aten.sub.Tensor(%37, value[0])  # blocks.0
%39: f32[2,16,8] = aten.add.Tensor(value[0]-1, %38)  # blocks.0
%40: f32[] = aten.select.int(weights[0], 0, 1)  # blocks.0
%41: f32[2,16,8] = aten.mul.Tensor(%37, %40)  # blocks.0
%42: f32[] = aten.select.int(weights[0], 0, 2)  # blocks.0
%43: f32[2,16,8] = aten.mul.Tensor(%39, %42)  # blocks.0
%44: f32[2,16,8] = aten.add.Tensor(%41, %43)  # blocks.0
%45: f32[2,16,8] = aten.mul.Tensor(value5, %44)  # blocks.0
%46: f32[2,16,8] = aten.add.Tensor(value0, %45)  # blocks.0
return value0 = %46
return chosen[0] = %18
return value[0] = %37
return value[0]-1 = %39"""


def value(age: int) -> SlotRef:
    return SlotRef(0, SlotKind.VALUE, age)


def step(stored: int, share: float, *, is_kept: bool = True) -> LocalStep:
    score = Score(ScoreBase.CLUSTER, clusters=Clusters(CLUSTERS, 9, share))
    writes = (SlotKind.VALUE,) if is_kept else ()
    return LocalStep((1.0,) * (stored + 1), variable=stored > 1, refresh=score, writes=writes)


def given(block: Cut, stored: int) -> dict[Any, Any]:
    """What a step reads: the last cluster has no tokens."""
    generator = torch.Generator().manual_seed(2)
    return {
        **block.arguments,
        LABELS: torch.randint(0, CLUSTERS - 1, (BATCH, TOKENS), generator=generator),
        NOISE: torch.rand(BATCH, TOKENS, generator=generator),
        COUNT: CLUSTERS,
        Weights(0): torch.tensor([1.0, 2.5, -2.0, 0.5][: stored + 1]),
        **{value(age): torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for age in range(stored)},
    }


def moved(values: dict[Any, Any], chosen: Tensor, core: Tensor, share: float) -> Tensor:
    """The newest stored value as the rule moves it, token by token."""
    result = values[value(0)].clone()
    for b in range(BATCH):
        for token, label in enumerate(values[LABELS][b].tolist()):
            row = core[b, chosen[b, label]]
            result[b, token] = row if chosen[b, label] == token else share * row + (1 - share) * result[b, token]
    return result


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("stored", [1, 2, 3])
@pytest.mark.sampled
def test_the_history_moves_with_the_computed_tokens(stored: int, share: float) -> None:
    block = mlp_block()
    segment, (report, _) = reported(block.segment, [step(stored, share)], PropagateTokens(), DropDead())
    assert report.changed == ("site 0: tokens of 4 clusters",)
    values = given(block, stored)
    results = run_segment(segment, values)
    chosen = results[CHOSEN]
    for b in range(BATCH):
        members = [(values[LABELS][b] == k).nonzero().flatten() for k in range(CLUSTERS - 1)]
        assert chosen[b].tolist() == [*(int(own[values[NOISE][b, own].argmax()]) for own in members), 0]
    newest = moved(values, chosen, block.core(), share)
    change = newest - values[value(0)]
    for age in range(stored):
        torch.testing.assert_close(results[value(age)], values[value(age)] + change, **CLOSE)
    weights = [1.0] if stored == 1 else values[Weights(0)][1:].tolist()
    recalled = sum(weight * (values[value(age)] + change) for age, weight in enumerate(weights))
    assert isinstance(recalled, Tensor)
    torch.testing.assert_close(
        results[Value(0)], block.arguments[Value(0)] + recalled * block.arguments[Value(5)], **CLOSE
    )


def test_the_branch_runs_on_one_row_for_every_cluster() -> None:
    segment = rewritten(modulated_block().segment, [step(2, 0.1)], PropagateTokens(), DropDead())
    products = [node for node in segment.graph.nodes if str(node.target).startswith("aten.linear")]
    rows = {str(node.meta["val"].shape[1]) for node in products if node.meta["val"].ndim == 3}
    assert len(rows - {str(TOKENS), "1"}) == 1
    assert str(TOKENS) not in rows


def test_all_stored_values_move_before_they_are_weighed() -> None:
    assert str(rewritten(mlp_block().segment, [step(2, 0.25)], PropagateTokens(), DropDead())).endswith(MOVING)


def test_what_nobody_reads_is_not_stored() -> None:
    segment = rewritten(mlp_block().segment, [step(2, 0.1, is_kept=False)], PropagateTokens(), DropDead())
    assert [str(ref) for ref in segment.outputs] == ["value0", "chosen[0]"]


def test_other_sites_are_left_alone() -> None:
    block = mlp_block()
    assert reported(block.segment, [FULL], PropagateTokens())[1][0].changed == ()
    random = LocalStep((1.0, 1.0), refresh=Score(ScoreBase.RANDOM), writes=(SlotKind.VALUE,))
    assert reported(block.segment, [random], PropagateTokens())[1][0].changed == ()
    assert reported(block.segment, [step(1, 0.1)], RefreshTokens())[1][0].changed == ()
