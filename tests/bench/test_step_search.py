"""How others choose full steps: each finds the best ones where brute force knows them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dicompile.bench.step_search import Annealing, anneal, least_cumulative_error, priors, reuse_loss
from dicompile.errors import InvalidSetting

STEPS = 10


def curves(spans: int = 2, seed: int = 0) -> np.ndarray:
    """Values that move smoothly, [spans, steps, 40]."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, STEPS)[:, None]
    made = [np.cos(5 * time * rng.normal(size=(1, 40))) + time**3 * rng.normal(size=(1, 40)) for _ in range(spans)]
    return np.stack(made)


def frontier(moving: np.ndarray) -> Any:
    """What the searches read of a recording."""
    gram = moving @ moving.swapaxes(-1, -2)
    effect = np.linspace(0.2, 1.0, STEPS) ** 2
    return SimpleNamespace(grams={"stack": gram}, output_gram=gram[0], effect=lambda level: effect)


def masks(full: int, fixed: int = 1) -> Iterator[tuple[int, ...]]:
    """All masks that compute the first steps."""
    for rest in itertools.combinations(range(fixed, STEPS), full - fixed):
        yield (*range(fixed), *rest)


@pytest.mark.parametrize("mask", [(0,), (0, 3, 4, 8), tuple(range(STEPS))])
def test_the_loss_is_that_of_values_taken_from_the_last_full_step(mask: tuple[int, ...]) -> None:
    moving = curves()
    effect = np.linspace(0.2, 1.0, STEPS) ** 2
    expected = 0.0
    for value in moving:
        taken = np.stack([value[max(full for full in mask if full <= step)] for step in range(STEPS)])
        wrong = (effect / np.linalg.norm(value, axis=1))[:, None] * (value - taken)
        expected += np.square(wrong.sum(0)).sum() / len(moving)
    assert reuse_loss(frontier(moving))(mask) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("full", [2, 4, 8])
def test_annealing_finds_the_best_mask(full: int, seed: int) -> None:
    loss = reuse_loss(frontier(curves(seed=seed)))
    found = anneal(loss, STEPS, full, Annealing(restarts=2, seed=seed))
    assert found == min(masks(full, max(1, full // 4)), key=loss)


def test_annealing_leaves_a_valley_that_climbing_does_not() -> None:
    """The best mask lies beyond worse ones: no single full step leads there by gain alone."""

    def loss(mask: tuple[int, ...]) -> float:
        return 0.0 if mask == (0, 7, 8, 9) else 1.0 + sum(mask) / 100

    climbed = anneal(loss, STEPS, 4, Annealing(iterations=0, jumps=0))
    assert climbed == (0, 1, 2, 3)
    assert anneal(loss, STEPS, 4, Annealing(iterations=2000)) == (0, 7, 8, 9)


def test_every_mask_is_asked_for_once_and_has_as_many_full_steps() -> None:
    asked = []

    def loss(mask: tuple[int, ...]) -> float:
        asked.append(mask)
        return float(sum(mask))

    anneal(loss, STEPS, 8)
    assert len(asked) == len(set(asked)) > 1
    assert {(len(set(mask)), mask[:2], mask == tuple(sorted(mask))) for mask in asked} == {(8, (0, 1), True)}


@pytest.mark.parametrize("weight", ["none", "linear", "quadratic"])
@pytest.mark.parametrize(("full", "spread"), [(4, 1), (4, 9), (5, 1), (6, 9)])
def test_programming_finds_the_least_cumulative_error(full: int, spread: int, weight: Any) -> None:
    prior = priors(frontier(curves(seed=full)))
    power = ("none", "linear", "quadratic").index(weight)

    def cost(mask: tuple[int, ...]) -> float:
        pairs = list(itertools.pairwise(mask))
        return sum((k - j - 1) ** power * prior[k - j - 1, : k + 1].sum() for j, k in pairs)

    near = round(STEPS / full)
    allowed = [
        mask for mask in masks(full)
        if mask[-1] == STEPS - 1 and all(abs(k - j - near) <= spread for j, k in itertools.pairwise(mask))
    ]  # fmt: skip
    found = least_cumulative_error(prior, full, spread, weight)
    assert found in allowed
    assert cost(found) == pytest.approx(min(map(cost, allowed)))


def test_priors_are_one_minus_the_cosine() -> None:
    moving = curves()
    prior, value = priors(frontier(moving)), moving[0]
    assert prior.shape == (STEPS, STEPS)
    for distance, step in ((1, 1), (3, 7), (9, 9)):
        now, before = value[step], value[step - distance]
        assert prior[distance, step] == pytest.approx(1 - now @ before / np.linalg.norm(now) / np.linalg.norm(before))
    assert not prior[4, :4].any()
    assert not prior[0].any()


def test_gaps_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="no 2 full steps of 10 are 4 to 6 steps apart"):
        least_cumulative_error(priors(frontier(curves())), 2)
