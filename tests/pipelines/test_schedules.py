"""Which steps run: runs that begin in the middle, two denoisers, evaluations and guidance that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

import dicompile
from tests.pipelines import pipes
from tests.pipelines.pipes import Sampler, kinds

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

FORA = dicompile.FORA(interval=2)


def check_planned(sampler: Sampler) -> None:
    """The last run did what its plan says, and nothing was missing."""
    report = dicompile.report(sampler.pipe)
    assert report.kinds == kinds(dicompile.plan_of(sampler.pipe), sampler.calls)
    assert set(report.kinds) > {"full"}
    assert report.cold_starts == []


def optimized(sampler: Sampler, policy: Any = FORA) -> Sampler:
    dicompile.optimize(sampler.pipe, policy, mode="eager")
    return sampler


def test_image_to_image_is_planned_for_the_steps_that_it_runs() -> None:
    sampler = optimized(pipes.flux_img2img(), dicompile.FORA(interval=3))
    for strength, began in ((0.7, 2), (1.0, 0), (0.5, 4)):
        sampler(8, strength=strength)
        plan = dicompile.plan_of(sampler.pipe)
        assert dicompile.report(sampler.pipe).began == plan.schedule.before == began
        assert plan.schedule.timesteps == tuple(sampler.scheduler.timesteps.tolist()[began:])
        assert plan.steps[0].kind == "full"
        check_planned(sampler)


def test_two_denoisers_of_one_schedule_are_planned_for_their_part() -> None:
    sampler = optimized(pipes.wan22())
    high, low = sampler.denoisers
    held = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        held.append(dicompile.report(high).cache_bytes if high.frames else 0)
        return tensors

    sampler(8, callback_on_step_end=watch)
    began = dicompile.report(low).began
    assert 0 < began < 8
    assert dicompile.report(high).kinds.total() == 2 * began
    assert dicompile.report(low).kinds == kinds(dicompile.plan_of(low), 2)
    assert dicompile.report(high).cold_starts == dicompile.report(low).cold_starts == []
    assert max(held) > 0
    assert held[began + 1 :] == [0] * (8 - began - 1)  # nobody comes back for what the first one stored


def test_both_denoisers_of_a_pipeline_are_prepared_once_they_have_run(caplog: pytest.LogCaptureFixture) -> None:
    sampler = optimized(pipes.wan22())
    high, low = sampler.denoisers

    def leave_when(has_run: Any) -> Any:
        def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = bool(has_run.frames)
            return tensors

        return interrupt

    with caplog.at_level("WARNING", logger="dicompile"):
        sampler(8, callback_on_step_end=leave_when(high))
        dicompile.prepare(sampler.pipe)
        sampler(8, callback_on_step_end=leave_when(low))
        dicompile.prepare(sampler.pipe)
    assert [record.getMessage() for record in caplog.records] == [
        "WanTransformer3DModel has not run yet, and is not prepared"
    ]
    prepared = [one.frames[0].programs.variants.variants for one in (high, low)]
    sampler(8)
    assert [one.frames[0].programs.variants.variants for one in (high, low)] == prepared
    assert set(dicompile.report(low).kinds) == {"full", "reuse"}


def test_a_time_per_token_is_a_step_of_the_schedule() -> None:
    sampler = optimized(pipes.wan(expand_timesteps=True))
    sampler()
    check_planned(sampler)


@pytest.mark.parametrize(
    ("make", "scheduler"),
    [
        (pipes.dit, HeunDiscreteScheduler),
        (pipes.dit, KDPM2DiscreteScheduler),
        (pipes.sd3, FlowMatchHeunDiscreteScheduler),
    ],
)
def test_a_sampler_that_calls_the_model_twice_a_step_has_a_plan_for_every_call(make: Any, scheduler: Any) -> None:
    sampler = make()
    sampler.pipe.scheduler = scheduler()
    optimized(sampler)(4)
    assert len(dicompile.plan_of(sampler.pipe).steps) == 7
    check_planned(sampler)
    assert torch.equal(sampler(4), sampler(4))


def test_image_to_image_with_a_sampler_of_second_order_begins_at_the_right_evaluation() -> None:
    sampler = pipes.flux_img2img(guided=True)
    sampler.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    sampler.pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    sampler.pipe.scheduler.set_timesteps = _without_sigmas(sampler.pipe.scheduler.set_timesteps)
    optimized(sampler)(6, strength=0.9)
    assert dicompile.report(sampler.pipe).began == 2  # the second evaluation of a timestep
    check_planned(sampler)


def _without_sigmas(set_timesteps: Any) -> Any:
    """This scheduler makes its own sigmas; the pipeline insists on giving some."""

    def call(steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:
        set_timesteps(steps or len(sigmas), device=device)

    return call


def test_another_number_of_steps_and_other_sigmas_are_planned_anew_without_compiling() -> None:
    sampler = pipes.flux_under_fora()
    for steps, sigmas in ((4, None), (6, None), (5, [1.0, 0.9, 0.6, 0.3, 0.1]), (4, None)):
        sampler(steps, sigmas=sigmas)
        plan = dicompile.plan_of(sampler.pipe)
        assert plan.schedule.timesteps == tuple(sampler.scheduler.timesteps.tolist())
        assert len(plan.steps) == steps
        check_planned(sampler)
    assert len(sampler.pipe.transformer.frames) == 1


def test_own_timesteps_are_planned() -> None:
    sampler = optimized(pipes.pixart())
    sampler(5, timesteps=[950, 700, 500, 300, 100])
    assert dicompile.plan_of(sampler.pipe).schedule.timesteps == (950, 700, 500, 300, 100)
    check_planned(sampler)


@pytest.mark.nightly
def test_guidance_that_ends_early_leaves_the_other_partner_alone() -> None:
    sampler = optimized(pipes.lumina2())
    sampler(8, cfg_trunc_ratio=0.5)
    report, plan = dicompile.report(sampler.pipe), dicompile.plan_of(sampler.pipe)
    assert report.kinds == kinds(plan) + kinds_of(plan.steps[:4])
    assert report.cold_starts == []
    assert report.cache_bytes == 0


def kinds_of(steps: Any) -> Any:
    return kinds(type("Steps", (), {"steps": steps}))


def test_guidance_that_pauses_starts_cold_and_says_so() -> None:
    sampler = optimized(pipes.wan())
    paused = sampler.pipe.transformer
    step = next(i for i, planned in enumerate(dicompile_plan(sampler).steps) if i > 2 and planned.kind == "reuse")

    def pause(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if i + 1 == step - 1 else 5.0
        return tensors

    sampler(8, callback_on_step_end=pause)
    report = dicompile.report(paused)
    assert report.cold_starts == [step]
    assert report.kinds.total() == 15


def dicompile_plan(sampler: Sampler) -> Any:
    sampler(8)
    return dicompile.plan_of(sampler.pipe)


def test_a_batch_and_a_prompt_of_another_size_follow_the_plan_too() -> None:
    sampler = optimized(pipes.flux(guided=True))
    longer = {name: pipes.text(tokens=9)["prompt_embeds"] for name in ("prompt_embeds", "negative_prompt_embeds")}
    two = {name: value.repeat_interleave(2, 0) for name, value in sampler.options.items() if "embeds" in name}
    for options in ({}, two, longer, {}):
        sampler(4, **options)
        check_planned(sampler)


def test_a_scheduler_that_replaces_the_first_one_is_followed() -> None:
    sampler = optimized(pipes.dit())
    sampler(4)
    sampler.pipe.scheduler = DPMSolverMultistepScheduler.from_config(sampler.scheduler.config)
    sampler(5)
    assert dicompile.plan_of(sampler.pipe).schedule.timesteps == tuple(sampler.scheduler.timesteps.tolist())
    check_planned(sampler)
