"""Calibration: what is recorded is what the user's own run computes, and the model is then as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dicompile
from dicompile.errors import InvalidRecording, InvalidSetting, NotOptimized, PolicyDoesNotFit
from dicompile.learn.graph import learnable
from tests.models import plain_dit, timesteps
from tests.pipelines import pipes

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = 12


@pytest.fixture(scope="module")
def recording() -> dicompile.Recording:
    sampler = pipes.sd3()
    with dicompile.calibrate(sampler.pipe) as recorded:
        sampler(STEPS, seed=2)
        sampler(STEPS, seed=3)
    return recorded


def record(sampler: pipes.Sampler, *steps: int) -> dicompile.Recording:
    with dicompile.calibrate(sampler.pipe) as recorded:
        for count in steps:
            sampler(count)
    return recorded


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def test_nothing_is_cached_meanwhile_and_the_pipeline_is_its_own_afterwards() -> None:
    sampler = pipes.sd3()
    transformer, uncached = sampler.pipe.transformer, sampler(STEPS)
    with dicompile.calibrate(sampler.pipe) as recorded:
        assert sampler.pipe.transformer is not transformer
        assert torch.allclose(sampler(STEPS), uncached, atol=1e-5)
    assert sampler.pipe.transformer is transformer
    assert recorded.facts.model == "SD3Transformer2DModel"
    assert recorded.facts.timesteps == tuple(sampler.scheduler.timesteps.tolist())
    assert len(recorded.facts.sigmas) == STEPS + 1
    assert recorded.facts.sites[:2] == ("0.joint-attention", "0.mlp")
    assert len(recorded.traces) == 1


def test_an_error_leaves_the_pipeline_as_it_was() -> None:
    sampler = pipes.sd3()
    transformer = sampler.pipe.transformer
    with pytest.raises(KeyboardInterrupt), dicompile.calibrate(sampler.pipe):
        raise KeyboardInterrupt
    assert sampler.pipe.transformer is transformer


def test_an_optimized_pipeline_goes_on_with_its_policy() -> None:
    sampler = pipes.sd3()
    dicompile.optimize(sampler.pipe, dicompile.FORA(2), backend="eager")
    cached = sampler(STEPS)
    record(sampler, STEPS)
    assert torch.equal(sampler(STEPS), cached)
    assert dicompile.report(sampler.pipe).kinds["reuse"] == STEPS // 2 - 1


def test_inner_products_are_those_of_the_values_of_a_run() -> None:
    sample = plain_dit(layers=2)
    times = timesteps(4)
    model = dicompile.optimize(sample.model, "none", schedule=times, backend="eager")
    inputs = [{**sample.inputs, "x": torch.randn(4, 4, 16, 16), "t": torch.full((4,), time)} for time in times]
    with dicompile.calibrate(model) as recorded:
        outputs = [model(**each) for each in inputs]
    known = learnable(sample.model, inputs[0])
    values = [known.record(each)[1] for each in inputs]
    for site in range(len(known.sites)):
        own = torch.stack([step[site].flatten() for step in values]).double()
        size = own.norm(dim=1)
        found = recorded.traces[0].gram[site]
        assert ((found - own @ own.T) / (size[:, None] * size[None])).abs().max() < 0.1
    exact = torch.stack([output.flatten() for output in outputs]).double()
    assert torch.allclose(recorded.traces[0].gram[-2].diagonal(), exact.square().sum(1), rtol=0.1)
    exact = torch.stack([each["x"].flatten() for each in inputs]).double()
    assert torch.allclose(recorded.traces[0].gram[-1].diagonal(), exact.square().sum(1), rtol=0.1)


def test_what_reuse_would_have_returned_is_what_it_returns() -> None:
    sample, times = plain_dit(layers=2), timesteps(3)
    inputs = [{**sample.inputs, "x": torch.randn(4, 4, 16, 16), "t": torch.full((4,), time)} for time in times]
    model = dicompile.optimize(sample.model, "none", schedule=times, backend="eager")
    with dicompile.calibrate(model) as recorded:
        true = [model(**each) for each in inputs]
    dicompile.restore(model)
    cadence = dicompile.Cadence(at=(0, 1))
    for level, rule in enumerate(
        (
            dicompile.Rule(do=dicompile.Reuse()),
            dicompile.Rule(sites=("stack",), do=dicompile.Reuse(what="update")),
        )
    ):
        policy = dicompile.Policy(name="last", cadence=cadence, rules=(rule,))
        model = dicompile.optimize(sample.model, policy, schedule=times, backend="eager")
        found = [model(**each) for each in inputs]
        dicompile.restore(model)
        reused = recorded.traces[0].reused[level]
        assert reused[0] == 0.0
        assert float(reused[2]) == pytest.approx(relative(found[2], true[2]), rel=1e-4)


def test_runs_add_up_and_can_be_held_out(recording: dicompile.Recording) -> None:
    assert recording.runs == (0, 1)
    first, second = recording.of_runs([0]), recording.of_runs([1])
    whole = first + second
    assert [trace.run for trace in whole.traces] == [0, 1]
    for ours, theirs in zip(whole.traces, recording.traces, strict=True):
        assert torch.equal(ours.gram, theirs.gram)
    policy = (first + second).policy(budget=0.4)
    assert policy == recording.policy(budget=0.4)
    assert policy != first.policy(budget=0.4)
    with pytest.raises(InvalidRecording, match="no run"):
        recording.of_runs([7])


def test_contexts_of_guidance_are_traces_of_their_own() -> None:
    sample = plain_dit(layers=1)
    model = dicompile.optimize(sample.model, "none", schedule=timesteps(3), backend="eager")
    with dicompile.calibrate(model) as recorded:
        for time in timesteps(3):
            for labels in ([1, 2, 3, 4], [10, 10, 10, 10]):
                model(sample.inputs["x"], torch.full((4,), time), torch.tensor(labels))
    assert len(recorded.traces) == 2
    assert recorded.runs == (0,)
    assert not torch.equal(recorded.traces[0].gram[-2], recorded.traces[1].gram[-2])


def test_a_file_holds_all_of_it(recording: dicompile.Recording, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    recording.save(file)
    read = dicompile.Recording.load(file)
    assert read.facts == recording.facts
    assert [(trace.run, trace.context) for trace in read.traces] == [(0, "-"), (1, "-")]
    assert read.policy(budget=0.3) == recording.policy(budget=0.3)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"latents": torch.zeros(1)}, file)
    for path in (file, tmp_path / "missing.safetensors"):
        with pytest.raises(InvalidRecording, match=f"{path.name} is not a recording"):
            dicompile.Recording.load(path)


def test_recordings_of_other_runs_do_not_add_up(recording: dicompile.Recording) -> None:
    with pytest.raises(InvalidRecording, match=f"one is of steps {STEPS}, the other of 4"):
        recording + record(pipes.sd3(), 4)
    other = recording.facts.model_copy(update={"model": "FluxTransformer2DModel"})
    with pytest.raises(InvalidRecording, match="SD3Transformer2DModel, the other of FluxTransformer2DModel"):
        recording + dicompile.Recording(other, recording.traces)
    sampler = pipes.sd3()
    sampler.pipe.scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config, shift=1.0)
    with pytest.raises(InvalidRecording, match="at timestep"):
        recording + record(sampler, STEPS)
    sampler = pipes.sd3()
    sampler.options |= {"height": 64, "width": 64}
    with pytest.raises(InvalidRecording, match="latents"):
        recording + record(sampler, STEPS)


def test_runs_of_one_calibration_have_to_be_alike() -> None:
    with pytest.raises(InvalidRecording, match="the runs of one calibration differ"):
        record(pipes.sd3(), 4, 5)


def test_a_run_that_is_left_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    sampler = pipes.sd3()

    def leave(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return tensors

    said = "no run of SD3Transformer2DModel was recorded"
    with pytest.raises(InvalidRecording, match=said), dicompile.calibrate(sampler.pipe):
        sampler(STEPS, callback_on_step_end=leave)
    assert "did not run at every step" in caplog.text


def test_a_module_has_to_be_called_by_its_wrapper() -> None:
    with pytest.raises(NotOptimized, match="was not optimized"), dicompile.calibrate(plain_dit().model):
        pass


def test_auto_is_nearer_to_the_uncached_result_than_published_forecasts(recording: dicompile.Recording) -> None:
    uncached = pipes.sd3()(STEPS, seed=5)
    errors, shares = {}, {}
    for name, policy in {
        "auto": "auto",
        "taylor": dicompile.TaylorSeer(interval=3, order=1),
        "fora": dicompile.FORA(interval=3),
    }.items():
        sampler = pipes.sd3()
        options = {"recording": recording, "budget": 0.45} if name == "auto" else {}
        dicompile.optimize(sampler.pipe, policy, backend="eager", **options)
        errors[name] = relative(sampler(STEPS, seed=5), uncached)
        plan = dicompile.plan_of(sampler.pipe)
        shares[name] = plan.flops / plan.baseline_flops
    assert shares["auto"] <= min(shares["taylor"], shares["fora"], 0.45)
    assert errors["auto"] < 0.7 * min(errors["taylor"], errors["fora"])


def test_the_plan_keeps_what_the_frontier_says(recording: dicompile.Recording) -> None:
    for limit in (None, 3 * recording.facts.site_bytes, 2 * recording.facts.stack_bytes):
        point = recording.frontier(limit).point(budget=0.5)
        sampler = pipes.sd3()
        dicompile.optimize(
            sampler.pipe, "auto", backend="eager", recording=recording, budget=0.5, max_cache_bytes=limit
        )
        sampler(STEPS)
        plan = dicompile.plan_of(sampler.pipe)
        assert plan.flops / plan.baseline_flops == pytest.approx(point.compute, rel=1e-6)
        assert plan.cache_bytes <= point.cache_bytes <= (limit or point.cache_bytes)


def test_goals_are_kept(recording: dicompile.Recording) -> None:
    frontier = recording.frontier()
    assert frontier.point(speedup=2).compute <= 0.5
    assert frontier.point(speedup=2) == frontier.point(budget=0.5)
    point = frontier.point(max_error=0.01)
    assert point.error <= 0.01
    assert all(other.error > 0.01 for other in frontier.points if other.compute < point.compute)
    computes = [point.compute for point in frontier.points]
    assert computes == sorted(computes, reverse=True)
    assert [point.error for point in frontier.points] == sorted(point.error for point in frontier.points)


@pytest.mark.parametrize("goals", [{}, {"budget": 0.5, "speedup": 2}, {"budget": 0.0}, {"speedup": -1}])
def test_one_goal_is_needed(recording: dicompile.Recording, goals: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match="auto needs one goal above 0"):
        recording.policy(**goals)


def test_a_budget_that_cannot_be_reached_is_refused(recording: dicompile.Recording) -> None:
    with pytest.raises(InvalidSetting, match=r"0\.1% of the compute are not enough"):
        recording.policy(budget=0.001)


def test_auto_is_refused_without_a_recording_and_a_recording_without_auto(recording: dicompile.Recording) -> None:
    with pytest.raises(InvalidSetting, match="policy 'auto' needs a recording"):
        dicompile.optimize(pipes.sd3().pipe, "auto", speedup=2)
    with pytest.raises(InvalidSetting, match="recording, speedup is given, but the policy is 'fora-2'"):
        dicompile.optimize(pipes.sd3().pipe, dicompile.FORA(2), recording=recording, speedup=2)


def test_a_recording_of_another_model_or_sampler_is_refused_by_name(recording: dicompile.Recording) -> None:
    flux = pipes.flux()
    with pytest.raises(InvalidRecording, match="of SD3Transformer2DModel, the model is FluxTransformer2DModel"):
        dicompile.optimize(flux.pipe, "auto", recording=recording, speedup=2)
    assert not isinstance(flux.pipe.transformer, dicompile.CachedModel)
    sampler = pipes.sd3()
    sampler.pipe.scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config, shift=1.0)
    dicompile.optimize(sampler.pipe, "auto", backend="eager", recording=recording, speedup=2)
    with pytest.raises(PolicyDoesNotFit, match="timestep"):
        sampler(STEPS)
    with pytest.raises(PolicyDoesNotFit, match=f"fitted to {STEPS} steps"):
        sampler(4)


def test_the_policy_is_a_file_like_any_other(recording: dicompile.Recording) -> None:
    policy = recording.policy(speedup=2)
    assert dicompile.Policy.from_yaml(policy.to_yaml()) == policy
    assert dicompile.Policy.from_json(policy.to_json()) == policy


def test_the_verdict_says_what_is_better(recording: dicompile.Recording) -> None:
    assert recording.frontier().verdict.startswith("better than fewer steps")


def test_a_notebook_shows_the_frontier_as_the_terminal_does(recording: dicompile.Recording) -> None:
    frontier = recording.frontier()
    html = frontier._repr_html_()
    rows = html.partition("<tbody>")[2].partition("</tbody>")[0].count("<tr>")
    assert rows == frontier.table().row_count > 1
    assert frontier.verdict in html
    # Branches that have nothing to do with those of the step before, and an output that hardly moves.
    gram = torch.eye(STEPS, dtype=torch.float64).repeat(len(recording.facts.values), 1, 1)
    gram[-2:] = 1.0
    gram[-1] += 0.01 * torch.arange(STEPS).outer(torch.arange(STEPS))
    trace = replace(recording.traces[0], gram=gram, reused=torch.ones(2, STEPS, dtype=torch.float64))
    frontier = dicompile.Recording(recording.facts, [trace]).frontier()
    assert frontier.verdict == "no gain expected: fewer steps are better here"
    assert "no gain expected" in str(frontier)
