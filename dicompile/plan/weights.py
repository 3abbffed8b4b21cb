"""Weights of stored values in forecasts."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Sequence

import numpy as np


def polynomial_weights(stored: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """Weights of stored values, newest first, in the polynomial through them, at `step` (Lagrange's form).

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the polynomial is evaluated.
        order: its degree at most.
    """
    times = stored[: order + 1]
    return tuple(math.prod((step - other) / (time - other) for other in times if other != time) for time in times)


def taylor_weights(stored: Sequence[int], step: int, order: int, hermite: float | None = None) -> tuple[float, ...]:
    """Weights of stored values, newest first, in a Taylor series at `step`.

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the series is evaluated.
        order: highest derivative. The k-th one is the difference of the last two of order k - 1 over the steps between
            the last two stored values, however the older ones are spaced, as in the reference code of TaylorSeer.
        hermite: scale c of the polynomials that stand in for powers of the distance x, ``c**k H_k(c x)``; None for the
            powers.
    """
    return _taylor_weights(tuple(stored[: order + 1]), step, order, hermite)


@functools.lru_cache(maxsize=4096)  # the sites of a step share theirs
def _taylor_weights(stored: tuple[int, ...], step: int, order: int, hermite: float | None) -> tuple[float, ...]:
    times = stored[::-1]
    older: list[np.ndarray] = []
    for number, time in enumerate(times):
        newer = [np.eye(len(times))[number]]
        for lower in older[:order]:
            newer.append((newer[-1] - lower) / (time - times[number - 1]))
        older = newer
    distance = step - times[-1]

    def power(k: int) -> float:
        return float(distance**k) if hermite is None else _scaled_hermite(distance, k, hermite)

    weights = sum(factor * power(k) / math.factorial(k) for k, factor in enumerate(older))
    return tuple(float(weight) for weight in np.asarray(weights)[::-1])


def _scaled_hermite(x: float, degree: int, scale: float) -> float:
    """``scale**k H_k(scale x)`` with the physicists' Hermite polynomial of degree k."""
    return float(scale**degree * np.polynomial.hermite.hermval(scale * x, np.eye(degree + 1)[degree]))


def chebyshev_weights(stored: Sequence[int], step: int, degree: int, ridge: float, span: int) -> tuple[float, ...]:
    """Weights of stored values, newest first, in the ridge regression on Chebyshev polynomials, at `step`.

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the fit is evaluated.
        degree: of the highest polynomial.
        ridge: strength of the regularisation, added to the diagonal of the normal equations.
        span: steps 0 to `span` are -1 to 1 to the polynomials.
    """
    basis = np.polynomial.chebyshev.chebvander(2 * np.array([*stored, step]) / span - 1, degree)
    known, wanted = basis[:-1], basis[-1]
    weights = np.linalg.solve(known.T @ known + ridge * np.eye(degree + 1), wanted) @ known.T
    return tuple(float(weight) for weight in weights)


def unrolled_weights(rows: Sequence[Sequence[float]], full: Container[int]) -> tuple[tuple[float, ...], ...]:
    """Weights of computed values alone, newest first, of forecasts that also build on earlier forecasts.

    Args:
        rows: per step, weights of the values of all steps before it, the oldest first, whether computed or forecast.
        full: steps that compute; the first one does. Their rows count for nothing.

    Returns:
        Per step, weights of the values computed before it; of steps that compute none.
    """
    values = np.zeros((len(rows), len(rows)))
    for step, row in enumerate(rows):
        values[step] = np.eye(len(rows))[step] if step in full else np.asarray(row[:step]) @ values[:step]
    computed = [step for step in range(len(rows)) if step in full]
    return tuple(
        () if step in full else tuple(float(value[other]) for other in reversed(computed) if other < step)
        for step, value in enumerate(values)
    )
