"""The search: best weights, errors from inner products, and dynamic programming held against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dicompile.learn.search import choose_steps, fit, histories, sensitivity, squared_error, step_errors

STEPS = 8


def curves(values: int = 3, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Values that move smoothly, [values, steps, 40]."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, steps)[:, None]
    made = [np.cos(4 * time * rng.normal(size=(1, 40))) + time**3 * rng.normal(size=(1, 40)) for _ in range(values)]
    return np.stack(made)


def gram(moving: np.ndarray) -> np.ndarray:
    return moving @ moving.swapaxes(-1, -2)


@pytest.mark.parametrize("history", [(3,), (3, 1), (3, 2, 0)])
def test_errors_are_those_of_the_forecasts_themselves(history: tuple[int, ...]) -> None:
    moving = curves()
    weights = fit(gram(moving), 5, history)
    forecast = np.einsum("vk,vkd->vd", weights, moving[:, list(history)])
    true = np.square(forecast - moving[:, 5]).sum(-1) / np.square(moving[:, 5]).sum(-1)
    assert squared_error(gram(moving), 5, history, weights) == pytest.approx(true, rel=1e-6)
    best = [np.linalg.lstsq(v[list(history)].T, v[5], rcond=None)[0] for v in moving]
    assert weights == pytest.approx(np.stack(best), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_polynomials_of_the_right_order_are_forecast_exactly(order: int) -> None:
    rng = np.random.default_rng(1)
    time = np.arange(STEPS)[:, None] / STEPS
    moving = sum(rng.normal(size=(1, 40)) * time**k for k in range(order + 1))[None]
    history = (4, 2, 0)[: order + 1]
    exact = squared_error(gram(moving), 6, history, fit(gram(moving), 6, history, ridge=1e-13))
    short = squared_error(gram(moving), 6, history[:-1], fit(gram(moving), 6, history[:-1], ridge=1e-13))
    assert exact.max() < 1e-9
    assert short.min() > 1e-6


def test_step_errors_are_those_of_every_history_of_two() -> None:
    matrix = gram(curves())
    found = step_errors(matrix, order=1)
    for j, t in itertools.combinations(range(STEPS), 2):
        for i in range(-1, STEPS):
            if i >= j:
                assert np.isinf(found[i + 1, j, t])
                continue
            history = (j,) if i < 0 else (j, i)
            expected = np.sqrt(squared_error(matrix, t, history, fit(matrix, t, history)).mean())
            assert found[i + 1, j, t] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def cost(full: tuple[int, ...], errors: np.ndarray) -> float:
    """Errors add up in a gap, their squares over gaps."""
    total = 0.0
    for before, at, after in zip((-1, *full), full, (*full[1:], errors.shape[1]), strict=False):
        total += sum(errors[before + 1, at, t] for t in range(at + 1, after)) ** 2
    return float(np.sqrt(total))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_steps_are_those_of_brute_force(seed: int) -> None:
    errors = step_errors(gram(curves(seed=seed)), order=1) * np.random.default_rng(seed).uniform(0.2, 2, STEPS)
    for number, choice in enumerate(choose_steps(errors), 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), number - 1)]
        assert len(choice.full) == number
        assert choice.error == pytest.approx(min(cost(full, errors) for full in every), abs=1e-12)
        assert choice.error == pytest.approx(cost(choice.full, errors), abs=1e-12)


def test_histories_are_the_latest_full_steps() -> None:
    assert histories((0, 2, 3), 6, order=1) == {1: (0,), 4: (3, 2), 5: (3, 2)}


def test_sensitivity_is_what_arrives_of_an_error_of_reuse() -> None:
    moving = curves()
    differences = np.linalg.norm(np.diff(moving, axis=1), axis=-1) / np.linalg.norm(moving[:, 1:], axis=-1)
    wrong = np.sqrt(np.square(differences).mean(0))
    assert sensitivity(gram(moving), np.append(0, 0.25 * wrong))[1:] == pytest.approx(np.full(STEPS - 1, 0.25))


def test_a_large_model_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    time = np.linspace(0, 1, 50)[:, None]
    one = np.cos(4 * time * rng.normal(size=(1, 60)))
    choices = choose_steps(step_errors(np.broadcast_to(one @ one.T, (114, 50, 50)), order=1))
    assert [len(choice.full) for choice in choices] == list(range(1, 51))
    assert all(first.error >= second.error for first, second in itertools.pairwise(choices))
