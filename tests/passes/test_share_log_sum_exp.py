"""share-log-sum-exp: attention becomes the kernel that torch runs it as, and its score reads what that has made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from dicompile.passes import Segment
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.passes.share_log_sum_exp import ShareLogSumExp
from dicompile.plan import ScoreBase
from tests.passes.segments import (
    BATCH,
    WIDTH,
    Attention,
    chain,
    cross_attention_block,
    cut,
    produce,
    reported,
    rewritten,
    self_attention_block,
)

PASSES = (ScoreTokens(), ShareLogSumExp())

SHARED = "f32[2,16] = dicompile.attention_received.default(%11, %14, None, None, False, lse=%20)"


@pytest.fixture(params=["flash", "efficient", "cudnn"])
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[OpOverload]:
    """What a CUDA build makes of attention; a CPU build knows the shapes only."""
    kernel: OpOverload = getattr(torch.ops.aten, f"_scaled_dot_product_{request.param}_attention").default
    options = (None, False) if request.param != "flash" else ()
    attention = torch.ops.aten.scaled_dot_product_attention.default

    def decomposed(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
        return kernel(query, key, value, *options, scale=scale)[0]

    monkeypatch.setitem(attention.py_kernels, torch._C.DispatchKey.CompositeImplicitAutograd, decomposed)
    attention._dispatch_cache.clear()
    yield kernel
    monkeypatch.undo()
    attention._dispatch_cache.clear()


def lse_of(segment: Segment) -> list[Any]:
    return [node.kwargs.get("lse") for node in segment.graph.nodes if "dicompile" in str(node.target)]


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.ENTROPY])
def test_the_score_reads_the_log_sum_exp_of_attention_which_is_asked_for(kernel: OpOverload, base: ScoreBase) -> None:
    block = self_attention_block() if base is ScoreBase.ATTENTION else cross_attention_block()
    segment, (_, report) = reported(block.segment, [produce(base)], *PASSES)
    (call,) = (node for node in segment.graph.nodes if node.target is kernel)
    assert "flash" in str(kernel) or call.args[4] is True
    (lse,) = lse_of(segment)
    assert lse.meta["val"].shape[:2] == (2, 2)
    assert lse.meta["val"].ndim == 3
    assert lse in {*call.users} | {user for got in call.users for user in got.users}
    assert len(report.changed) == 1
    assert report.skipped == ()


@pytest.mark.parametrize("kernel", ["efficient"], indirect=True)
def test_it_reads_as_it_was_written(kernel: OpOverload) -> None:
    del kernel
    assert SHARED in str(rewritten(self_attention_block().segment, [produce(ScoreBase.ATTENTION)], *PASSES))


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
