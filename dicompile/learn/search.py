"""Which steps to compute, and how to weigh what they stored: least squares and dynamic programming on inner products.

A value at step t that is forecast from the steps h of its history, ``sum_k w_k v(h_k)``, has the squared error
``G[t, t] - 2 w . G[h, t] + w' G[h, h] w``: everything follows from the Gram matrix `G` of the value.

Reference:
    The fitted weights are those of L2P, arXiv 2604.26365. Choosing steps by dynamic programming over recorded errors:
    CEM, which takes the error of a step by its distance alone; here it depends on the last two full steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RIDGE = 1e-6
"""Added to the diagonal of the normal equations, relative to it."""
RIDGES = tuple(10.0**k for k in range(-10, -1))
"""Ridges among which cross-validation chooses."""


def fit(gram: Array, step: int, history: Sequence[int], ridge: float = RIDGE) -> Array:
    """Best weights of the stored values of some steps for another step.

    Args:
        gram: [values, steps, steps], see the module docstring.
        step: that is forecast.
        history: steps that were stored, newest first.
        ridge: see `RIDGE`.

    Returns:
        [values, len(history)].
    """
    past = list(history)
    matrix = gram[:, past][:, :, past]
    scale = np.trace(matrix, axis1=1, axis2=2)[:, None, None] / len(past)
    damped = matrix + ridge * np.maximum(scale, np.finfo(np.float64).tiny) * np.eye(len(past))
    solution: Array = np.linalg.solve(damped, gram[:, past, step][..., None])[..., 0]
    return solution


def squared_error(gram: Array, step: int, history: Sequence[int], weights: Array) -> Array:
    """Squared relative error of forecasts; [values]. Arguments as `fit` takes and returns them."""
    past = list(history)
    cross, matrix = gram[:, past, step], gram[:, past][:, :, past]
    size = gram[:, step, step]
    error = size - 2 * (weights * cross).sum(-1) + np.einsum("vi,vij,vj->v", weights, matrix, weights)
    relative: Array = np.maximum(error, 0.0) / np.maximum(size, np.finfo(np.float64).tiny)
    return relative


def step_errors(gram: Array, order: int) -> Array:
    """Relative error, root mean square over the values, of every step from every pair of full steps before it.

    Args:
        gram: [values, steps, steps].
        order: 0 forecasts from the last stored value alone, otherwise from the last two.

    Returns:
        [steps + 1, steps, steps]: entry [i + 1, j, t] is the error at step t where j was the last full step and i the
        one before; i = -1 where there was none. Infinite where not i < j < t.
    """
    steps = gram.shape[-1]
    result = np.full((steps + 1, steps, steps), np.inf)
    i, j, t = (axis.ravel() for axis in np.meshgrid(*[np.arange(steps)] * 3, indexing="ij"))
    inside = (i < j) & (j < t)
    i, j, t = i[inside], j[inside], t[inside]
    near, after = np.triu_indices(steps, 1)
    alone, pairs = np.zeros(len(near)), np.zeros(len(i))
    for value in gram:
        size = np.maximum(np.diag(value), np.finfo(np.float64).tiny)
        alone += _error_of_one(value, size, near, after)
        if order:
            pairs += _error_of_two(value, size, i, j, t)
    result[0, near, after] = alone / len(gram)
    result[i + 1, j, t] = pairs / len(gram) if order else result[0, j, t]
    return np.sqrt(result)


def _error_of_one(gram: Array, size: Array, j: npt.NDArray[np.intp], t: npt.NDArray[np.intp]) -> Array:
    weight = gram[j, t] / (size[j] * (1 + RIDGE))
    error = size[t] - 2 * weight * gram[j, t] + weight**2 * size[j]
    return np.maximum(error, 0.0) / size[t]


def _error_of_two(
    gram: Array, size: Array, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp], t: npt.NDArray[np.intp]
) -> Array:
    damp = RIDGE * (size[i] + size[j]) / 2
    first, second, across = size[j] + damp, size[i] + damp, gram[i, j]
    determinant = first * second - across**2
    newer = (second * gram[j, t] - across * gram[i, t]) / determinant
    older = (first * gram[i, t] - across * gram[j, t]) / determinant
    error = size[t] - 2 * (newer * gram[j, t] + older * gram[i, t])
    error += newer**2 * size[j] + 2 * newer * older * across + older**2 * size[i]
    return np.maximum(error, 0.0) / size[t]


def sensitivity(gram: Array, reused: Array) -> Array:
    """How much of the relative error of the values at a step arrives in the model's output, [steps].

    Args:
        gram: of the values, [values, steps, steps].
        reused: relative error of the output at a step that takes all values from the step before, [steps].
    """
    steps = gram.shape[-1]
    now = np.arange(1, steps)
    size = np.maximum(gram[:, now, now], np.finfo(np.float64).tiny)
    moved = gram[:, now, now] + gram[:, now - 1, now - 1] - 2 * gram[:, now, now - 1]
    wrong = np.sqrt(np.mean(np.maximum(moved, 0.0) / size, axis=0))
    return np.append(1.0, reused[1:] / np.maximum(wrong, np.finfo(np.float64).tiny))


@dataclass(frozen=True, slots=True)
class Choice:
    """Full steps, and what is expected of them.

    Attributes:
        full: their numbers, the first is 0.
        error: expected of the last latent, relative to it.
    """

    full: tuple[int, ...]
    error: float


def choose_steps(errors: Array) -> tuple[Choice, ...]:
    """For every number of full steps those with which least is expected to be wrong in the end.

    Errors between two full steps point the same way and are added; those of different gaps are not, so their squares
    are.

    Args:
        errors: what the error of each step does to the last latent, relative to it; as `step_errors` arranges them.

    Returns:
        Choices of 1, 2, ... full steps, up to all.
    """
    steps = errors.shape[1]
    gaps = np.full((steps + 1, steps, steps + 1), np.inf)  # [i + 1, j, k]: cost of the steps between j and k
    for j in range(steps):
        between = np.cumsum(errors[: j + 1, j, j + 1 :], axis=-1) ** 2
        gaps[: j + 1, j, j + 1 :] = np.concatenate([np.zeros((j + 1, 1)), between], axis=-1)
    best = np.full((steps + 1, steps), np.inf)  # [i + 1, j]: of runs whose last full steps are i and j
    best[0, 0] = 0.0
    choices: list[Choice] = []
    origins: list[npt.NDArray[np.intp]] = []
    for _ in range(steps):
        ended = best + gaps[:, :, steps]
        last = np.unravel_index(np.argmin(ended), ended.shape)
        choices.append(Choice(_walk_back(origins, int(last[0]) - 1, int(last[1])), math.sqrt(ended[last])))
        reached = best[:, :, None] + gaps[:, :, :steps]
        origins.append(np.argmin(reached, axis=0))
        best = np.full_like(best, np.inf)
        best[1:] = np.min(reached, axis=0)
    return tuple(choices)


def _walk_back(origins: Sequence[npt.NDArray[np.intp]], before: int, last: int) -> tuple[int, ...]:
    """The full steps that lead to these last two."""
    path = [last]
    for origin in reversed(origins):
        path.append(before)
        before, last = int(origin[before, last]) - 1, before
    return tuple(reversed(path))


def joined(choices: Sequence[Choice], firsts: Sequence[int]) -> Choice:
    """Choices of denoisers that take over from each other, as one of the whole run: squares of their errors are added.

    Args:
        choices: of every denoiser, whose steps are counted from its own first one.
        firsts: first steps of the denoisers in the run.
    """
    full = (first + step for first, choice in zip(firsts, choices, strict=True) for step in choice.full)
    return Choice(tuple(full), math.hypot(*(choice.error for choice in choices)))


def histories(full: Sequence[int], steps: int, order: int, firsts: Collection[int] = ()) -> dict[int, tuple[int, ...]]:
    """For every step that is not full the latest full steps, newest first, at most ``order + 1`` of them.

    Args:
        full: numbers of the full steps.
        steps: of the run.
        order: see above.
        firsts: first steps of denoisers, which are full: none knows what another one has stored.
    """
    result: dict[int, tuple[int, ...]] = {}
    stored: tuple[int, ...] = ()
    for step in range(steps):
        if step in firsts:
            stored = ()
        if step in full:
            stored = (step, *stored)[: order + 1]
        else:
            result[step] = stored
    return result
