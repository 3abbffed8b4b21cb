"""Weights of forecasts: a Taylor series of backward differences, as a sum over what was stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.errors import InvalidPolicy
from dicompile.plan import (
    Action,
    Forecast,
    Spectral,
    Trend,
    What,
    chebyshev_weights,
    polynomial_weights,
    taylor_weights,
)
from dicompile.policies import HiCache


def by_recursion(stored: list[int], values: list[float], step: int, order: int) -> float:
    """TaylorSeer as it runs: at every full step each derivative is the difference of the last two of the one below."""
    factors: list[float] = []
    latest = None
    for time, value in zip(stored[::-1], values[::-1], strict=True):  # oldest first
        newer = [value]
        for number, old in enumerate(factors):
            if number < order and latest is not None:
                newer.append((newer[number] - old) / (time - latest))
        factors, latest = newer, time
    assert latest is not None
    return sum(factor * (step - latest) ** k / math.factorial(k) for k, factor in enumerate(factors))


histories = st.lists(st.integers(1, 6), min_size=0, max_size=5).map(
    lambda gaps: [-sum(gaps[:i]) for i in range(len(gaps) + 1)]
)
"""Steps of stored values, newest first, the newest one at 0."""


@settings(deadline=None)
@given(histories, st.integers(1, 8), st.integers(0, 4), st.data())
def test_weights_are_the_recursion_of_the_reference_code(
    stored: list[int], step: int, order: int, data: st.DataObject
) -> None:
    weights = taylor_weights(stored, step, order)
    # Differences of the highest order reach back as far as the order; older values are out of reach.
    reach = stored[: order + 1]
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(reach), max_size=len(reach)))
    expected = by_recursion(reach, values, step, order)
    assert np.dot(weights, values) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(histories, st.integers(1, 8), st.integers(0, 4))
def test_older_values_than_the_order_reaches_change_nothing(stored: list[int], step: int, order: int) -> None:
    values = [float(3 * t * t - t + 2) for t in stored]
    weights = taylor_weights(stored, step, order)
    assert len(weights) == min(order + 1, len(stored))
    expected = by_recursion(stored, values, step, order)
    assert np.dot(weights, values[: len(weights)]) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(histories, st.integers(1, 8), st.integers(0, 4), st.floats(-3, 3), st.floats(-3, 3))
def test_constants_are_always_exact_and_lines_from_the_first_order_on(
    stored: list[int], step: int, order: int, start: float, slope: float
) -> None:
    weights = taylor_weights(stored, step, order)
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    if len(weights) > 1:
        values = [start + slope * time for time in stored[: len(weights)]]
        assert np.dot(weights, values) == pytest.approx(start + slope * step, abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.data())
def test_equally_spaced_polynomials_are_continued_by_their_backward_differences(
    interval: int, order: int, ahead: int, data: st.DataObject
) -> None:
    """The k-th backward difference of a polynomial of degree k is exact; those below lag by half an interval."""
    polynomial = np.polynomial.Polynomial(
        data.draw(st.lists(st.integers(-3, 3), min_size=order + 1, max_size=order + 1))
    )
    stored = [-interval * age for age in range(order + 1)]
    values = polynomial(np.array(stored[::-1], dtype=float))
    terms = [np.diff(values, n=k)[-1] / interval**k * ahead**k / math.factorial(k) for k in range(order + 1)]
    highest = polynomial.coef[order] * ahead**order if len(polynomial.coef) > order else 0.0
    assert terms[-1] == pytest.approx(highest, abs=1e-6)
    assert np.dot(taylor_weights(stored, ahead, order), values[::-1]) == pytest.approx(sum(terms), abs=1e-6)


def test_the_order_builds_up_one_per_stored_value() -> None:
    actions = [Forecast(order=2).action([9, 6, 3, 0][-n:], 10) for n in range(1, 5)]
    assert [len(action.weights) for action in actions] == [2, 3, 4, 4]
    assert actions[0] == Action((0.0, 1.0))
    assert actions[1].weights == pytest.approx((0.0, 1 + 7 / 3, -7 / 3))  # stored at 3 and 0, wanted at 10


def test_of_order_zero_a_forecast_reuses() -> None:
    assert Forecast(order=0, what="update").action([4, 2], 6) == Action((0.0, 1.0), What.UPDATE)


@settings(deadline=None)
@given(histories, st.integers(1, 8), st.integers(0, 4), st.lists(st.floats(-2, 2), min_size=1, max_size=5))
def test_divided_differences_are_exact_on_polynomials_however_values_are_spaced(
    stored: list[int], step: int, order: int, coefficients: list[float]
) -> None:
    degree = min(order, len(stored) - 1)
    polynomial = np.polynomial.Polynomial(coefficients[: degree + 1])
    weights = polynomial_weights(stored, step, order)
    found = sum(weight * polynomial(time) for weight, time in zip(weights, stored, strict=False))
    assert len(weights) == degree + 1
    assert found == pytest.approx(polynomial(step), rel=1e-6, abs=1e-6 * sum(map(abs, weights)))


def test_a_forecast_takes_the_differences_that_it_names() -> None:
    uneven, step = (8, 7, 4), 10
    weights = {
        name: Forecast(order=2, differences=name).action(uneven, step).weights for name in ("backward", "divided")
    }
    assert weights["backward"] == (0.0, *taylor_weights(uneven, step, 2))
    assert weights["divided"] == (0.0, *polynomial_weights(uneven, step, 2))
    assert weights["backward"] != pytest.approx(weights["divided"])


def test_evenly_spaced_lines_do_not_tell_the_two_apart() -> None:
    assert taylor_weights((6, 3), 8, 1) == pytest.approx(polynomial_weights((6, 3), 8, 1))


# Other bases ----------------------------------------------------------------------------------------------------------


def hermite(x: float, degree: int) -> float:
    """The physicists' Hermite polynomials by their recurrence."""
    before, now = 0.0, 1.0
    for k in range(degree):
        before, now = now, 2 * x * now - 2 * k * before
    return now


@settings(deadline=None)
@given(histories, st.integers(1, 8), st.integers(0, 4), st.floats(0.2, 1), st.data())
def test_hicache_puts_scaled_hermite_polynomials_in_the_place_of_powers(
    stored: list[int], step: int, order: int, scale: float, data: st.DataObject
) -> None:
    """Its forecast is F_0 + sum of H_k(c x) c^k / k! times the k-th difference, as its code has it."""
    reach = stored[: order + 1]
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(reach), max_size=len(reach)))
    factors: list[float] = []
    for i, (time, value) in enumerate(zip(reach[::-1], values[::-1], strict=True)):
        newer = [value]
        for old in factors[:order]:
            newer.append((newer[-1] - old) / (time - reach[::-1][i - 1]))
        factors = newer
    x = step - stored[0]
    expected = sum(hermite(scale * x, k) * scale**k / math.factorial(k) * each for k, each in enumerate(factors))
    weights = taylor_weights(stored, step, order, scale)
    assert np.dot(weights, values) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert Forecast(order=order, hermite=scale).action(stored, step).weights == (0.0, *weights)


def test_divided_differences_and_hermite_polynomials_do_not_go_together() -> None:
    with pytest.raises(InvalidPolicy, match="takes backward differences"):
        Forecast(differences="divided", hermite=0.5)


def spectrum(times: list[int], values: list[float], step: int, degree: int, ridge: float, share: float) -> float:
    """Ridge regression as least squares with rows for the regularisation, mixed with the line through the last two."""
    design = np.array([[math.cos(k * math.acos(2 * t / 50 - 1)) for k in range(degree + 1)] for t in [*times, step]])
    augmented = np.vstack([design[:-1], math.sqrt(ridge) * np.eye(degree + 1)])
    found, *_ = np.linalg.lstsq(augmented, np.array([*values, *[0.0] * (degree + 1)]), rcond=None)
    line = values[-1]
    if len(times) > 1:
        line += (step - times[-1]) / (times[-1] - times[-2]) * (values[-1] - values[-2])
    return float(share * (design[-1] @ found) + (1 - share) * line)


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 30), min_size=1, max_size=9),
    st.integers(1, 20),
    st.integers(0, 6),
    st.floats(0, 1),
    st.data(),
)
def test_spectrum_is_a_ridge_regression_on_chebyshev_polynomials(
    steps: set[int], ahead: int, degree: int, share: float, data: st.DataObject
) -> None:
    times = sorted(steps)
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(times), max_size=len(times)))
    step = times[-1] + ahead
    action = Spectral(degree=degree, ridge=0.1, share=share).action(times[::-1], step)
    assert action.weights[0] == 0.0
    assert action.what is What.STREAM
    found = np.dot(action.weights[1:], values[::-1])
    assert found == pytest.approx(spectrum(times, values, step, degree, 0.1, share), rel=1e-6, abs=1e-6)


def test_a_weak_ridge_continues_the_polynomial() -> None:
    times = [0, 3, 5, 9, 12, 20]
    values = [0.5 * t**2 - t + 3 for t in times]
    weights = chebyshev_weights(times[::-1], 24, 2, 1e-9, 50)
    assert np.dot(weights, values[::-1]) == pytest.approx(0.5 * 24**2 - 24 + 3, rel=1e-5)


def test_values_from_before_a_step_are_left_out_of_the_differences() -> None:
    """The reference code of HiCache and FreqCa leaves out the first of three full steps at the start."""
    late = Forecast(order=2, since=1)
    assert late.action([2, 1, 0], 4) == Forecast(order=2).action([2, 1], 4)
    assert late.action([6, 2, 1, 0], 7) == Forecast(order=2).action([6, 2, 1], 7)
    assert late.action([0], 1).weights == (0.0, 1.0)
    assert HiCache(warmup=3).rules[0].do == Forecast(order=2, hermite=0.5, since=1)


@pytest.mark.parametrize(
    ("stored", "step", "weights"),
    [((4,), 5, (0.0, 1.0)), ((4, 3), 5, (0.0, 1.75, -0.75)), ((0, 0), 0, (0.0, 1.5, -0.5)), ((9, 8), 50, (0.0, 4, -3))],
)
def test_a_trend_goes_on_by_a_weight_that_grows(stored: tuple[int, ...], step: int, weights: tuple[float, ...]) -> None:
    assert Trend(weight=0.5, growth=0.05).action(stored, step).weights == pytest.approx(weights)
    assert Trend(weight=0.0).action(stored, step).weights == (0.0, 1.0)
