"""The recording and the blending graph: the model itself at the ends, differentiable between them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dicompile.errors import NoSitesFound
from dicompile.learn.graph import LearnableModel, learnable
from dicompile.plan import What
from tests.models import MODELS, Sample, plain_dit
from tests.uvit import uvit

EVERY = {**MODELS, "uvit": uvit}


def output_of(sample: Sample) -> Tensor:
    with torch.no_grad():
        output = sample.model(**sample.inputs)
    return output[0] if isinstance(output, tuple) else output


def constant(model: LearnableModel, fresh: float) -> list[Tensor]:
    return [torch.tensor([fresh, 1 - fresh]) for _ in model.sites]


def moved(sample: Sample) -> dict[str, object]:
    """Inputs of another step."""
    name, latent = next(iter(sample.inputs.items()))
    return {**sample.inputs, name: latent + 0.1 * torch.randn_like(latent)}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.sampled
def test_all_fresh_is_the_model_itself(name: str) -> None:
    sample = EVERY[name]()
    model, expected = learnable(sample.model, sample.inputs), output_of(sample)
    output, stored = model.record(sample.inputs)
    assert torch.equal(model.predict(sample.inputs), expected)
    assert torch.equal(output, expected)
    assert [tuple(value.shape) for value in stored] == [site.shape for site in model.sites]
    blended = model.blend(sample.inputs, [torch.randn_like(value) for value in stored], constant(model, 1.0))
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.sampled
def test_all_stored_gives_the_recorded_output_back(name: str) -> None:
    """With every value of the very same inputs stored, what is fresh does not matter."""
    sample = EVERY[name]()
    model = learnable(sample.model, sample.inputs)
    output, stored = model.record(sample.inputs)
    torch.testing.assert_close(model.blend(sample.inputs, stored, constant(model, 0.0)), output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "uvit"])
def test_gradients_of_the_weights_are_those_of_finite_differences(name: str) -> None:
    sample = EVERY[name]()
    sample.model.double()
    doubled = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in sample.inputs.items()
    }
    model = learnable(sample.model, doubled)
    _, stored = model.record(doubled)
    inputs = moved(Sample(sample.model, doubled))
    start = torch.rand(len(model.sites), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        return model.blend(inputs, stored, weights.unbind()).square().mean()

    torch.autograd.gradcheck(loss, start.requires_grad_(), fast_mode=True)


def test_parameters_and_stored_values_get_no_gradient() -> None:
    sample = plain_dit()
    model = learnable(sample.model, sample.inputs)
    _, stored = model.record(sample.inputs)
    weights = [pair.requires_grad_() for pair in constant(model, 0.5)]
    model.blend(sample.inputs, stored, weights).sum().backward()
    assert all(pair.grad is not None for pair in weights)
    assert all(parameter.grad is None for parameter in sample.model.parameters())
    assert not any(value.requires_grad for value in stored)


def test_parameters_are_read_at_every_call() -> None:
    sample = plain_dit()
    model = learnable(sample.model, sample.inputs)
    with torch.no_grad():
        sample.model.head.weight.zero_()
        sample.model.head.bias.fill_(3.0)
    assert torch.equal(model.predict(sample.inputs), torch.full((4, 4, 16, 16), 3.0))


def test_blocks_blend_token_by_token() -> None:
    """Tokens with weight one on the fresh value are the model's own while no attention mixes others in."""
    sample = plain_dit(layers=1)
    model = learnable(sample.model, sample.inputs, level="block", what=What.UPDATE, per_token=True)
    output, stored = model.record(sample.inputs)
    fresh = torch.zeros(4, 64, 1)
    fresh[:, :32] = 1.0
    noise = [torch.randn_like(value) for value in stored]
    blended = model.blend(sample.inputs, noise, [torch.stack([fresh, 1 - fresh])])
    torch.testing.assert_close(blended[:, :, :8], output[:, :, :8], rtol=0, atol=1e-6)
    assert not torch.isclose(blended[:, :, 8:], output[:, :, 8:]).all()


@pytest.mark.parametrize("level", ["site", "block"])
def test_a_model_in_bfloat16_stays_in_it_and_weights_in_float32(level: Literal["site", "block"]) -> None:
    sample = MODELS["sd3"](1)
    sample.model.bfloat16()
    inputs = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in sample.inputs.items()}
    per_token = level == "block"
    what = What.UPDATE if per_token else What.CORE
    model = learnable(sample.model, inputs, level=level, what=what, per_token=per_token)
    _, stored = model.record(inputs)
    shapes = [(2, site.shape[0], site.tokens.count, 1) if per_token else (2,) for site in model.sites]
    weights = [torch.rand(shape, requires_grad=True) for shape in shapes]
    output = model.blend(inputs, stored, weights)
    gradients = torch.autograd.grad(output.float().square().mean(), weights)
    assert output.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


@pytest.mark.nightly
def test_compiled_graphs_compute_the_same() -> None:
    sample = plain_dit(layers=1)
    model = learnable(sample.model, sample.inputs)
    compiled = learnable(sample.model, sample.inputs, compiled=True)
    _, stored = model.record(sample.inputs)
    weights = [torch.tensor([0.3, 0.7], requires_grad=True) for _ in model.sites]
    losses = [m.blend(moved(sample) | sample.inputs, stored, weights).square().mean() for m in (model, compiled)]
    grads = [torch.stack(torch.autograd.grad(loss, weights)) for loss in losses]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


# Mistakes -------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t.sin()[:, None]


def test_a_model_without_branches_has_nothing_to_learn() -> None:
    with pytest.raises(NoSitesFound, match="Plain has no site to learn for"):
        learnable(Plain(), {"x": torch.randn(2, 8), "t": torch.ones(2)})
