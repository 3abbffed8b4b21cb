"""Which models let one sample of a batch see another, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dicompile.analysis import analyse, mixed_samples
from dicompile.capture import Capture
from tests import models
from tests.capture.captured import tiny
from tests.models import Sample

SAMPLES = 4


class Model(nn.Module):
    """A function of a latent with samples, and of positions that all of them share."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.function(x, positions)


def said_of(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    larger, smaller = (captured(Model(function), samples) for samples in (SAMPLES, SAMPLES // 2))
    given = [i for i, item in enumerate(larger.inputs) if item.name == "x"]
    return mixed_samples(larger, analyse(larger), given, smaller)


def captured(model: nn.Module, samples: int) -> Capture:
    return tiny(model.eval(), x=torch.randn(samples, 6, 8), positions=torch.randn(6, 8))


def attended(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p: torch.softmax(x + p, -1),
        lambda x, p: attended(x[:, None])[:, 0] + p,
        lambda x, p: torch.cat([x, p.expand(len(x), -1, -1)], 1),  # the same for every sample
        lambda x, p: x + torch.zeros(len(x), 1, 1) + torch.arange(6)[:, None],
        lambda x, p: (x.reshape(len(x) * 6, 8) @ p.T).reshape(len(x), 6, 6),
        lambda x, p: x.transpose(0, 1).cumsum(0).transpose(0, 1),  # over tokens
    ],
)
def test_samples_that_stay_apart(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert said_of(function) == ""


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, _: x - x.mean(0, keepdim=True), "aten.mean.dim combines all samples"),
        (lambda x, _: x.flip(0), "aten.flip.default reverses samples"),
        (lambda x, _: torch.cat([x[:1], x[1:]]), "aten.slice.Tensor takes a range of samples"),
        (lambda x, _: torch.cat(x.chunk(2)[::-1]), "splits the sample axis"),
        (lambda x, _: x + torch.arange(len(x))[:, None, None], "aten.arange.default depends on the size of the batch"),
        (lambda x, _: x * len(x), "aten.mul.Tensor depends on the size of the batch"),
        (lambda x, _: x + torch.full((len(x), 1, 1), float(len(x))), "aten.full.default depends on the size"),
        (lambda x, _: x + x[:, len(x) : len(x) + 1], "aten.slice.Tensor depends on the size of the batch"),
        (lambda x, p: x + p[len(x) : len(x) + 1], "aten.slice.Tensor depends on the size of the batch"),
        (lambda x, _: x + torch.rand_like(x), "draws random numbers"),
        (lambda x, _: x.reshape(-1, 8).softmax(0).reshape(x.shape), "normalises over samples"),
        (lambda x, _: x.transpose(0, 1), "result 0 has no rows of its own for every sample"),
        (lambda x, p: x + p[: len(x), :1, None], "depends on the size of the batch"),
        (lambda x, _: attended(x.transpose(0, 1)).transpose(0, 1), "attends over samples"),
    ],
)  # fmt: skip
@pytest.mark.sampled
def test_what_mixes_them_is_named(function: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    assert why in said_of(function)


@pytest.mark.parametrize("name", ["plain_dit", "pixart"])
def test_diffusion_transformers_keep_them_apart(name: str) -> None:
    sample = models.MODELS[name](layers=1)
    larger = models.capture(Sample(sample.model, {key: twice(value) for key, value in sample.inputs.items()}))
    given = [i for i, item in enumerate(larger.inputs) if item.role.is_given]
    assert mixed_samples(larger, analyse(larger), given, models.capture(sample)) == ""


def twice(value: object) -> object:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value
