"""Training of cache predictors: what is learned, resumed, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPredictor
from dicompile.learn.checkpoint import save_checkpoint
from dicompile.learn.graph import learnable
from dicompile.learn.latents import LATENTS
from dicompile.learn.predictor import PredictorOptions, PredictorTraining, train_predictor
from dicompile.learn.samplers import Ddim
from dicompile.learn.training import Files
from dicompile.plan import What
from dicompile.policies import TokenCache, load_predictor
from tests.models import dit

STEPS = 6


def training(**options: Any) -> PredictorTraining:
    sample = dit(layers=3)
    sample.inputs.pop("return_dict")
    inputs = {**sample.inputs, "return_dict": False}
    model = learnable(sample.model, inputs, level="block", what=What.UPDATE, per_token=True, result="stream")
    scheduler = DDIMScheduler(clip_sample=False)

    def data(generator: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(10, (4,), generator=generator)
        return {LATENTS: torch.randn(4, 4, 16, 16, generator=generator), "class_labels": labels}

    chosen = PredictorOptions(**{"iterations": 4, "calibration": 4, **options})
    return PredictorTraining(model, sample.model, Ddim(scheduler, STEPS), data, chosen, {"class_labels": 10})


@pytest.mark.parametrize("kind", ["network", "table"])
def test_a_penalty_alone_lowers_the_importance_of_everything(kind: str) -> None:
    made = training(kind=kind, penalty=100.0, lr=0.05)
    start = made.predictor().importance.mean()
    predictor = train_predictor(made, progress=False)
    assert start == pytest.approx(0.88, abs=0.01)
    assert predictor.importance.mean() < start - 0.02
    assert predictor.importance.shape == (STEPS, 3, 64)


def test_the_backbone_gets_no_gradient_and_does_not_change() -> None:
    made = training(lr=0.1)
    module = made.model._plain.module
    before = [parameter.clone() for parameter in module.parameters()]
    train_predictor(made, progress=False)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_full_importance_is_the_teacher() -> None:
    made = training()
    inputs, stored = made.reach(3, 2)
    ones = torch.ones(4, 64, 1)
    weights = [torch.stack([ones, 0 * ones])] * 3
    torch.testing.assert_close(made.model.blend(inputs, stored, weights), made.model.predict(inputs), atol=1e-5, rtol=0)


def test_tokens_blend_one_by_one() -> None:
    """A token of importance 0 in the last block keeps its stored update, whatever the others do."""
    made = training()
    inputs, stored = made.reach(3, 1)
    alpha = torch.ones(3, 4, 64, 1)
    alpha[2, :, 5] = 0
    weights = [torch.stack([a, 1 - a]) for a in alpha]
    full = [torch.stack([torch.ones_like(a), torch.zeros_like(a)]) for a in alpha]
    mixed, fresh = (made.model.blend(inputs, stored, w) for w in (weights, full))
    others = [n for n in range(64) if n != 5]
    torch.testing.assert_close(mixed[:, others], fresh[:, others], atol=1e-6, rtol=0)
    _, now = made.model.record(inputs)
    torch.testing.assert_close(mixed[:, 5] - fresh[:, 5], (stored[2] - now[2])[:, 5], atol=1e-5, rtol=0)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = train_predictor(training(iterations=4), progress=False)
    files = Files(checkpoint=tmp_path / "p.ckpt", log=tmp_path / "p.jsonl", every=2)
    train_predictor(training(iterations=2), files, progress=False)
    resumed = train_predictor(training(iterations=4), files, resume=True, progress=False)
    assert torch.equal(whole.importance, resumed.importance)
    assert all(torch.equal(whole.parameters[name], resumed.parameters[name]) for name in whole.parameters)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4
    with pytest.raises(InvalidPredictor, match="belongs to another training"):
        train_predictor(training(iterations=4, penalty=7.0), files, resume=True, progress=False)


@pytest.mark.parametrize("damage", ["junk", "lacking", "shorter"])
def test_a_damaged_checkpoint_is_one_of_a_predictor(damage: str, tmp_path: Path) -> None:
    made, path = training(kind="table"), tmp_path / "p.ckpt"
    if damage == "junk":
        path.write_bytes(b"junk")
    elif damage == "lacking":
        save_checkpoint({"key": made.key}, path)
    else:
        network = {name: value[:1] for name, value in made.network.state_dict().items()}
        save_checkpoint({"key": made.key, **made.state(), "network": network}, path)
    with pytest.raises(InvalidPredictor, match=r"is not a checkpoint|is damaged") as caught:
        train_predictor(made, Files(checkpoint=path), resume=True, progress=False)
    assert caught.value.where == str(path)
    assert caught.value.fix == "remove it and train from the start"


def test_what_was_trained_samples(tmp_path: Path) -> None:
    made = training(kind="network")
    train_predictor(made, progress=False).save(tmp_path / "p.safetensors")
    assert load_predictor(tmp_path / "p.safetensors").facts.iterations == 4
    sample = dit(layers=3)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    model = dicompile.optimize(sample.model, TokenCache(tmp_path / "p.safetensors"), schedule=scheduler, mode="eager")
    for timestep in scheduler.timesteps:
        output = model(**{**sample.inputs, "timestep": timestep.expand(4)})
    assert torch.isfinite(output[0]).all()
