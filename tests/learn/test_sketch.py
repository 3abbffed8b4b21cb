"""Sketches: linear, seeded, and inner products stay near what they were."""

from __future__ import annotations

import pytest
import torch

from dicompile.learn.sketch import WIDTH, Sketcher, gram_of


def path(shape: tuple[int, ...], steps: int = 4) -> list[torch.Tensor]:
    """Values that turn slowly from one direction into another."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for _ in range(2))
    return [first * (1 - 0.1 * t) + second * 0.1 * t for t in range(steps)]


def test_inner_products_stay_near_the_exact_ones() -> None:
    values = path((2, 100, 256))
    values[0][:, :, 7] *= 100  # a channel that is far larger than all others, as trained models have
    exact = torch.stack(values).flatten(1).double()
    exact = exact @ exact.T
    sketch = Sketcher()
    found = gram_of(torch.stack([sketch(value) for value in values])[None])[0]
    size = exact.diagonal().sqrt()
    assert ((found - exact) / (size[:, None] * size[None])).abs().max() < 0.1
    assert found.dtype == torch.float64


def test_small_errors_of_a_forecast_are_found_in_sketches() -> None:
    values = path((2, 100, 256))
    sketch = Sketcher()
    wrong = values[2] - 2 * values[1] + values[0] + 1e-4 * values[3]
    sketched = sketch(values[2]) - 2 * sketch(values[1]) + sketch(values[0]) + 1e-4 * sketch(values[3])
    assert float(sketched.norm()) == pytest.approx(float(wrong.norm()), rel=0.1)


def test_small_values_are_kept_exactly() -> None:
    value = torch.randn(3, 5)
    assert torch.equal(Sketcher()(value), value.flatten())
    assert len(Sketcher()(torch.randn(WIDTH + 1))) == WIDTH


def test_they_are_seeded() -> None:
    value = torch.randn(2 * WIDTH)
    assert torch.equal(Sketcher(1)(value), Sketcher(1)(value))
    assert not torch.equal(Sketcher(1)(value), Sketcher(2)(value))
