"""Trajectories: what the denoiser of the user's own pipeline was called with, in runs that nothing was cached in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import InvalidTrainingData, NotOptimized
from tests.models import PlainDiT, plain_dit, timesteps
from tests.pipelines import pipes

STEPS = 4


def heard(module: nn.Module) -> list[dict[str, Any]]:
    """What a module is called with from now on."""
    calls: list[dict[str, Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


@pytest.fixture(scope="module")
def trajectories() -> dicompile.Trajectories:
    sampler = pipes.flux()
    with dicompile.record_trajectories(sampler.pipe) as recorded:
        sampler(STEPS, seed=1)
        sampler(STEPS, seed=2)
    return recorded


def test_it_is_what_the_denoiser_was_called_with(trajectories: dicompile.Trajectories) -> None:
    sampler = pipes.flux()
    calls = heard(sampler.pipe.transformer)
    sampler(STEPS, seed=2)
    assert trajectories.timesteps == tuple(sampler.scheduler.timesteps.tolist())
    assert (trajectories.model, trajectories.sampler) == ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler")
    assert [one.run for one in trajectories.all] == [0, 1]
    for call, expected in zip(trajectories.all[1].calls, calls, strict=True):
        assert call.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(call[name], value, rtol=1e-4, atol=1e-5)
            else:
                assert call[name] == value


def test_what_stays_the_same_is_kept_once(trajectories: dicompile.Trajectories) -> None:
    first, last = trajectories.all[0].calls[0], trajectories.all[0].calls[-1]
    assert first["encoder_hidden_states"] is last["encoder_hidden_states"]
    assert first["hidden_states"] is not last["hidden_states"]
    moving = sum(
        call[name].nbytes for one in trajectories.all for call in one.calls for name in ("hidden_states", "timestep")
    )
    still = sum(v.nbytes for one in trajectories.all for k, v in one.calls[0].items() if isinstance(v, Tensor))
    assert moving < trajectories.nbytes < moving + still


def test_the_pipeline_is_as_it_was() -> None:
    sampler = pipes.flux()
    transformer, uncached = sampler.pipe.transformer, sampler(STEPS)
    with dicompile.record_trajectories(sampler.pipe):
        assert torch.allclose(sampler(STEPS), uncached, atol=1e-5)
    assert sampler.pipe.transformer is transformer
    assert not transformer._forward_pre_hooks


def test_guidance_contexts_are_trajectories_of_their_own() -> None:
    sample = plain_dit(layers=1)
    model = dicompile.optimize(sample.model, "none", schedule=timesteps(3), backend="eager")
    with dicompile.record_trajectories(model) as recorded:
        for time in timesteps(3):
            for labels in ([1, 2, 3, 4], [10, 10, 10, 10]):
                model(sample.inputs["x"], torch.full((4,), time), torch.tensor(labels))
    assert [one.calls[0]["y"].tolist() for one in recorded.all] == [[1, 2, 3, 4], [10, 10, 10, 10]]
    assert [int(call["t"][0]) for call in recorded.all[1].calls] == timesteps(3)


def test_what_a_loop_writes_to_later_is_kept_as_it_was() -> None:
    sample = plain_dit(layers=1)
    model = dicompile.optimize(sample.model, "none", schedule=timesteps(3), backend="eager")
    latent, before = sample.inputs["x"].clone(), []
    with dicompile.record_trajectories(model) as recorded:
        for time in timesteps(3):
            before.append(latent.clone())
            model(latent, torch.full((4,), time), sample.inputs["y"])
            latent.mul_(0.5)
    for call, expected in zip(recorded.all[0].calls, before, strict=True):
        assert torch.equal(call["x"], expected)


@dataclass
class Condition:
    """An object of no class that pytree knows."""

    scale: Tensor


class Conditioned(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, condition: Condition) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y) * condition.scale


def test_objects_are_copied_with_what_they_hold() -> None:
    model = dicompile.optimize(Conditioned(1).eval(), "none", schedule=timesteps(3), backend="eager")
    condition = Condition(torch.ones(()))
    with dicompile.record_trajectories(model) as recorded:
        for time in timesteps(3):
            model(torch.randn(4, 4, 16, 16), torch.full((4,), time), torch.tensor([1, 2, 3, 4]), condition)
    condition.scale.mul_(2)
    kept = [call["condition"] for call in recorded.all[0].calls]
    assert all(type(one) is Condition and float(one.scale) == 1 for one in kept)


def test_a_file_holds_all_of_it(trajectories: dicompile.Trajectories, tmp_path: Path) -> None:
    trajectories.save(tmp_path / "t.pt")
    read = dicompile.Trajectories.load(tmp_path / "t.pt")
    assert str(read) == str(trajectories)
    for mine, theirs in zip(read.all, trajectories.all, strict=True):
        for call, expected in zip(mine.calls, theirs.calls, strict=True):
            assert all(torch.equal(call[k], v) if isinstance(v, Tensor) else call[k] == v for k, v in expected.items())
    read.add(trajectories)
    assert [one.run for one in read.all] == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [None, b"junk"])
def test_another_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "t.pt").write_bytes(content)
    with pytest.raises(InvalidTrainingData, match=r"t\.pt holds none"):
        dicompile.Trajectories.load(tmp_path / "t.pt")


def test_runs_of_other_steps_do_not_go_together(trajectories: dicompile.Trajectories) -> None:
    sampler = pipes.flux()
    with dicompile.record_trajectories(sampler.pipe) as others:
        sampler(STEPS + 1)
    with pytest.raises(InvalidTrainingData, match="different models or samplers"):
        others.add(trajectories)
    stream = dicompile.Stream(sampler.pipe, lambda number: sampler(2 + number), every=1)
    stream.at(0)
    with pytest.raises(InvalidTrainingData, match="runs of one stream differ"):
        stream.at(1)


def test_runs_of_one_recording_have_the_same_timesteps() -> None:
    sampler = pipes.flux()
    with (
        pytest.raises(InvalidTrainingData, match="runs of one recording differ"),
        dicompile.record_trajectories(sampler.pipe),
    ):
        sampler(STEPS)
        sampler(STEPS + 1)


def test_a_run_that_was_left_is_none() -> None:
    sample = plain_dit(layers=1)
    model = dicompile.optimize(sample.model, "none", schedule=timesteps(3), backend="eager")
    with pytest.raises(InvalidTrainingData, match="no run was recorded"), dicompile.record_trajectories(model):
        model(**{**sample.inputs, "t": torch.full((4,), timesteps(3)[0])})


def test_a_module_that_was_not_optimized_is_refused() -> None:
    with pytest.raises(NotOptimized), dicompile.record_trajectories(plain_dit(layers=1).model):
        pass


def test_a_stream_keeps_the_latest_runs_and_makes_each_once() -> None:
    sampler, made = pipes.flux(), []

    def run(number: int) -> None:
        made.append(number)
        sampler(2, seed=number)

    stream = dicompile.Stream(sampler.pipe, run, keep=2, every=10)
    assert stream.sampler == "FlowMatchEulerDiscreteScheduler"
    latents = [stream.at(i)[-1].calls[0]["hidden_states"] for i in (0, 9, 10, 20)]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])
    assert made == [0, 1, 2]
    assert len(stream.at(20)) == 2
    resumed = dicompile.Stream(sampler.pipe, run, keep=2, every=10)
    assert torch.equal(resumed.at(20)[-1].calls[0]["hidden_states"], latents[3])
    assert made == [0, 1, 2, 1, 2]
