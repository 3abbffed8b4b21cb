"""share-weights: on a CPU attention and its score become one operator, of the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dicompile.ops.kinds import ATTENTION
from dicompile.passes import Segment, Value
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.passes.share_weights import ShareWeights
from dicompile.plan import ScoreBase
from tests.passes.segments import (
    BATCH,
    SCORE,
    WIDTH,
    Attention,
    Cut,
    chain,
    cross_attention_block,
    cut,
    produce,
    reported,
    rewritten,
    run_segment,
    self_attention_block,
)

PASSES = (ScoreTokens(), ShareWeights())

SHARED = """\
%18: (f32[2,2,16,4], f32[2,16]) = dicompile.attention_and_received.default(%11, %14, %17, None, None, False)  # blocks.0
%19: f32[2,2,16,4] = getitem(%18, 0)  # blocks.0
%20: f32[2,16] = getitem(%18, 1)  # blocks.0"""


def is_shared(segment: Segment) -> bool:
    (operator,) = {str(node.target) for node in segment.graph.nodes if "dicompile" in str(node.target)}
    assert ("attention_and" in operator) != bool(segment.graph.find_nodes(op="call_function", target=ATTENTION))
    return "attention_and" in operator


def both(block: Cut, base: ScoreBase) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """What the segment returns with and without the pass."""
    segments = [rewritten(block.segment, [produce(base)], *passes) for passes in (PASSES, PASSES[:1])]
    assert [is_shared(segment) for segment in segments] == [True, False]
    shared, alone = (run_segment(segment, block.arguments) for segment in segments)
    return shared, alone


def test_one_operator_makes_both() -> None:
    segment, (_, report) = reported(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], *PASSES)
    assert SHARED in str(segment)
    assert len(report.changed) == 1


class Masked(Attention):
    """Attention that does not see the last words, and one of whose queries sees nothing."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(c)), self.split(self.value(c))
        mask = (torch.arange(c.shape[1]) < c.shape[1] - 4) & (torch.arange(x.shape[1]) != 3)[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None])
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.ENTROPY, "masked"])
def test_attention_and_score_are_what_they_are_apart(base: Any) -> None:
    if base == "masked":
        block, base = cut(chain(Masked(), c=torch.randn(BATCH, 7, WIDTH))), ScoreBase.ENTROPY
    else:
        block = self_attention_block() if base is ScoreBase.ATTENTION else cross_attention_block()
    shared, alone = both(block, base)
    torch.testing.assert_close(shared[Value(0)], alone[Value(0)], rtol=1e-5, atol=1e-6)
    assert torch.equal(shared[SCORE], alone[SCORE])


def test_the_output_lies_in_memory_as_before() -> None:
    """Some attention has heads outside in memory; what follows may view it so."""
    scored = rewritten(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], ScoreTokens())
    (attention,) = scored.graph.find_nodes(op="call_function", target=ATTENTION)
    attention.meta["val"] = attention.meta["val"].contiguous()
    (user,) = attention.users
    ShareWeights().run(scored)
    assert user.args[0].meta["val"].is_contiguous()


class Dropping(Attention):
    """Attention that drops weights."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(part(x)) for part in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_attention_that_drops_weights_is_left_alone() -> None:
    block = cut(chain(Dropping()))
    segment, (_, report) = reported(block.segment, [produce(ScoreBase.ATTENTION)], *PASSES)
    assert not is_shared(segment)
    assert report.changed == ()


def test_attention_on_a_gpu_is_left_alone() -> None:
    scored = rewritten(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], ScoreTokens())
    (attention,) = scored.graph.find_nodes(op="call_function", target=ATTENTION)
    attention.meta["val"] = torch.empty_like(attention.meta["val"], device="meta")
    assert ShareWeights().run(scored).changed == ()
