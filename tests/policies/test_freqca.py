"""FreqCa beside its rule written out with the transforms themselves, on the last hidden state of tiny models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import PolicyDoesNotFit
from dicompile.passes.low_band import low_part
from dicompile.plan import LowBand, Policy
from tests import models
from tests.models import Sample, optimized, timesteps

STEPS = 14
TIMES = timesteps(STEPS)
Basis = Literal["dct", "fft"]


def cosines(count: int) -> Tensor:
    """The orthonormal cosine transform, type II, in doubles."""
    k, i = torch.arange(count).double()[:, None], torch.arange(count).double()
    matrix = torch.cos(math.pi / count * (i + 0.5) * k) * math.sqrt(2 / count)
    matrix[0] /= math.sqrt(2)
    return matrix


def bands(value: Tensor, basis: Basis, cutoff: float, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Low and high frequencies of the tokens of a picture, [b, n, d], as the code of the authors splits them."""
    if basis == "fft":
        frequencies = torch.fft.fftfreq(value.shape[1]).abs()
        low = (frequencies <= cutoff * frequencies.max())[None, :, None]
        transformed = torch.fft.fft(value, dim=1)
        return torch.fft.ifft(transformed * low, dim=1).real, torch.fft.ifft(transformed * ~low, dim=1).real
    height, width = grid
    down, across = cosines(height), cosines(width)
    picture = value.double().transpose(1, 2).reshape(value.shape[0], -1, height, width)
    transformed = down @ picture @ across.T
    i, j = torch.arange(height).float(), torch.arange(width).float()
    magnitude = (i[:, None] ** 2 + j**2).sqrt()
    low = magnitude <= cutoff * magnitude.max()
    lows, highs = (
        (down.T @ (transformed * mask) @ across).reshape(value.shape[0], -1, height * width).transpose(1, 2).float()
        for mask in (low, ~low)
    )
    return lows, highs


@pytest.mark.parametrize("basis", ["dct", "fft"])
@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (5, 3), (10, 10)])
def test_a_few_waves_do_what_the_whole_transform_does(basis: Basis, cutoff: float, grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    count = grid[0] * grid[1]
    value = torch.randn(2, 3 + count + 1, 5, generator=generator)
    expected = torch.zeros_like(value)
    expected[:, 3 : 3 + count], _ = bands(value[:, 3 : 3 + count], basis, cutoff, grid)
    torch.testing.assert_close(low_part(value, LowBand(basis, cutoff), (3, count), grid), expected)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 3, 5, 9, 20), (1, 4, 4, 30)])
@pytest.mark.parametrize("radius", [0.0, 0.2, 0.4])
def test_a_circle_of_frequencies_is_that_of_the_transform(shape: tuple[int, ...], radius: float) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    height, width = shape[-2:]
    count = min(height, width) * round(radius * 10) // 10
    i, j = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    circle = i[:, None] ** 2 + j**2 <= count**2
    moved = torch.fft.fftshift(torch.fft.fft2(value), dim=(-2, -1)) * circle
    expected = torch.fft.ifft2(torch.fft.ifftshift(moved, dim=(-2, -1))).real
    torch.testing.assert_close(low_part(value, LowBand("fft2", radius), (0, 0)), expected)


def hermite(x: float, degree: int) -> float:
    before, value = 1.0, 2 * x
    for k in range(2, degree + 1):
        before, value = value, 2 * x * value - 2 * (k - 1) * before
    return 1.0 if degree == 0 else value


@dataclass
class Reference:
    """One run, as the code of the authors has it: factors of each band, newest last."""

    policy: dict[str, Any]
    grid: tuple[int, int]
    latest: int = 0
    factors: list[list[Tensor]] = field(default_factory=list)

    def is_full(self, step: int) -> bool:
        return step < self.policy["warmup"] or step - self.latest == self.policy["interval"]

    def store(self, step: int, value: Tensor) -> None:
        distance = self.latest - step
        made = []
        for number, band in enumerate(bands(value, self.policy["basis"], self.policy["cutoff"], self.grid)):
            factors = [band]
            for k in range(self.policy["order"]):
                old = self.factors[number] if self.factors else []
                if len(old) <= k or step <= self.policy["warmup"] - 2:
                    break
                factors.append((factors[k] - old[k]) / distance)
            made.append(factors)
        self.factors, self.latest = made, step

    def recall(self, step: int) -> Tensor:
        (low, *_), high = self.factors
        distance, scale = self.latest - step, self.policy["scale"]
        forecast = sum(
            factor * hermite(scale * distance, k) / math.factorial(k) * scale**k for k, factor in enumerate(high)
        )
        return low + forecast


def run(sample: Sample, options: dict[str, Any], grid: tuple[int, int], last: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the optimized model returns, and what the rule does by hooks around the norm after the last block."""
    policy = dicompile.FreqCa(**options, grid=grid if last == "norm_out" else None)
    model = optimized(sample, policy, STEPS)
    rule = Reference(options, grid)
    inputs = dict(sample.inputs)
    latent = next(name for name in ("hidden_states", "x") if name in inputs)
    time = next(name for name in ("timestep", "t") if name in inputs)
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(inputs[latent].shape, generator=generator) for _ in range(2))
    found, expected = [], []
    for step, now in enumerate(TIMES):
        divided = now / 1000 if inputs[time].is_floating_point() else now
        inputs |= {latent: start + (end - start) * step / STEPS, time: torch.full_like(inputs[time], divided)}

        def exchange(_: nn.Module, args: tuple[Any, ...], step: int = step) -> tuple[Any, ...] | None:
            if rule.is_full(step):
                rule.store(step, args[0])
                return None
            return (rule.recall(step), *args[1:])

        with torch.no_grad():
            found.append(model(**inputs)[0] if latent == "hidden_states" else model(**inputs))
            handle = sample.model.get_submodule(last).register_forward_pre_hook(exchange)
            expected.append(sample.model(**inputs)[0] if latent == "hidden_states" else sample.model(**inputs))
            handle.remove()
    full = [planned.kind == "full" for planned in dicompile.plan_of(model).steps]
    assert full == [step < 3 or (step - 2) % options["interval"] == 0 for step in range(STEPS)]
    return found, expected


@pytest.mark.parametrize(("basis", "cutoff"), [("dct", 0.1), ("dct", 0.5), ("fft", 0.1), ("fft", 0.4)])
@pytest.mark.sampled
def test_it_computes_as_published(basis: Basis, cutoff: float) -> None:
    torch.manual_seed(0)
    options = {"interval": 4, "basis": basis, "cutoff": cutoff, "order": 2, "scale": 0.71, "warmup": 3}
    found, expected = run(models.plain_dit(), options, (8, 8), "norm")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("basis", ["dct", "fft"])
def test_of_joint_streams_only_the_picture_is_split(basis: Basis) -> None:
    torch.manual_seed(0)
    options = {"interval": 4, "basis": basis, "cutoff": 0.3, "order": 2, "scale": 0.71, "warmup": 3}
    found, expected = run(models.flux(1), options, (4, 4), "norm_out")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_it_is_more_than_a_forecast() -> None:
    """Without low frequencies the rule is a forecast, with nothing else it is reuse."""
    torch.manual_seed(0)
    sample = models.plain_dit()
    options = {"interval": 4, "basis": "dct", "order": 2, "scale": 0.71, "warmup": 3}
    outputs = [run(sample, options | {"cutoff": cutoff}, (8, 8), "norm")[0][4] for cutoff in (0.0, 0.3, 1.0)]
    assert all(float((outputs[i] - outputs[j]).abs().max()) > 1e-3 for i, j in ((0, 1), (1, 2)))


def test_where_the_grid_is_unknown_a_cosine_transform_is_refused() -> None:
    sample = models.flux()  # packed tokens: rows and columns cannot be told from shapes
    with pytest.raises(PolicyDoesNotFit, match="tells low frequencies over the tokens from high ones") as caught:
        optimized(sample, dicompile.FreqCa(), STEPS)(**sample.inputs)
    assert "it has 16 tokens of the picture, and their grid is unknown" in str(caught.value)
    assert "set its grid, or basis='fft'" in str(caught.value)


def test_single_branches_have_no_picture() -> None:
    sample = models.plain_dit()
    policy = dicompile.FreqCa()
    rule = policy.rules[0].model_copy(update={"sites": ("mlp",), "do": dicompile.Bands(what="core")})
    with pytest.raises(PolicyDoesNotFit, match=r"which this branch does not allow"):
        optimized(sample, policy.model_copy(update={"rules": (rule,)}), STEPS)(**sample.inputs)


def test_it_goes_to_text_and_back() -> None:
    assert Policy.from_yaml(dicompile.FreqCa().to_yaml()) == dicompile.FreqCa()
