"""share-log-sum-exp: attention becomes the kernel that torch runs it as, and its score reads what that has made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dicompile.passes import LocalStep, Segment, SlotRef, Value
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.passes.share_log_sum_exp import ShareLogSumExp
from dicompile.plan import Score, ScoreBase, SlotKind
from tests.passes.segments import (
    BATCH,
    WIDTH,
    Attention,
    Cut,
    chain,
    cross_attention_block,
    cut,
    reported,
    rewritten,
    run_segment,
    self_attention_block,
)

SCORE = SlotRef(0, SlotKind.SCORE)
PASSES = (ScoreTokens(), ShareLogSumExp())

SHARED = """\
%18: (f32[2,2,16,4], f32[2,2,16]) = aten._scaled_dot_product_flash_attention_for_cpu.default(%11, %14, %17)  # blocks.0
%19: f32[2,2,16,4] = getitem(%18, 0)  # blocks.0
%20: f32[2,2,16] = getitem(%18, 1)  # blocks.0
%21: f32[2,16] = dicompile.attention_received.default(%11, %14, None, None, False, lse=%20)  # blocks.0"""


def produce(base: ScoreBase) -> LocalStep:
    return LocalStep(produces=Score(base), writes=(SlotKind.SCORE,))


def both(block: Cut, base: ScoreBase) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """What the segment returns with and without the pass."""
    segments = (rewritten(block.segment, [produce(base)], *passes) for passes in (PASSES, PASSES[:1]))
    shared, alone = (run_segment(segment, block.arguments) for segment in segments)
    return shared, alone


def lse_of(segment: Segment) -> list[Any]:
    return [node.kwargs.get("lse") for node in segment.graph.nodes if "dicompile" in str(node.target)]


def test_the_score_reads_the_log_sum_exp_of_attention() -> None:
    segment, (_, report) = reported(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], *PASSES)
    assert SHARED in str(segment)
    assert len(report.changed) == 1
    assert report.skipped == ()


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.ENTROPY])
def test_attention_does_not_change_by_a_bit_and_the_score_is_the_same(base: ScoreBase) -> None:
    block = self_attention_block() if base is ScoreBase.ATTENTION else cross_attention_block()
    shared, alone = both(block, base)
    assert torch.equal(shared[Value(0)], alone[Value(0)])
    torch.testing.assert_close(shared[SCORE], alone[SCORE], rtol=1e-5, atol=1e-6)


class Masked(Attention):
    """Attention that does not see the last words."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(c)), self.split(self.value(c))
        mask = (torch.arange(c.shape[1]) < c.shape[1] - 4).view(1, 1, 1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_attention_with_a_mask_is_left_alone() -> None:
    block = cut(chain(Masked(), c=torch.randn(BATCH, 7, WIDTH)))
    segment, (_, report) = reported(block.segment, [produce(ScoreBase.ENTROPY)], *PASSES)
    assert lse_of(segment) == [None]
    assert "aten.scaled_dot_product_attention" in str(segment)
    assert report.changed == ()


def test_attention_that_torch_writes_out_is_left_alone() -> None:
    block = self_attention_block()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        segment, (_, report) = reported(block.segment, [produce(ScoreBase.ATTENTION)], *PASSES)
    assert lse_of(segment) == [None]
    assert "aten.scaled_dot_product_attention" in str(segment)
    assert "torch does not run" in report.skipped[0]


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_has_to_be_asked_is_asked(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """What a CUDA build makes of attention; a CPU build knows the shapes only."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention").default
    attention = torch.ops.aten.scaled_dot_product_attention.default

    def decomposed(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
        return operator(query, key, value, None, False, scale=scale)[0]

    monkeypatch.setitem(attention.py_kernels, torch._C.DispatchKey.CompositeImplicitAutograd, decomposed)
    attention._dispatch_cache.clear()
    try:
        segment = rewritten(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], *PASSES)
    finally:
        monkeypatch.undo()
        attention._dispatch_cache.clear()
    (call,) = (node for node in segment.graph.nodes if node.target is operator)
    assert call.args[4] is True
    (lse,) = lse_of(segment)
    assert lse.meta["val"].shape == {"efficient": (2, 2, 32), "cudnn": (2, 2, 16)}[kernel]
