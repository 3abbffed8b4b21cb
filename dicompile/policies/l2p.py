"""L2P: what the model returns is a learned linear combination of all that it has returned so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from dicompile.errors import InvalidPolicy
from dicompile.outside import Unreadable, from_json, read_text
from dicompile.plan import Cadence, Fitted, Origin, Policy, Rule, unrolled_weights

FULL_STEPS = {
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    6: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    10: (0, 1, 2, 4, 12, 24, 38),
    16: (0, 1, 2, 4, 16, 32),
}
"""Steps that compute, of 50, by what the authors' code calls the interval."""


def L2P(
    weights: str | Path | Sequence[Sequence[float]],
    interval: int = 7,
    at: Sequence[int] = (),
) -> Policy:
    """Forecast what the model returns from all that it returned at earlier steps, and from forecasts of it.

    Nothing of the model runs between full steps. Forecasts are sums of computed values, so that only those are
    remembered, one for every full step. The weights hold for one model and number of steps. To learn weights of
    computed values for your own, without forecasts in between, see `dicompile.calibrate` and `Fitted`.

    Args:
        weights: file with the lower-triangular matrix that the authors' training writes (for FLUX.1-dev in 50 steps
            their repository has one, ``predictor/weight.txt``), or the matrix: row k has the weights of the values of
            steps 0 to k in the forecast of step k + 1.
        interval: names a published choice of full steps of 50: 5, 6, 7, 8, 10 or 16.
        at: numbers of the full steps instead, counted from 0.

    Raises:
        InvalidPolicy: this is no such matrix, or no choice of full steps has this name.

    Reference:
        Shen et al., Beyond Fixed Formulas: Data-Driven Linear Predictor for Efficient Diffusion Models,
        arXiv 2604.26365, and its code.
    """
    source = str(weights) if isinstance(weights, str | Path) else "weights"
    matrix = _read(Path(weights)) if isinstance(weights, str | Path) else weights
    if not _is_matrix(matrix):
        raise _no_matrix(source, "it is not a list of as many numbers for each step as there are steps")
    full = tuple(at) or FULL_STEPS.get(interval, ())
    if not full:
        raise InvalidPolicy(
            f"no choice of full steps is published for interval {interval}",
            where="L2P",
            fix=f"use one of {', '.join(map(str, FULL_STEPS))}, or name the steps: at=(0, 1, 2, 4, ...)",
        )
    rows = ((), *(tuple(row[: step + 1]) for step, row in enumerate(matrix[:-1])))
    table = Fitted(weights=unrolled_weights(rows, {0, *full}), what="stream", origin=Origin(file=source))
    return Policy(
        name=f"l2p-{len(matrix)}-{len(full)}",
        cadence=Cadence(at=full),
        rules=(Rule(sites=("model",), do=table),),
    )


def _read(path: Path) -> object:
    try:
        return from_json(read_text(path, InvalidPolicy) if path.is_file() else b"")
    except Unreadable as error:
        raise _no_matrix(str(path), str(error)) from None


def _is_matrix(value: object) -> TypeGuard[Sequence[Sequence[float]]]:
    """True for a square matrix of numbers that is not empty."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(row, Sequence) and len(row) == len(value) for row in value)
        and all(isinstance(entry, int | float) for row in value for entry in row)
    )


def _no_matrix(source: str, why: str) -> InvalidPolicy:
    return InvalidPolicy(
        "this is not a matrix of weights",
        where=source,
        why=why,
        fix="give a file [[w, 0, ...], [w, w, ...], ...] with a row and a column for every step",
    )
