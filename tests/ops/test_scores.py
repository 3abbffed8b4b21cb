"""Token scores against the formulas written out as loops.

The formulas are section 2 of the ToCa and DuCa notes: s1 attention received, s2 entropy of the mixture of the guidance
halves, value norm, the unit length over tokens, and the bonus of the best token of a cell.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dicompile.ops import scores

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 4, 5, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, QUERIES, WIDTH),
        torch.randn(BATCH, HEADS, KEYS, WIDTH),
        torch.randn(BATCH, HEADS, KEYS, WIDTH),
    )


def map_by_loops(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> list[list[list[float]]]:
    """Softmax map averaged over heads, P[b][i][j]; a mask of True or 0 lets through, of False or -inf does not."""
    mean = [[[0.0] * KEYS for _ in range(QUERIES)] for _ in range(BATCH)]
    full = None if mask is None else mask.expand(BATCH, HEADS, QUERIES, KEYS)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(QUERIES):
                weights = []
                for j in range(KEYS):
                    logit = sum(float(query[b, h, i, c]) * float(key[b, h, j, c]) for c in range(WIDTH)) * scale
                    if full is not None and full.dtype == torch.bool:
                        logit = logit if bool(full[b, h, i, j]) else -math.inf
                    elif full is not None:
                        logit += float(full[b, h, i, j])
                    weights.append(math.exp(logit))
                for j in range(KEYS):
                    mean[b][i][j] += weights[j] / sum(weights) / HEADS
    return mean


def boolean_mask() -> Tensor:
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.6
    mask[..., 0] = True
    return mask


MASKS = {
    "none": lambda: None,
    "boolean": boolean_mask,
    "boolean per key": lambda: torch.tensor([True, False, True, True, False]).expand(BATCH, 1, 1, KEYS),
    "additive": lambda: torch.randn(BATCH, HEADS, QUERIES, KEYS),
    "additive with -inf": lambda: torch.where(boolean_mask(), 0.0, float("-inf")),
    "additive, half precision": lambda: torch.randn(1, 1, 1, KEYS).to(torch.bfloat16),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_attention_map_is_the_softmax_averaged_over_heads(
    qkv: tuple[Tensor, Tensor, Tensor], mask: str, scale: float | None
) -> None:
    query, key, _ = qkv
    given_mask = MASKS[mask]()
    expected = map_by_loops(query, key, given_mask, WIDTH**-0.5 if scale is None else scale)
    torch.testing.assert_close(scores.attention_map(query, key, given_mask, scale), torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_received_is_the_sum_over_queries_of_the_map(qkv: tuple[Tensor, Tensor, Tensor], mask: str) -> None:
    query, key, _ = qkv
    given_mask = MASKS[mask]()
    rows = map_by_loops(query, key, given_mask, WIDTH**-0.5)
    expected = [[sum(rows[b][i][j] for i in range(QUERIES)) for j in range(KEYS)] for b in range(BATCH)]
    received = scores.attention_received(query, key, given_mask, None)
    torch.testing.assert_close(received, torch.tensor(expected), **CLOSE)
    torch.testing.assert_close(received.sum(-1), torch.full((BATCH,), float(QUERIES)), **CLOSE)


def test_entropy_is_that_of_each_querys_row(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, _ = qkv
    rows = map_by_loops(query, key, None, WIDTH**-0.5)
    expected = [[-sum(p * math.log(p + 1e-7) for p in row) for row in sample] for sample in rows]
    entropy = scores.attention_entropy(query, key, None, None, shared=False)
    torch.testing.assert_close(entropy, torch.tensor(expected), **CLOSE)


def test_shared_entropies_add_up_to_that_of_the_mixture_of_both_halves_over_disjoint_captions(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, _ = qkv
    uncond, cond = map_by_loops(query, key, None, WIDTH**-0.5)
    mixed = [[0.5 * p for p in uncond[i]] + [0.5 * p for p in cond[i]] for i in range(QUERIES)]
    expected = torch.tensor([-sum(p * math.log(p + 1e-7) for p in row) for row in mixed])
    raw = scores.attention_entropy(query, key, None, None, shared=True)
    both = scores.over_guidance_halves(raw, average=False)
    torch.testing.assert_close(both, torch.stack([expected, expected]), **CLOSE)


def test_value_norm_is_the_sum_over_heads_of_one_minus_the_norm(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, value = qkv
    expected = [
        [
            sum(1 - math.sqrt(sum(float(value[b, h, j, c]) ** 2 for c in range(WIDTH))) for h in range(HEADS))
            for j in range(KEYS)
        ]
        for b in range(BATCH)
    ]
    torch.testing.assert_close(scores.value_norm(value), torch.tensor(expected), **CLOSE)


def test_scores_are_float32_whatever_the_model_computes_in(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = (tensor.to(torch.bfloat16) for tensor in qkv)
    assert scores.attention_received(query, key, None, None).dtype == torch.float32
    assert scores.attention_entropy(query, key, None, None, shared=True).dtype == torch.float32
    assert scores.value_norm(value).dtype == torch.float32
    torch.testing.assert_close(
        scores.attention_received(query, key, None, None),
        scores.attention_received(query.float(), key.float(), None, None),
        rtol=0,
        atol=0,
    )


def test_unit_length_is_per_sample_and_leaves_zeros_alone() -> None:
    score = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(scores.unit_length(score), torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]))


def test_guidance_halves_get_the_sum_or_the_mean_of_both() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    both = torch.tensor([[6.0, 8.0], [10.0, 12.0]])
    assert torch.equal(scores.over_guidance_halves(score, average=False), torch.cat([both, both]))
    assert torch.equal(scores.over_guidance_halves(score, average=True), torch.cat([both, both]) / 2)


@pytest.mark.parametrize("shared", [False, True])
def test_the_attention_base_is_the_mean_of_the_halves_at_unit_length(shared: bool) -> None:
    raw = torch.rand(4, 6)
    rows = [[(raw[b % 2][j] + raw[b % 2 + 2][j]) / 2 if shared else raw[b][j] for j in range(6)] for b in range(4)]
    expected = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in rows]
    torch.testing.assert_close(scores.base_from_attention(raw, shared=shared), torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
def test_the_entropy_base_is_one_plus_the_entropy_at_unit_length(shared: bool) -> None:
    raw = torch.rand(4, 6)
    rows = [[1 + (raw[b % 2][j] + raw[b % 2 + 2][j] if shared else raw[b][j]) for j in range(6)] for b in range(4)]
    expected = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in rows]
    torch.testing.assert_close(scores.base_from_entropy(raw, shared=shared), torch.tensor(expected), **CLOSE)


# Grid bonus -----------------------------------------------------------------------------------------------------------


def bonus_by_loops(score: Tensor, grid: tuple[int, ...], cell: int, bonus: float) -> Tensor:
    result, places = score.clone(), list(itertools.product(*map(range, grid)))
    for b in range(score.shape[0]):
        for corner in itertools.product(*(range(0, edge, cell) for edge in grid)):
            here = [place for place in places if all(0 <= p - c < cell for p, c in zip(place, corner, strict=True))]
            tokens = [places.index(place) for place in here]
            if tokens:
                best = max(tokens, key=lambda token: float(score[b, token]))  # the first one of equals
                result[b, best] += bonus * score[b, best]
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.booleans(),
)
@example(2, (4, 6), 2, 0, True)
@example(2, (3, 4, 5), 2, 0, False)  # a film, cut off along two axes
def test_the_best_token_of_every_cell_gets_the_bonus_and_of_equals_the_first(
    batch: int, grid: tuple[int, ...], cell: int, seed: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, math.prod(grid), generator=generator)
    score = score.round() if ties else score  # rounded scores are often equal
    found = scores.with_grid_bonus(score, grid, cell, 0.6)
    torch.testing.assert_close(found, bonus_by_loops(score, grid, cell, 0.6), rtol=0, atol=1e-6)


def test_equal_scores_give_the_bonus_to_the_upper_left_token_of_each_cell() -> None:
    found = scores.with_grid_bonus(torch.ones(1, 24), (4, 6), 2, 0.5)
    expected = torch.ones(4, 6)
    expected[::2, ::2] = 1.5
    assert torch.equal(found, expected.reshape(1, 24))


def test_a_negative_best_score_is_pushed_down_as_in_the_reference_code() -> None:
    assert torch.equal(
        scores.with_grid_bonus(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), (2, 2), 2, 0.5)[0, 0], torch.tensor(-1.5)
    )
