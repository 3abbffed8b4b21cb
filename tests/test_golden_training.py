"""The plug-in for recorded training iterations reads batches by their names; there is no public recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.errors import InvalidTrainingData
from tests.golden_plugin import make_train
from tests.models import Sample, dit

SITES = 6
NAMES = (
    ("full.hidden_states", "full.timestep", "cache.hidden_states", "cache.timestep", "class_labels", "logits", "l1"),
    ("x_full", "t_full", "x_cache", "t_cache", "y", "router_logits", "lambda"),
    ("hidden_states_f", "timestep_f", "hidden_states_c", "timestep_c", "labels", "w", "lam"),
    ("xf", "tf", "xc", "tc", "y", "row", "lambda"),
)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    return dit()


def batch(sample: Sample, names: tuple[str, ...]) -> dict[str, Tensor]:
    x, t, y = (sample.inputs[name] for name in ("hidden_states", "timestep", "class_labels"))
    generator = torch.Generator().manual_seed(1)
    near = x + 0.3 * torch.randn(x.shape, generator=generator)
    logits = torch.randn(SITES, generator=generator)
    return dict(zip(names, (x, t, near, t - 20, y, logits, torch.tensor(1e-4)), strict=True))


def by_hooks(sample: Sample, given: dict[str, Tensor], threshold: float | None) -> dict[str, Tensor]:
    """The same iteration on diffusers modules: outputs of attention and MLP before their gates."""
    x, t, near, later, y, row, penalty = given.values()
    logits = row.clone().requires_grad_()
    beta, stored, number = logits.sigmoid(), {}, iter(())
    mode = "record"

    def hook(*arguments: Any) -> Tensor:
        site, fresh = next(number), arguments[-1]
        if mode == "record":
            stored[site] = fresh
        gate = beta if threshold is None else (beta > threshold).float() + beta - beta.detach()
        return gate[site] * fresh + (1 - gate[site]) * stored[site] if mode == "blend" else fresh

    modules = [m for block in sample.model.transformer_blocks for m in (block.attn1, block.ff)]
    handles = [module.register_forward_hook(hook) for module in modules]

    def forward(latent: Tensor, timestep: Tensor) -> Tensor:
        nonlocal number
        number = iter(range(SITES))
        return sample.model(latent, timestep=timestep, class_labels=y, return_dict=False)[0]

    with torch.no_grad():
        forward(x, t)
        mode = "plain"
        teacher = forward(near, later)
    mode = "blend"
    student = forward(near, later)
    for handle in handles:
        handle.remove()
    loss = (teacher - student).square().mean() + penalty * beta.sum()
    return {"student": student.detach(), "loss": loss.detach(), "grad": torch.autograd.grad(loss, logits)[0]}


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_a_recorded_iteration_is_repeated(sample: Sample, names: tuple[str, ...], threshold: float | None) -> None:
    given = batch(sample, names)
    policy = {"name": "l2c", "threshold": 0.1, "ste_threshold": threshold}
    meta = {"case": "mine", "policy": policy, "train_inputs": list(given)}
    result, expected = make_train(sample.model, meta)(given), by_hooks(sample, given, threshold)
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-4, atol=1e-7)


def test_lambda_may_stand_in_the_description_and_logits_in_a_table(sample: Sample) -> None:
    given = batch(sample, NAMES[0])
    expected = make_train(sample.model, {"case": "mine"})(given)
    del given["l1"]
    given["logits"] = torch.stack([torch.zeros(SITES), given["logits"]])
    given["index"] = torch.tensor(1)
    result = make_train(sample.model, {"case": "mine", "policy": {"training": {"l1": 1e-4}}})(given)
    assert torch.equal(result["grad"][1], expected["grad"])
    assert not result["grad"][0].any()


@pytest.mark.parametrize("lost", ["logits", "l1", "cache.hidden_states", "full.timestep"])
def test_what_is_missing_is_said_with_what_is_there(sample: Sample, lost: str) -> None:
    given = {name: value for name, value in batch(sample, NAMES[0]).items() if name != lost}
    with pytest.raises(InvalidTrainingData, match="names no") as caught:
        make_train(sample.model, {"case": "mine"})(given)
    assert "class_labels [4]" in caught.value.why
