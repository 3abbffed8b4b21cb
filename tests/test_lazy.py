"""Tensors whose memory holds the conjugate, or the negative, of their values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.lazy import is_lazy, resolved
from tests.models import PlainDiT, redraw, timesteps

STEPS = 2


def complex_numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def negative(seed: int, *shape: int) -> Tensor:
    """Random numbers as FFTs leave them: the imaginary part of a conjugate."""
    made = complex_numbers(seed, *shape).conj().imag
    assert made.is_neg()
    return made


class Shifted(PlainDiT):
    """Reads a negative of its own."""

    def __init__(self) -> None:
        super().__init__(1)
        self.shift = nn.Buffer(negative(0, 1, 4, 16, 16))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + self.shift, t, y)


LATENTS: dict[str, Callable[[int], Tensor]] = {
    "plain": lambda seed: complex_numbers(seed, 2, 4, 16, 16).imag,
    "negative": lambda seed: negative(seed, 2, 4, 16, 16),
    "one for both": lambda seed: negative(seed, 1, 4, 16, 16).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("way", ["optimize", "backend"])
def test_compiled_code_reads_values_and_not_memory(way: str) -> None:
    module = redraw(Shifted())
    if way == "optimize":
        model = dicompile.optimize(copy.deepcopy(module), "none", schedule=timesteps(STEPS))
    else:
        torch._dynamo.reset()
        model = torch.compile(copy.deepcopy(module), backend="dicache", options={"policy": "none", "steps": STEPS})
    model.shift = nn.Buffer(negative(0, 1, 4, 16, 16))  # a copy has none
    labels = torch.tensor([1, 2])
    for seed, make in enumerate(LATENTS.values()):
        for time in timesteps(STEPS):
            inputs = make(seed), torch.full((2,), time), labels
            with torch.no_grad():
                torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


def test_one_in_the_place_of_a_tensor_of_the_model_is_seen_and_the_other_way_round() -> None:
    module = redraw(Shifted())
    model = dicompile.optimize(copy.deepcopy(module), "none", schedule=timesteps(STEPS))
    plain = complex_numbers(2, 1, 4, 16, 16).imag  # laid out as the negative is
    for shift in (plain, negative(1, 1, 4, 16, 16), plain):
        module.shift = model.shift = nn.Buffer(shift)
        inputs = complex_numbers(0, 2, 4, 16, 16).imag, torch.full((2,), timesteps(STEPS)[0]), torch.tensor([1, 2])
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "tensor",
    [
        negative(0, 3, 4),
        negative(0, 3, 4).T,
        negative(0, 3, 1).expand(3, 4),
        negative(0, 3, 8)[:, ::2],
        negative(0),
        complex_numbers(0, 3, 4).conj().T,
    ],
)
def test_they_are_laid_out_as_they_were(tensor: Tensor) -> None:
    made = resolved(tensor)
    assert torch.equal(made, tensor) and made.stride() == tensor.stride()
    assert is_lazy(tensor) and not is_lazy(made)
