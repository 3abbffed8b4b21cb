"""What may be remembered, through the front ends: a budget is kept, told, and refused before anything is compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from typer.testing import CliRunner

import dicompile
from dicompile.cli.main import app
from dicompile.errors import CacheTooLarge, InvalidSetting
from dicompile.plan import TimestepSchedule, make_plan
from dicompile.policies import get_policy
from tests import models
from tests.lower.captured import captured
from tests.models import Sample, optimized, run, timesteps
from tests.passes.segments import Mlp, chain
from tests.runtime.runner import same

STEPS = 6
SITE = 4 * 64 * 32 * 4
"""Bytes of a site's value: samples, tokens, channels of float32."""
FORA = dicompile.FORA(interval=2)

FrontEnd = Callable[..., Any]


def by_optimize(sample: Sample, **options: Any) -> Any:
    return optimized(sample, FORA, STEPS, **options)


def by_backend(sample: Sample, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        sample.model, backend="dicache", options={"policy": FORA, "steps": STEPS, "mode": "eager", **options}
    )


front_ends = pytest.mark.parametrize("front_end", [by_optimize, by_backend])


@front_ends
def test_a_plan_over_its_budget_is_refused_at_every_call_before_anything_is_compiled(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", never)
    sample = models.plain_dit(2)
    model = front_end(sample, max_cache_bytes=4 * SITE - 1)
    for _ in range(2):
        with pytest.raises(CacheTooLarge, match=r"needs a cache of 128\.00 KiB"):
            run(model, sample.inputs, timesteps(STEPS))


@front_ends
def test_a_degraded_plan_runs_within_its_budget_and_says_so_once(
    front_end: FrontEnd, caplog: pytest.LogCaptureFixture
) -> None:
    sample = models.plain_dit(2)
    unlimited = run(front_end(sample), sample.inputs, timesteps(STEPS))
    model = front_end(sample, max_cache_bytes=2 * SITE, over_budget="degrade")
    with caplog.at_level(logging.WARNING, "dicompile"):
        outputs = [run(model, sample.inputs, timesteps(STEPS)) for _ in range(2)]
    assert same(*outputs)
    assert not same(outputs[0], unlimited)
    (line,) = (record.getMessage() for record in caplog.records if "dropped" in record.getMessage())
    assert line.startswith(
        "policy fora-2: dropped, as 64.00 KiB do not hold 128.00 KiB: self-attention of block 0, mlp"
    )


def test_the_report_of_a_degraded_run_stays_within_the_budget() -> None:
    sample = models.plain_dit(2)
    model = by_optimize(sample, max_cache_bytes="100 KiB", over_budget="degrade")
    run(model, sample.inputs, timesteps(STEPS))
    assert dicompile.report(model).peak_cache_bytes == dicompile.plan_of(model).cache_bytes == 3 * SITE
    assert dicompile.report(model).cold_starts == []


def test_without_any_memory_every_step_is_that_of_a_plan_that_computes_everything() -> None:
    sample = models.plain_dit(2)
    wanted = run(optimized(sample, "none", STEPS), sample.inputs, timesteps(STEPS))
    model = by_optimize(sample, max_cache_bytes=0, over_budget="degrade")
    assert same(run(model, sample.inputs, timesteps(STEPS)), wanted)
    assert dicompile.report(model).peak_cache_bytes == 0


@pytest.mark.parametrize("policy", ["toca", "duca", "taylorseer", "taylorseer-lite"])
@pytest.mark.parametrize("share", [0.8, 0.3])
@pytest.mark.sampled
def test_every_method_runs_when_degraded(policy: str, share: float) -> None:
    free = make_plan(captured(models.pixart, 2).structure, get_policy(policy), TimestepSchedule.of(timesteps(8)))
    budget, sample = int(free.cache_bytes * share), models.pixart(2)
    model = optimized(sample, policy, 8, max_cache_bytes=budget, over_budget="degrade")
    run(model, sample.inputs, timesteps(8))
    report = dicompile.report(model)
    assert report.cold_starts == []
    assert report.peak_cache_bytes == dicompile.plan_of(model).cache_bytes <= budget


def test_a_schedule_of_more_steps_is_planned_anew_and_may_be_refused_then() -> None:
    sample, scheduler = models.plain_dit(1), DDIMScheduler()
    policy = dicompile.TaylorSeer(interval=2, warmup=1, order=3)
    model = dicompile.optimize(sample.model, policy, schedule=scheduler, mode="eager", max_cache_bytes=4 * SITE)
    scheduler.set_timesteps(3)
    run(model, sample.inputs, [int(t) for t in scheduler.timesteps])
    scheduler.set_timesteps(20)
    with pytest.raises(CacheTooLarge, match="plan of 20 steps"):
        run(model, sample.inputs, [int(t) for t in scheduler.timesteps])


@front_ends
@pytest.mark.parametrize(
    ("option", "value"),
    [("max_cache_bytes", "much"), ("over_budget", "drop"), ("cache_dtype", "int4"), ("cache_device", "disk")],
)
def test_a_bad_value_is_refused_at_once(front_end: FrontEnd, option: str, value: str) -> None:
    sample = models.plain_dit(1)
    wrapped = torch._dynamo.exc.BackendCompilerFailed  # what Dynamo makes of errors in a backend
    with pytest.raises((InvalidSetting, wrapped), match=f"{option} cannot be '{value}'"):
        run(front_end(sample, **{option: value}), sample.inputs, timesteps(STEPS)[:1])


def printed(command: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, [command, "demo", "--policy", "fora", "--steps", "10", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_plan_follows_the_options() -> None:
    assert "remembers 1.00 MiB in 16 slots for each guidance context" in printed("plan")
    assert "remembers 512.00 KiB in 16 slots for each guidance context (bfloat16, in host memory)" in printed(
        "plan", "--cache-dtype", "bfloat16", "--cache-device", "cpu"
    )


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_what_is_dropped_is_said(command: str) -> None:
    degraded = printed(command, "--max-cache-bytes", "900 KiB", "--over-budget", "degrade")
    assert "dropped, as 900.00 KiB do not hold 1.00 MiB: self-attention of blocks 0-1" in degraded


def test_inspect_shows_what_does_not_fit() -> None:
    output = printed("inspect", "--max-cache-bytes", "900KiB", "--json")
    assert "policy 'fora-3' needs a cache of 1.00 MiB, but only 900.00 KiB are allowed" in output
    assert '"policies": {}' in output


# Fewer bits ----------------------------------------------------------------------------------------------------------

CLOSE = {"bfloat16": 2e-3, "float16": 3e-4, "float8_e4m3fn": 4e-2}
"""Largest difference over the largest output: ten times the rounding of the stored values, or less."""
METHODS = [
    ("plain_dit", "fora"), ("pixart", "taylorseer"), pytest.param("flux", "duca", marks=pytest.mark.nightly),
    *(pytest.param(name, "toca", marks=pytest.mark.nightly) for name in ("plain_dit", "flux")),  # DuCa refreshes, too
]  # fmt: skip


def difference(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest difference over all steps, relative to the largest output."""
    scale = max(float(w.abs().max()) for w in wanted)
    return max(float((g - w).abs().max()) for g, w in zip(got, wanted, strict=True)) / scale


@pytest.mark.parametrize(("name", "policy"), METHODS)
def test_fewer_bits_change_little_and_take_the_memory_that_the_plan_says(name: str, policy: str) -> None:
    sample = models.MODELS[name](2)
    wanted = run(optimized(sample, policy, 8), sample.inputs, timesteps(8))
    errors = []
    for dtype, close in CLOSE.items():
        model = optimized(sample, policy, 8, cache_dtype=dtype)
        outputs = run(model, sample.inputs, timesteps(8))
        plan, report = dicompile.plan_of(model), dicompile.report(model)
        errors.append(difference(outputs, wanted))
        assert 0 < errors[-1] < close
        assert report.cold_starts == []
        assert report.peak_cache_bytes == plan.cache_bytes
        assert report.cache_bytes == 0
        full = [step for step, planned in enumerate(plan.steps) if planned.kind == "full"]
        assert same([outputs[i] for i in full], [wanted[i] for i in full])  # a step's own values are not rounded
    assert errors[1] < errors[0] < errors[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_a_dtype_as_wide_as_that_of_the_model_changes_no_bit(dtype: Any) -> None:
    sample = chain(Mlp(), Mlp())
    sample.model.bfloat16()
    x, outputs = sample.inputs["x"].bfloat16(), []
    for options in ({}, {"cache_dtype": dtype}):
        model = dicompile.optimize(sample.model, FORA, schedule=3, mode="eager", **options)
        with dicompile.session():
            outputs.append([model(x * (1 + i)) for i in range(3)])
            assert dicompile.report(model).kinds["reuse"] > 0
        assert dicompile.plan_of(model).cache_bytes == 2 * x.nbytes
    assert same(*outputs)


def test_nothing_is_rounded_where_nothing_is_stored() -> None:
    sample = models.plain_dit(1)
    wanted = run(optimized(sample, "none", 3), sample.inputs, timesteps(3))
    narrow = optimized(sample, "none", 3, cache_dtype="float8_e4m3fn")
    assert same(run(narrow, sample.inputs, timesteps(3)), wanted)


def test_scales_are_what_makes_eight_bits_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = models.plain_dit(2)
    for block in sample.model.blocks:  # small branch outputs under large gates: plain casts would lose them
        for layer in (block.proj, block.mlp[2]):
            layer.weight.data *= 1e-3
            layer.bias.data *= 1e-3
        for part in (2, 5):
            block.modulation[1].weight.data[32 * part : 32 * (part + 1)] *= 1e3
            block.modulation[1].bias.data[32 * part : 32 * (part + 1)] *= 1e3
    wanted = run(by_optimize(sample), sample.inputs, timesteps(STEPS))
    scaled = run(by_optimize(sample, cache_dtype="float8_e4m3fn"), sample.inputs, timesteps(STEPS))
    for module in ("dicompile.passes.narrow_slots", "dicompile.plan.memory"):
        monkeypatch.setattr(f"{module}.needs_scale", lambda _: False)
    dicompile.reset()  # what was compiled with scales
    plain = run(by_optimize(sample, cache_dtype="float8_e4m3fn"), sample.inputs, timesteps(STEPS))
    assert difference(scaled, wanted) < CLOSE["float8_e4m3fn"]
    assert difference(plain, wanted) > 5 * difference(scaled, wanted)


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        ("bfloat16", "taylorseer"),
        # the most casts: scales per row, and chosen tokens scattered into narrow values
        pytest.param("float8_e4m3fn", "toca", marks=pytest.mark.nightly),
        pytest.param("bfloat16", "toca", marks=pytest.mark.nightly),
        pytest.param("float8_e4m3fn", "taylorseer", marks=pytest.mark.nightly),
    ],
)
def test_compiled_casts_agree_with_those_of_single_operators(dtype: str, policy: str) -> None:
    sample = models.plain_dit(2)
    wanted = run(optimized(sample, policy, 6, cache_dtype=dtype), sample.inputs, timesteps(6))
    model = optimized(sample, policy, 6, mode="inductor", cache_dtype=dtype)
    assert difference(run(model, sample.inputs, timesteps(6)), wanted) < CLOSE[dtype] / 4
    assert dicompile.report(model).peak_cache_bytes == dicompile.plan_of(model).cache_bytes
