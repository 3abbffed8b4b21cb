"""A comparison: everybody draws the same pictures, in turns, and what cannot run is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from typer.testing import CliRunner

import dicompile
from dicompile.cli.compare import contestants
from dicompile.cli.main import app
from dicompile.compare import ModuleSubject, PipelineSubject, compare
from dicompile.compare.subjects import pictures_of
from dicompile.errors import DicompileError, InvalidPolicy
from dicompile.policies import FORA, DuCa, ToCaPixArt
from tests.models import dit
from tests.pipelines import pipes

STEPS = 8


def subject(**options: Any) -> ModuleSubject:
    sample, scheduler = dit(layers=2), DDIMScheduler()

    def loop(module: nn.Module, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        latent = torch.randn(sample.inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in scheduler.timesteps:
                inputs = {**sample.inputs, "hidden_states": latent, "timestep": t.expand(len(latent))}
                latent = latent - 0.1 * module(**inputs)[0].chunk(2, 1)[0]
        return latent.sigmoid()[:, :3]

    settings = {"backend": "eager"}
    return ModuleSubject("two blocks", sample.model, loop, scheduler, STEPS, settings=settings, **options)


@pytest.fixture(scope="module")
def found() -> Any:
    ticks: list[str] = []
    policies = {"every third": FORA(3), "duca": DuCa(3), "of another model": ToCaPixArt()}
    judged = subject(captions=("one", "two"), judged_by=lambda pictures: {"mean": f"{pictures.mean():.3f}"})
    return compare(judged, policies, rounds=2, tick=ticks.append, command="as the user said"), ticks


def test_all_draw_the_same_pictures(found: Any) -> None:
    comparison, _ = found
    as_it_is, plain, *others = comparison.runs
    assert (as_it_is.quality.psnr, as_it_is.quality.error, as_it_is.quality.ssim) == (None, 0, 1)
    assert plain.quality.error < 1e-5
    assert all(1e-5 < run.quality.error < 0.5 for run in others)
    assert comparison.speedup(plain) == comparison.flop_speedup(plain) == 1
    by_name = {run.name: run for run in comparison.runs}
    assert comparison.flop_speedup(by_name["every third"]) == by_name["every third"].plan.flop_speedup > 1.5
    assert [run.flops for run in others] == sorted((run.flops for run in others), reverse=True)
    assert by_name["duca"].extras.keys() == {"mean"}


def test_calls_have_the_kinds_of_the_plan_and_what_is_held(found: Any) -> None:
    comparison, _ = found
    run = next(run for run in comparison.runs if run.name == "every third")
    assert [call.kind for call in run.calls] == [step.kind for step in run.plan.steps]
    assert max(call.cache_bytes for call in run.calls) == run.cache_bytes > 0
    assert run.calls[-1].cache_bytes == 0
    assert len(run.seconds) == 2
    assert sum(call.seconds for call in run.calls) < 2 * max(run.seconds)
    assert "full" in run.report


def test_fewer_steps_cost_what_policies_cost(found: Any) -> None:
    comparison, _ = found
    rivals = [run for run in comparison.runs[2:] if not run.is_cached]
    assert rivals
    for run in rivals:
        assert run.name == f"{run.steps} steps"
        assert len(run.calls) == run.steps < STEPS
        assert comparison.flop_speedup(run) == STEPS / run.steps
        assert any(abs(policy.flops - run.flops) <= comparison.baseline.flops / STEPS
                   for policy in comparison.runs if policy.is_cached)  # fmt: skip


def test_what_cannot_run_is_named_and_rounds_take_turns(found: Any) -> None:
    comparison, ticks = found
    assert [name for name, _ in comparison.refused] == ["of another model"]
    assert "attention" in comparison.refused[0][1]
    rounds = [tick for tick in ticks if "round" in tick]
    assert len(rounds) == 2 * len(comparison.runs)
    assert [tick.partition(",")[0] for tick in rounds[: len(comparison.runs)]] == [
        tick.partition(",")[0] for tick in rounds[len(comparison.runs) :]
    ]
    assert comparison.machine.command == "as the user said"


def test_the_module_is_left_as_it_was(found: Any) -> None:
    one = subject()
    before = {name: parameter.clone() for name, parameter in one.module.named_parameters()}
    compare(one, {"fora": FORA(3)}, rounds=1, fewer_steps=False)
    assert not isinstance(one.module, dicompile.CachedModel)
    assert not one.module._forward_hooks
    assert all(torch.equal(before[name], parameter) for name, parameter in one.module.named_parameters())


def test_a_pipeline_is_compared_and_left_as_it_was() -> None:
    sampler = pipes.dit()
    one = PipelineSubject(sampler.pipe, {"class_labels": [1, 2]}, steps=6, seed=3)
    denoiser, scheduler = sampler.pipe.transformer, sampler.pipe.scheduler
    comparison = compare(one, {"fora": FORA(3)}, rounds=1)
    assert sampler.pipe.transformer is denoiser and not isinstance(denoiser, dicompile.CachedModel)
    assert sampler.pipe.scheduler is scheduler
    names = [run.name for run in comparison.runs]
    assert names[:2] == ["as it is", "no cache"] and "fora" in names
    assert comparison.runs[1].quality.error < 1e-4
    assert comparison.runs[0].pictures.shape[1] == 3
    run = comparison.runs[names.index("fora")]
    assert [call.kind for call in run.calls] == [step.kind for step in run.plan.steps]


@pytest.mark.parametrize("result", [object(), type("Empty", (), {"images": []})()])
def test_what_holds_no_pictures_is_refused(result: Any) -> None:
    with pytest.raises(DicompileError, match="holds no pictures"):
        pictures_of(result)


def test_the_command_line_names_what_is_wrong(tmp_path: Path) -> None:
    for arguments, said in (
        (["compare", str(tmp_path), "-p", "fora"], "there is no pipeline"),
        (["compare", "demo", "-p", "fora", "--call", "height"], "is no name=value"),
        (["compare", "demo", "-p", "nobody"], "nobody"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, DicompileError)
        assert said in str(result.exception)


def test_policies_that_share_a_name_are_two_contestants(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FORA(interval=3).to_yaml() + "seed: 7\n")
    found = contestants(["fora", str(other), "none"])
    assert list(found) == ["fora", str(other), "none"]
    assert found["fora"].name == found[str(other)].name == "fora-3"
    assert list(contestants(["fora"])) == ["fora-3"]
    with pytest.raises(DicompileError, match="fora would compete with itself"):
        contestants(["fora", "none", "fora"])


@pytest.mark.parametrize("name", ["no cache", "as it is", "4 steps"])
def test_a_policy_cannot_take_the_name_of_who_is_always_there(name: str) -> None:
    with pytest.raises(InvalidPolicy, match=f"no policy can be called '{name}' here"):
        compare(subject(), {name: FORA(interval=2)})
