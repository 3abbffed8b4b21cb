"""The demo's measures, against values that can be written down."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.demo import metrics, shapes
from dicompile.errors import DicompileError

PICTURES = torch.zeros(2, 3, 4, 4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(mean: torch.Tensor, root: torch.Tensor, count: int = 200) -> torch.Tensor:
    """Features whose sample mean is exactly ``mean`` [d] and sample covariance exactly ``root root^T`` [d, d]."""
    raw = torch.randn(count, len(mean), generator=generator(0), dtype=torch.float64)
    raw = raw - raw.mean(0)
    root_of_raw = torch.linalg.cholesky(torch.cov(raw.T).reshape(len(mean), -1))
    white = torch.linalg.solve_triangular(root_of_raw, raw.T, upper=False).T
    return white @ root.double().T + mean.double()


@pytest.mark.parametrize(("error", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (1.0, 6.0206)])
def test_psnr_of_a_constant_error(error: float, decibels: float) -> None:
    assert metrics.psnr(PICTURES + error, PICTURES) == pytest.approx(decibels, abs=1e-4)


def test_psnr_of_equal_pictures_is_infinite() -> None:
    assert metrics.psnr(PICTURES, PICTURES) == math.inf


def test_the_mean_over_pictures_takes_each_by_itself() -> None:
    pictures = PICTURES + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert metrics.mean_psnr(pictures, PICTURES) == pytest.approx(30.0, abs=1e-4)
    assert metrics.psnr(pictures, PICTURES) == pytest.approx(22.97, abs=0.01)


def test_psnr_pools_the_error_of_the_batch() -> None:
    half = PICTURES.clone()
    half[0] += 0.2
    assert metrics.psnr(half, PICTURES) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_relative_error_is_relative() -> None:
    reference = torch.full((2, 3, 4, 4), 0.5)
    assert metrics.relative_error(reference * 1.1, reference) == pytest.approx(0.1, rel=1e-5)
    assert metrics.relative_error(reference, reference) == 0


def test_accuracy_counts_all_attributes_together_and_each() -> None:
    labels = torch.arange(4)
    predicted = [index.clone() for index in shapes.attributes_of(labels)]
    predicted[0][0] += 1
    predicted[1][0] += 1
    predicted[2][1] += 1
    found = metrics.accuracy(shapes.Attributes(*predicted), labels)
    assert found == metrics.Accuracy(every=0.5, shape=0.75, colour=0.75, texture=0.75)
    assert metrics.is_right(shapes.Attributes(*predicted), labels).tolist() == [False, False, True, True]


def test_frechet_distance_to_itself_is_zero() -> None:
    features = torch.randn(300, 8, generator=generator(1))
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(300, 8, generator=generator(1), dtype=torch.float64)
    shift = torch.arange(8.0, dtype=torch.float64)
    expected = shift.square().sum().item()
    assert metrics.frechet_distance(features + shift, features) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances_is_a_sum_over_axes() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    zero = torch.zeros(3)
    distance = metrics.frechet_distance(features_of(zero, first.diag()), features_of(zero, second.diag()))
    assert distance == pytest.approx((first - second).square().sum().item(), rel=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """For 2x2, tr((C1 C2)^(1/2)) = sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2)))."""
    first, second = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    mean = torch.tensor([3.0, -4.0])
    one, two = first @ first.T, second @ second.T
    assert not torch.allclose(one @ two, two @ one)
    root = torch.sqrt((one @ two).trace() + 2 * torch.sqrt(torch.det(one @ two)))
    expected = 25 + (one.trace() + two.trace() - 2 * root).item()
    distance = metrics.frechet_distance(features_of(mean, first), features_of(torch.zeros(2), second))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_scalar_features() -> None:
    one = features_of(torch.tensor([1.0]), torch.tensor([[2.0]]))
    two = features_of(torch.tensor([0.0]), torch.tensor([[5.0]]))
    assert metrics.frechet_distance(one, two) == pytest.approx(1 + 9, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 12), width=st.integers(1, 6))
def test_frechet_distance_is_symmetric_and_not_negative(seed: int, rows: int, width: int) -> None:
    """Also with fewer rows than columns, where a covariance is singular."""
    source = generator(seed)
    one, two = torch.randn(rows, width, generator=source), torch.randn(9, width, generator=source) * 2 + 1
    distance = metrics.frechet_distance(one, two)
    assert distance >= 0
    assert distance == pytest.approx(metrics.frechet_distance(two, one), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ((1, 4), (9, 4), "features [1, 4]"),
        ((9, 4), (1, 4), "reference [1, 4]"),
        ((9, 3), (9, 4), "features [9, 3]"),
        ((9,), (9, 4), "features [9]"),
    ],
)
def test_frechet_distance_names_the_matrix_that_does_not_fit(
    first: tuple[int, ...], second: tuple[int, ...], where: str
) -> None:
    with pytest.raises(DicompileError) as caught:
        metrics.frechet_distance(torch.zeros(first), torch.zeros(second))
    assert str(caught.value) == (
        "frechet_distance needs two matrices of equal width with at least two rows each\n"
        f"  where: {where}\n"
        "  why:   a covariance needs two samples, and both Gaussians live in one feature space\n"
        "  fix:   pass features [n, d] and reference [m, d], n and m at least 2"
    )
