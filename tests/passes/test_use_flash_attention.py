"""FlashAttention by the package flash-attn: here by a stand-in with its signature, on a GPU by itself."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import dicompile
from dicompile.errors import InvalidSetting
from dicompile.lower.inductor import ATTENTIONS, BACKENDS, Backend
from dicompile.ops import flash
from dicompile.ops.attention_scores import is_attention_score
from dicompile.passes import PASSES, LocalStep, passes_for
from dicompile.passes.share_weights import ShareWeights
from dicompile.plan import Score, ScoreBase, SlotKind
from tests.models import Sample, dit, pixart
from tests.passes.runs import STEPS, runs_of
from tests.passes.segments import cross_attention_block, rewritten, run_segment, self_attention_block


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Put a package in the place of flash-attn that runs on a CPU, in float32; shapes of the queries it gets."""
    seen: list[tuple[int, ...]] = []

    def flash_attn_func(  # its signature, as far as ours may use it
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, *, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert dropout_p == 0.0
        assert return_attn_probs
        seen.append(tuple(q.shape))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (logits.softmax(-1) @ v).transpose(1, 2).contiguous(), logits.logsumexp(-1).float(), None

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash, "_is_installed", lambda name: name == "flash_attn")
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    flash._kernel.cache_clear()
    yield seen
    flash._kernel.cache_clear()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_operator_is_attention_and_its_logsumexp(calls: list[Any], heads: int, is_causal: bool) -> None:
    query, key, value = (torch.randn(2, n, 5, 8) for n in (4, heads, heads))
    output, lse = torch.ops.dicompile.flash_attention(query, key, value, 0.3, is_causal)
    expected = F.scaled_dot_product_attention(
        query, key, value, scale=0.3, is_causal=is_causal, enable_gqa=heads != query.shape[1]
    )
    torch.testing.assert_close(output, expected)
    logits = 0.3 * query @ key.repeat_interleave(4 // heads, 1).transpose(-2, -1)
    if is_causal:
        logits = logits.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert calls == [(2, 5, 4, 8)]


def test_what_it_says_of_its_results_is_true(calls: list[Any]) -> None:
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    torch.library.opcheck(
        torch.ops.dicompile.flash_attention.default, (query, key, value, None, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "toca"])
def test_every_attention_goes_there_and_results_stay(calls: list[Any], policy: str) -> None:
    sample = dit()
    expected = runs_of(sample, policy, backend="eager")
    assert not calls
    found = runs_of(sample, policy, backend="eager", attention="flash-attn")
    assert calls
    for output, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.ENTROPY])
def test_scores_read_its_log_sum_exp(calls: list[Any], monkeypatch: pytest.MonkeyPatch, base: ScoreBase) -> None:
    monkeypatch.setattr(flash, "EVERY", 4)
    block = self_attention_block() if base is ScoreBase.ATTENTION else cross_attention_block()
    steps = [LocalStep(produces=Score(base), writes=(SlotKind.SCORE,))]
    on_gpu = [item for item in passes_for("flash-attn") if item != ShareWeights()]
    segments = [rewritten(block.segment, steps, *passes) for passes in (on_gpu, PASSES)]
    (score,) = filter(is_attention_score, segments[0].graph.nodes)
    assert score.kwargs["lse"].args[0].target is torch.ops.dicompile.flash_attention.default
    found, expected = (run_segment(segment, block.arguments) for segment in segments)
    assert len(calls) == 1
    for output, value in expected.items():
        torch.testing.assert_close(found[output], value, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_compiled_code_calls_it(calls: list[Any]) -> None:
    sample = dit(1)
    expected = runs_of(sample, "none", backend="eager")
    found = runs_of(sample, "none", attention="flash-attn")
    assert len(calls) == STEPS
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_compute_stays_and_is_said(calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    sample = pixart(2)
    sample.inputs["encoder_attention_mask"] = torch.ones(2, 12)
    with caplog.at_level(logging.WARNING, "dicompile"):
        found = runs_of(sample, "none", backend="eager", attention="flash-attn")
    assert "2 of 4 attentions stay with torch: transformer_blocks.0.attn2, it has a mask" in caplog.text
    expected = runs_of(sample, "none", backend="eager")
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DEVICE", "cuda", "it is on cpu, not on cuda"),
        ("DTYPES", (torch.bfloat16,), "it is in float32, not in float16 or bfloat16"),
        ("WIDEST", 8, "its heads are 16 wide, not a multiple of 8 up to 8"),
    ],
)
def test_where_it_can_compute_nothing_it_is_refused(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, value: Any, why: str
) -> None:
    monkeypatch.setattr(flash, name, value)
    with pytest.raises(InvalidSetting, match="can compute no attention of this model") as error:
        runs_of(dit(1), "none", backend="eager", attention="flash-attn")
    assert error.value.why == why
    assert error.value.where == "transformer_blocks.0.attn1"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_without_the_package_it_is_refused_at_once() -> None:
    with pytest.raises(InvalidSetting, match="needs the package flash-attn"):
        dicompile.optimize(dit(1).model, "none", attention="flash-attn")


def test_an_attention_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="attention 'sage' does not exist"):
        dicompile.optimize(dit(1).model, "none", attention="sage")
    with pytest.raises(InvalidSetting, match="backend 'eager' takes no attention"):
        dicompile.optimize(dit(1).model, "none", backend="eager", attention="cudnn")


def test_cudnn_goes_first_where_it_is_asked_for() -> None:
    sample = dit(1)
    expected = runs_of(sample, "none", backend="eager")
    found = runs_of(sample, "none", attention="cudnn")  # on a CPU there is one kernel
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-5)
    before = torch._C._get_sdp_priority_order()
    with Backend.of("inductor", attention="cudnn").in_effect():
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
    assert torch._C._get_sdp_priority_order() == before


def test_code_is_shared_only_where_attention_is_computed_alike(calls: list[Any]) -> None:
    ways = [(name, way) for name in BACKENDS for way in ATTENTIONS if (name, way) != ("eager", "cudnn")]
    assert len({Backend.of(name, attention=way).settings() for name, way in ways}) == len(ways)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_the_package_itself_computes_the_same() -> None:
    model, inputs = dit(2)
    given = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    given["hidden_states"] = given["hidden_states"].bfloat16()
    sample = Sample(model.cuda().bfloat16(), given)
    expected = runs_of(sample, "toca")
    found = runs_of(sample, "toca", attention="flash-attn")
    for output, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=3e-2, atol=3e-2)
