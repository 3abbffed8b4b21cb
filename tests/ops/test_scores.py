"""Token scores against the formulas written out as loops.

The formulas are section 2 of the ToCa and DuCa notes: value norm, the unit length over tokens, and the bonus of the
best token of a cell. What attention tells, see `test_attention_scores`.
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
    *_, value = (tensor.to(torch.bfloat16) for tensor in qkv)
    assert scores.value_norm(value).dtype == torch.float32


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
@given(st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf]), min_size=1, max_size=12))
def test_places_are_those_of_a_stable_sort(numbers: list[float]) -> None:
    score = torch.tensor([numbers, numbers[::-1]])
    order = score.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores.places(score), order.argsort(-1))
    assert torch.equal(scores.places_of(order), order.argsort(-1))


def test_every_place_is_taken_once_even_if_scores_are_no_numbers() -> None:
    score = torch.tensor([[math.nan, 1.0, math.inf, math.nan, -math.inf]])
    assert scores.places(score).sort(-1).values.tolist() == [[0, 1, 2, 3, 4]]


@settings(deadline=None)
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
