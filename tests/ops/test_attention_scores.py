"""What attention tells of its tokens, against the map written out in float64.

The formulas are section 2 of the ToCa and DuCa notes: s1 attention received, s2 entropy of the mixture of the guidance
halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dicompile.ops import attention_scores, scores
from dicompile.ops.attention_scores import (
    attention_and_entropy,
    attention_and_received,
    attention_entropy,
    attention_received,
    operator_for,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


def attention_map(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """Attention averaged over heads, in float64; nothing where a query sees no key; [b, n, m]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.double().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).mean(1)


def entropy(rows: Tensor) -> Tensor:
    return -(rows * (rows + 1e-7).log()).sum(-1)


def operands(
    batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float32, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Query and key in the layout of a model: heads are slices of the rows."""
    query = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
    return query, torch.randn(batch, keys, heads // groups, width).to(dtype).transpose(1, 2)


def seen() -> Tensor:
    """A mask that differs from query to query; the fourth sees nothing."""
    mask = torch.rand(2, 1, 9, 13) < 0.6
    mask[:, :, 3] = False
    return mask


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean": seen,
    "boolean per key": lambda: (torch.arange(13) % 3 > 0).expand(2, 1, 1, 13),
    "additive": lambda: torch.randn(2, 4, 9, 13),
    "additive with -inf": lambda: torch.where(seen(), 0.0, -torch.inf),
    "additive, half precision": lambda: torch.randn(1, 1, 1, 13).to(torch.bfloat16),
}


@pytest.mark.parametrize("block", [1 << 20, 40, 1], ids=["at once", "in blocks", "row by row"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
def test_scores_are_those_of_the_map(
    monkeypatch: pytest.MonkeyPatch, mask: str, options: dict[str, Any], block: int
) -> None:
    monkeypatch.setattr(attention_scores, "BLOCK", block)
    query, key = operands(2, 4, 9, 13, 6)
    given = MASKS[mask]()
    rows = attention_map(query, key, given, **options)
    torch.testing.assert_close(attention_received(query, key, given, **options), rows.sum(1).float(), **CLOSE)
    torch.testing.assert_close(attention_entropy(query, key, given, **options), entropy(rows).float(), **CLOSE)


@pytest.mark.parametrize("block", [1 << 20, 40, 1], ids=["at once", "in blocks", "row by row"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
def test_with_its_output_a_score_is_what_it_is_without_and_the_output_is_that_of_attention(
    monkeypatch: pytest.MonkeyPatch, mask: str, options: dict[str, Any], block: int
) -> None:
    monkeypatch.setattr(attention_scores, "BLOCK", block)
    query, key = operands(2, 4, 9, 13, 6)
    given = MASKS[mask]()
    if given is not None and options.get("is_causal"):
        pytest.skip("torch's attention takes one or the other")
    value = torch.randn(2, 13, 4, 5).transpose(1, 2)
    additive = given if given is None or given.dtype == torch.bool else given.to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, additive, **options)
    for alone, together in ((attention_received, attention_and_received), (attention_entropy, attention_and_entropy)):
        output, score = together(query, key, value, given, **options)
        torch.testing.assert_close(output, attended, **CLOSE)
        assert torch.equal(score, alone(query, key, given, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_beside_a_score_is_at_least_as_near_to_float64_as_torchs(dtype: torch.dtype) -> None:
    query, key = operands(2, 6, 30, 50, 16, dtype, groups=3)
    value = torch.randn(2, 2, 50, 16, dtype=dtype)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    torchs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    output, _ = attention_and_received(query, key, value)
    assert output.dtype == dtype
    assert (output.double() - exact).square().mean() <= (torchs.double() - exact).square().mean() * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_exact_and_sums_float32_whatever_the_model_computes_in(dtype: torch.dtype) -> None:
    query, key = operands(2, 3, 30, 50, 16, dtype)
    rows = attention_map(query, key)
    torch.testing.assert_close(attention_received(query, key), rows.sum(1).float(), **CLOSE)
    torch.testing.assert_close(attention_entropy(query, key), entropy(rows).float(), **CLOSE)


def test_keys_may_serve_groups_of_heads() -> None:
    query, key = operands(2, 6, 9, 13, 8, groups=3)
    rows = attention_map(query, key)
    torch.testing.assert_close(attention_received(query, key), rows.sum(1).float(), **CLOSE)
    torch.testing.assert_close(attention_entropy(query, key), entropy(rows).float(), **CLOSE)


def test_the_log_sum_exp_of_attention_may_be_given_and_may_be_longer() -> None:
    query, key = operands(2, 4, 9, 13, 6)
    lse = (query @ key.mT * 0.3).logsumexp(-1)
    longer = torch.cat([lse, lse.new_full((2, 4, 23), torch.inf)], -1)  # as memory-efficient attention makes it
    for known in (lse, longer):
        for operator in (attention_received, attention_entropy):
            torch.testing.assert_close(
                operator(query, key, None, 0.3, lse=known), operator(query, key, None, 0.3), **CLOSE
            )


def test_shared_entropies_add_up_to_that_of_the_mixture_of_both_halves_over_disjoint_captions() -> None:
    query, key = operands(2, 4, 9, 13, 6)
    mixed = torch.cat([*(attention_map(query, key) / 2)], -1)
    both = scores.over_guidance_halves(attention_entropy(query, key, shared=True), average=False)
    torch.testing.assert_close(both, entropy(mixed).float().expand(2, -1), **CLOSE)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("score", [attention_received, attention_entropy])
def test_no_more_weights_than_a_block_are_in_memory(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    monkeypatch.setattr(attention_scores, "BLOCK", 4096)
    query, key = operands(1, 2, 256, 256, 8)
    with Largest() as largest:
        score._init_fn(query, key)
    assert largest.numbers <= max(4096, query.numel())


@pytest.mark.parametrize("score", [attention_and_received, attention_and_entropy])
def test_nor_are_they_with_the_output(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    monkeypatch.setattr(attention_scores, "BLOCK", 4096)
    query, key = operands(1, 2, 256, 256, 8)
    with Largest() as largest:
        score._init_fn(query, key, torch.randn_like(key))
    assert largest.numbers <= max(4096, query.numel())


@pytest.mark.parametrize("score", [attention_received, attention_entropy])
def test_operators_keep_torchs_contract(score: Any) -> None:
    torch.library.opcheck(score._opoverload, operands(2, 4, 9, 13, 6), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("score", [attention_and_received, attention_and_entropy])
def test_operators_with_an_output_keep_it_as_well(score: Any) -> None:
    given = (*operands(2, 4, 9, 13, 6), torch.randn(2, 4, 13, 5))
    torch.library.opcheck(score._opoverload, given, test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        score(*given)
    assert counter.get_total_flops() == 2 * 2 * 4 * 9 * 13 * (6 + 5)


@pytest.mark.parametrize("score", [attention_received, attention_entropy])
def test_a_score_takes_one_product_of_queries_and_keys(score: Any) -> None:
    with FlopCounterMode(display=False) as counter:
        score(*operands(2, 4, 9, 13, 6))
    assert counter.get_total_flops() == 2 * 2 * 4 * 9 * 13 * 6


def test_triton_scores_what_it_can_multiply() -> None:
    pytest.importorskip("triton")
    for dtype, name in ((torch.bfloat16, "attention_received_cuda_triton"), (torch.float64, "attention_received")):
        query = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
        on_cuda = type("OnCuda", (), {"device": torch.device("cuda"), "dtype": dtype})
        assert operator_for(on_cuda, "attention_received") is getattr(torch.ops.dicompile, name).default
        assert operator_for(query, "attention_received") is torch.ops.dicompile.attention_received.default
