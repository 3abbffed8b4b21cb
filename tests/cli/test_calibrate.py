"""``dicompile calibrate``, ``measure`` and ``frontier``, from the command line to a policy file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import dicompile
from dicompile.cli.main import app
from dicompile.errors import DicompileError, InvalidRecording, InvalidSetting, InvalidTiming, PolicyDoesNotFit
from dicompile.plan import TURN
from dicompile.plan.plan import ROOFLINE
from tests.learn.test_denoisers import made, timing
from tests.models import redraw

STEPS = 6


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=4, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    redraw(model)
    model.save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)
    latents = {"latents": torch.randn(5, 4, 8, 8), "class_labels": torch.arange(5) % 4}
    save_file({**latents, "null.class_labels": torch.tensor(4)}, folder / "l.safetensors")
    out = folder / "c.safetensors"
    options = ("--data", folder / "l.safetensors", "--steps", STEPS, "--guidance", 2, "--batch", 2, "--out", out)
    result = run("calibrate", folder, *options)
    assert result.exit_code == 0, result.output
    assert "2 runs of 6 steps" in result.stdout
    assert "3 probes" in result.stdout, "of all the steps that can be probed"
    return out


@pytest.mark.parametrize("few", [("--probes", 0), ("--steps", 3)])
def test_steps_are_probed_where_it_is_wanted_and_there_are_any(recorded: Path, few: tuple[str, int]) -> None:
    out, folder = recorded.with_name("few.safetensors"), recorded.parent
    options = ("--data", folder / "l.safetensors", "--runs", 1, "--batch", 2, "--out", out, "--steps", STEPS, *few)
    result = run("calibrate", folder, *options)
    assert result.exit_code == 0, result.output
    assert dicompile.Recording.load(out).growth == ()


def test_the_scheduler_is_the_one_that_was_saved(recorded: Path) -> None:
    facts = dicompile.Recording.load(recorded).facts
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    assert facts.timesteps == tuple(scheduler.timesteps.tolist())
    assert facts.latent == (4, 4, 8, 8)


@pytest.fixture(scope="module")
def timed(recorded: Path) -> Path:
    out, folder = recorded.with_name("t.json"), recorded.parent
    options = ("--data", folder / "l.safetensors", "--steps", TURN, "--guidance", 2, "--batch", 2, "--out", out)
    result = run("measure", folder, *options, "--backend", "eager")
    assert result.exit_code == 0, result.output
    for part in ("everything computed", "stack forecast from 3", "other steps:", f"wrote {out}"):
        assert part in result.stdout
    return out


def test_budgets_are_of_time_where_steps_were_timed(recorded: Path, timed: Path) -> None:
    out, timing = recorded.with_name("timed.json"), dicompile.Timing.load(timed)
    recording = dicompile.Recording.load(recorded)
    budget = 1.01 * min(point.cost for point in recording.frontier(timing=timing).points)  # whatever was measured
    result = run("frontier", recorded, "--timing", timed, "--budget", budget, "--out", out)
    assert result.exit_code == 0, result.output
    assert "time measured on" in result.stdout
    policy = recording.policy(budget=budget, timing=timing)
    assert dicompile.get_policy(str(out)) == policy


def test_plans_are_timed_by_a_file(timed: Path) -> None:
    folder, clock = timed.parent, dicompile.Timing.load(timed).clock
    model = (folder, "--latent", 8, "--steps", 6)
    for command in (("plan", *model, "-p", "fora"), ("inspect", *model)):
        with_times = run(*command, "--batch", 4, "--timing", timed)
        assert with_times.exit_code == 0, with_times.output
        assert clock in " ".join(with_times.stdout.split())
        without = run(*command, "--batch", 4)
        assert ROOFLINE in without.stdout
        assert "time measured on" not in without.stdout
        refused = run(*command, "--batch", 2, "--timing", timed)
        assert isinstance(refused.exception, InvalidTiming)
        assert "latent [4, 4, 8, 8], the call is of [2, 4, 8, 8]" in str(refused.exception)


@pytest.mark.parametrize("name", ["p.json", "p.yaml"])
def test_the_frontier_is_printed_and_a_policy_written(recorded: Path, name: str) -> None:
    out = recorded.with_name(name)
    result = run("frontier", recorded, "--budget", 0.6, "--out", out, "--plot", out.with_suffix(".png"))
    assert result.exit_code == 0, result.output
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "full steps" in result.stdout
    policy = dicompile.Recording.load(recorded).policy(budget=0.6)
    assert f"{policy.name}:" in result.stdout
    assert dicompile.get_policy(str(out)) == policy


def test_a_forecast_is_fitted_for_evenly_spaced_steps(recorded: Path) -> None:
    out, folder = recorded.with_name("f.json"), recorded.parent
    options = ("--data", folder / "l.safetensors", "--steps", STEPS, "--interval", 2, "--runs", 1, "--batch", 2)
    result = run("fit-forecast", folder, *options, "--out", out)
    assert result.exit_code == 0, result.output
    policy = dicompile.get_policy(str(out))
    assert policy.cadence == dicompile.Cadence(interval=2, anchor="last", warmup=2)
    recall = policy.rules[0].do
    assert isinstance(recall, dicompile.Fitted)
    assert [bool(row) for row in recall.weights] == [False, False, True, False, True, False]


def test_a_run_of_several_denoisers_is_one_frontier_and_one_policy(tmp_path: Path) -> None:
    recorded, timed, out = tmp_path / "c.safetensors", tmp_path / "t.json", tmp_path / "p.yaml"
    recording = dicompile.Recording(*made((5, 5)))
    recording.save(recorded)
    times = dicompile.Timing(denoisers={"t0": timing(1.0, 0.5), "t1": timing(3.0, 0.1)})
    times.save(timed)
    result = run("frontier", recorded, "--timing", timed, "--budget", 0.6, "--out", out)
    assert result.exit_code == 0, result.output
    assert "10 steps: t0 at steps 1 to 5, t1 at steps 6 to 10" in result.stdout
    assert "10 (5 + 5)" in result.stdout
    point = recording.frontier(timing=times).point(budget=0.6)
    assert f"{point.counts} full steps" in " ".join(result.stdout.split())
    assert dicompile.get_policy(str(out)) == recording.policy(budget=0.6, timing=times)
    assert isinstance(run("plan", "demo", "--steps", 10, "-p", out).exception, PolicyDoesNotFit)
    assert isinstance(run("plan", "demo", "--steps", 10, "-p", "fora", "--timing", timed).exception, InvalidTiming)


def test_what_is_missing_is_said(recorded: Path, tmp_path: Path) -> None:
    assert isinstance(run("frontier", tmp_path / "gone.safetensors").exception, InvalidRecording)
    assert isinstance(run("frontier", recorded, "--out", tmp_path / "p.json").exception, InvalidSetting)
    assert isinstance(run("calibrate", "gone").exception, DicompileError)
