"""Training of cache predictors: what is learned, resumed, and written."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dicompile
from dicompile.errors import InvalidPredictor, InvalidTrainingData
from dicompile.learn.checkpoint import save_checkpoint
from dicompile.learn.predictor import PredictorOptions, PredictorTraining, train_predictor
from dicompile.learn.training import Files, run_to_end
from dicompile.learn.trajectory import Trajectories
from dicompile.policies import Predictor, TokenCache, load_predictor
from tests.learn.flows import recorded
from tests.models import Sample, dit
from tests.pipelines import pipes

STEPS = 6


@functools.cache
def flow() -> tuple[Sample, Trajectories]:
    """A model, and runs of it with a flow-matching sampler."""
    sample = dit(layers=3)
    return sample, recorded(sample, STEPS, 2)


def training(**options: Any) -> PredictorTraining:
    chosen = PredictorOptions(**{"iterations": 4, "calibration": 4, **options})
    sample, source = flow()
    return PredictorTraining(sample.model, source, chosen)


def trained(made: PredictorTraining, *arguments: Any, **more: Any) -> Predictor:
    run_to_end(made, *arguments, progress=False, **more)
    return made.predictor()


@pytest.mark.parametrize("kind", ["network", "table"])
def test_a_penalty_alone_lowers_the_importance_of_everything(kind: str) -> None:
    made = training(kind=kind, penalty=100.0, lr=0.05)
    start = made.predictor().importance.mean()
    predictor = trained(made)
    assert start == pytest.approx(0.88, abs=0.01)
    assert predictor.importance.mean() < start - 0.02
    assert predictor.importance.shape == (STEPS, 3, 64)


def test_the_backbone_gets_no_gradient_and_does_not_change() -> None:
    made = training(lr=0.1)
    module = made.model._plain.module
    before = [parameter.clone() for parameter in module.parameters()]
    trained(made)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_full_importance_is_the_teacher() -> None:
    made = training()
    inputs, stored = made.reach(flow()[1].all[0], 3, 2)
    ones = torch.ones(4, 64, 1)
    weights = [torch.stack([ones, 0 * ones])] * 3
    torch.testing.assert_close(made.model.blend(inputs, stored, weights), made.model.predict(inputs), atol=1e-5, rtol=0)


def test_tokens_blend_one_by_one() -> None:
    """A token of importance 0 in the last block keeps its stored update, whatever the others do."""
    made = training()
    inputs, stored = made.reach(flow()[1].all[0], 3, 1)
    alpha = torch.ones(3, 4, 64, 1)
    alpha[2, :, 5] = 0
    weights = [torch.stack([a, 1 - a]) for a in alpha]
    full = [torch.stack([torch.ones_like(a), torch.zeros_like(a)]) for a in alpha]
    mixed, fresh = (made.model.blend(inputs, stored, w) for w in (weights, full))
    others = [n for n in range(64) if n != 5]
    torch.testing.assert_close(mixed[:, others], fresh[:, others], atol=1e-6, rtol=0)
    _, now = made.model.record(inputs)
    torch.testing.assert_close(mixed[:, 5] - fresh[:, 5], (stored[2] - now[2])[:, 5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [0, 1])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(lora: int, tmp_path: Path) -> None:
    whole = trained(training(iterations=4, lora_blocks=lora))
    files = Files(checkpoint=tmp_path / "p.ckpt", log=tmp_path / "p.jsonl", every=2)
    trained(training(iterations=2, lora_blocks=lora), files)
    resumed = trained(training(iterations=4, lora_blocks=lora), files, resume=True)
    assert torch.equal(whole.importance, resumed.importance)
    assert bool(whole.adapters) == bool(lora)
    for name, adapter in whole.adapters.items():
        assert all(map(torch.equal, adapter, resumed.adapters[name]))
    assert all(torch.equal(whole.parameters[name], resumed.parameters[name]) for name in whole.parameters)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4
    for other in ({"penalty": 7.0}, {"lora_blocks": 1 - lora}):
        with pytest.raises(InvalidPredictor, match="belongs to another training"):
            trained(training(iterations=4, **{"lora_blocks": lora, **other}), files, resume=True)


def test_lora_weights_are_learned_with_the_predictor_and_nothing_else_is() -> None:
    made = training(lora_blocks=1, lora_rank=2, lr=1e-2)
    module = made.model._plain.module
    before = [parameter.clone() for parameter in module.parameters()]
    assert all("transformer_blocks.2." in name and "norm" not in name for name in made.model.adaptable)
    start = made.adapters.adapters()
    predictor = trained(made)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(bool(parameter.grad.any()) for parameter in made.adapters.parameters())
    assert predictor.adapters.keys() == start.keys() == made.model.adaptable.keys()
    assert len(start) == 6
    for name, adapter in predictor.adapters.items():
        assert (adapter.rank, bool(start[name].up.any()), bool(adapter.up.any())) == (2, False, True)
        assert not torch.equal(adapter.down, start[name].down)


def test_a_block_with_lora_weights_is_never_cached() -> None:
    made = training(kind="table", penalty=100.0, lr=0.05, lora_blocks=1, lora_rank=1)
    predictor = trained(made)
    assert torch.equal(predictor.importance[:, 2], torch.ones(STEPS, 64))
    assert predictor.importance[:, :2].mean() < 0.86
    assert all(row[2] == 64 for row in TokenCache(predictor, ratio=0.9).rules[0].do.counts)


def test_lora_weights_make_up_for_what_is_cached() -> None:
    """All but the last block are cached, and nothing else is learned: steps and runs are the same, errors fall."""

    def errors(lr: float) -> list[float]:
        made = training(kind="table", penalty=0.0, lr=lr, lora_blocks=1, lora_rank=4, max_gap=2)
        with torch.no_grad():
            for parameter in made.network.parameters():
                parameter.zero_()
            made.network.head[-1].bias.fill_(-30.0)  # importance of nothing
        return [made.advance().relative_error for _ in range(20)]

    learned, untrained = errors(5e-3), errors(0.0)
    assert learned[0] == untrained[0]
    assert sum(learned[10:]) < 0.97 * sum(untrained[10:])


def test_without_lora_weights_nothing_that_is_drawn_changes() -> None:
    """Options of what is not there, and weights that are drawn after everything else."""
    plain, other, lora = training(), training(lora_rank=3), training(lora_blocks=1)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, lora.network.state_dict()[name])
    assert [plain.advance() for _ in range(2)] == [other.advance() for _ in range(2)]
    assert not [*other.adapters.parameters()]
    assert not plain.predictor().adapters


@pytest.mark.parametrize(("blocks", "rank"), [(-1, 4), (1, 0), (3, 4)])
def test_lora_weights_that_cannot_be(blocks: int, rank: int) -> None:
    with pytest.raises(InvalidPredictor, match=r"cannot (have LoRA weights|be adapted)"):
        training(lora_blocks=blocks, lora_rank=rank)


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
        trained(made, Files(checkpoint=path), resume=True)
    assert caught.value.where == str(path)
    assert caught.value.fix == "remove it and train from the start"


def test_the_loss_falls_and_what_was_trained_samples_in_the_pipeline(tmp_path: Path) -> None:
    """Trained on the runs of a pipeline with guidance, and used by that pipeline."""
    sampler = pipes.dit()
    with dicompile.record_trajectories(sampler.pipe) as trajectories:
        sampler(STEPS)
    options = PredictorOptions(24, penalty=0.5, lr=2e-2, calibration=2)
    files = Files(log=tmp_path / "p.jsonl")
    train_predictor(sampler.pipe, trajectories, options, files=files, progress=False).save(tmp_path / "p.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    losses = [line["relative_error"] + 0.5 * line["importance"] for line in lines]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert load_predictor(tmp_path / "p.safetensors").facts.iterations == 24
    uncached = sampler(STEPS)
    dicompile.optimize(sampler.pipe, TokenCache(tmp_path / "p.safetensors", intervals=(1, 1)), backend="eager")
    cached = sampler(STEPS)
    assert dicompile.report(sampler.pipe).kinds["partial"] == 2
    assert 0 < (cached - uncached).norm() < 0.5 * uncached.norm()


def test_a_single_step_has_nothing_to_reuse() -> None:
    sample, _ = flow()
    with pytest.raises(InvalidPredictor, match="a run of one step"):
        PredictorTraining(sample.model, recorded(sample, 1, 1), PredictorOptions(1))


def test_a_predictor_is_for_calls_of_one_kind() -> None:
    sample, source = flow()
    halved = {
        **sample.inputs,
        "hidden_states": sample.inputs["hidden_states"][:2],
        "class_labels": torch.tensor([1, 2]),
    }
    other = recorded(Sample(sample.model, halved), STEPS, 1)
    mixed = Trajectories(source.model, source.sampler, source.timesteps, [*source.all[:1], *other.all])
    made = PredictorTraining(sample.model, mixed, PredictorOptions(1, batch=8))
    with pytest.raises(InvalidTrainingData, match="not like the first one"):
        made.advance()
