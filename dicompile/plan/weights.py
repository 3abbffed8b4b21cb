"""Weights of stored values in forecasts."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def taylor_weights(stored: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """Weights of stored values, newest first, in a Taylor series at `step`.

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the series is evaluated.
        order: highest derivative. The k-th one is the difference of the last two of order k - 1 over the steps between
            the last two stored values, however the older ones are spaced, as in the reference code of TaylorSeer.
    """
    times = list(stored[: order + 1])[::-1]
    older: list[np.ndarray] = []
    for number, time in enumerate(times):
        newer = [np.eye(len(times))[number]]
        for lower in older[:order]:
            newer.append((newer[-1] - lower) / (time - times[number - 1]))
        older = newer
    distance = step - times[-1]
    weights = sum(factor * distance**k / math.factorial(k) for k, factor in enumerate(older))
    return tuple(float(weight) for weight in np.asarray(weights)[::-1])
