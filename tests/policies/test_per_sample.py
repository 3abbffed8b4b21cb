"""Gates that decide about every sample of a batch by itself: a batch gives what single runs give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dicompile
from dicompile.backend import read_options
from dicompile.errors import CannotBatch, InvalidPolicy, InvalidSetting
from dicompile.plan import Cadence, Forecast, Gate, Policy, Reuse, Rule
from dicompile.serve import Batcher
from tests import models
from tests.models import Sample, optimized, timesteps

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 9
TIMES = timesteps(STEPS)
SPEEDS = (1.0, 0.5, 0.2)
"""How far the latent of each sample moves."""
LATENTS = ("hidden_states", "x")
TIMESTEPS = ("timestep", "t")


class Run(NamedTuple):
    """What a run gave.

    Attributes:
        outputs: at every step.
        report: of the run.
    """

    outputs: list[Tensor]
    report: Any

    def recalls(self, sample: int | None = None) -> list[bool]:
        return [found.recalls for found in self.report.decisions if found.sample == sample]


def latents(like: Tensor) -> list[Tensor]:
    """Of every step, [samples, ...]; each sample moves at a speed of its own, fast first."""
    generator = torch.Generator().manual_seed(1)
    start, way = (torch.randn(like.shape, generator=generator) for _ in range(2))
    speeds = torch.tensor(SPEEDS[: len(like)]).view(-1, *[1] * (like.ndim - 1))
    return [start + way * speeds * (1 - (1 - step / STEPS) ** 2) for step in range(STEPS)]


def pictures(sample: Sample, count: int) -> Sample:
    """The model with as many samples, each with conditioning of its own."""
    rows = len(sample.inputs[next(name for name in LATENTS if name in sample.inputs)])
    inputs = {
        name: torch.randn(count, *value.shape[1:]) if value.is_floating_point() else torch.arange(1, count + 1)
        for name, value in sample.inputs.items() if isinstance(value, Tensor) and len(value) == rows
    }  # fmt: skip
    return Sample(sample.model, sample.inputs | inputs)


@pytest.fixture(scope="module")
def flux() -> Sample:
    torch.manual_seed(0)
    return pictures(models.flux(1), 3)


@pytest.fixture(scope="module")
def plain() -> Sample:
    torch.manual_seed(0)
    return pictures(models.plain_dit(2), 2)


def run(model: Any, sample: Sample, rows: Sequence[int], around: Any = None) -> Run:
    """Sample some of the pictures; timesteps of FLUX are between 0 and 1."""
    name, time_name = (next(n for n in names if n in sample.inputs) for names in (LATENTS, TIMESTEPS))
    count = len(sample.inputs[name])
    own = {
        key: value[list(rows)] if isinstance(value, Tensor) and len(value) == count else value
        for key, value in sample.inputs.items()
    }
    outputs = []
    with dicompile.session(), torch.no_grad(), around or contextlib.nullcontext():
        for time, latent in zip(TIMES, latents(sample.inputs[name]), strict=True):
            now = torch.full((len(rows),), time / 1000 if time_name == "timestep" else time)
            found = model(**own | {name: latent[list(rows)], time_name: now})
            outputs.append(found[0] if isinstance(found, tuple) else found)
        return Run(outputs, dicompile.report(model))


def forecast(threshold: float) -> Policy:
    return Policy(
        name="forecast",
        cadence=Cadence(warmup=1, gate=Gate(threshold=threshold)),
        outside=(1, 0),
        rules=(Rule(do=Forecast(order=1)),),
    )


CASES: dict[str, tuple[str, Policy]] = {
    "forecasts, whose weights follow from decisions": ("plain", forecast(0.5)),
    "first block": ("flux", dicompile.FirstBlockCache(threshold=0.7)),
    "drift of the modulated input adds up": ("flux", dicompile.TeaCache((1, 0), threshold=0.4)),
    "weights made on the device": ("plain", dicompile.DiCache(depth=1, threshold=0.2, warmup=2)),
    "verified": ("plain", dicompile.SpeCa(threshold=0.02, decay=1, shortest=1, longest=4, order=1)),
}


def check(together: Run, alone: Sequence[Run], atol: float = 1e-5) -> None:
    """Check that every sample of a batch has decided, and got, what it does alone, and not all of them the same."""
    for row, single in enumerate(alone):
        assert together.recalls(row) == single.recalls()
        for ours, theirs in zip(together.outputs, single.outputs, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, rtol=0, atol=atol)
    assert together.report.kinds["mixed"] >= 2, "the test would say nothing"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_a_batch_gives_what_single_runs_give(name: str, request: pytest.FixtureRequest) -> None:
    fixture, policy = CASES[name]
    sample = request.getfixturevalue(fixture)
    count, single = len(sample.inputs["x" if fixture == "plain" else "hidden_states"]), optimized(sample, policy, STEPS)
    together = run(optimized(sample, policy.per_sample(), STEPS), sample, range(count))
    alone = [run(single, sample, [row]) for row in range(count)]
    check(together, alone)
    peak = sum(one.report.peak_cache_bytes for one in alone)
    assert (together.report.peak_cache_bytes, together.report.cache_bytes) == (peak, 0)


def test_nobody_computes_for_another_one(plain: Sample) -> None:
    """The latent decides before anything has run, so that operations are those of single runs, all counted."""

    def counted(model: Any, rows: Sequence[int]) -> tuple[Run, int]:
        found = run(model, plain, rows)
        with FlopCounterMode(display=False) as counter:
            run(model, plain, rows)
        return found, counter.get_total_flops()

    policy = dicompile.EasyCache(threshold=0.25, warmup=2)
    single = optimized(plain, policy, STEPS)
    together, flops = counted(optimized(plain, policy.per_sample(), STEPS), [0, 1])
    alone = [counted(single, [row]) for row in (0, 1)]
    check(together, [found for found, _ in alone])
    assert flops == sum(own for _, own in alone)


def test_samples_that_agree_run_as_the_call_would(plain: Sample) -> None:
    """One decision each, and no group by itself: one capture for the batch, and one that shows that rows are apart."""
    model = optimized(plain, dicompile.FirstBlockCache(threshold=9.0).per_sample(), STEPS)
    found = run(model, plain, [0, 1])
    assert found.report.kinds == {"full": 1, "recalled": STEPS - 1}
    assert len(models.frames_of(model)) == 2
    assert "the gate recalled at 16 of 16 steps" in str(found.report)
    assert "for every sample by itself, and else compute everything" in str(dicompile.plan_of(model))


@pytest.mark.parametrize("way", ["hoisted", "autocast"])
def test_rows_are_run_as_the_batch_is(plain: Sample, way: str) -> None:
    """What is computed outside of the steps is taken apart, too; grad mode and autocast are those of the caller."""
    around = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else torch.inference_mode()
    policy, hoist = dicompile.FirstBlockCache(threshold=0.5), "all" if way == "hoisted" else "off"
    together = run(optimized(plain, policy.per_sample(), STEPS, hoist=hoist), plain, [0, 1], around)
    assert (together.report.hoisted_bytes > 0) == (way == "hoisted")
    alone = optimized(plain, policy, STEPS, hoist=hoist)
    check(together, [run(alone, plain, [row], around) for row in (0, 1)], 1e-5 if way != "autocast" else 5e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("policy", [
    pytest.param(dicompile.FirstBlockCache(threshold=0.5).per_sample(), id="samples"),
    pytest.param(dicompile.GuidanceReuse(interval=3, timesteps=(-1, 1001), halves="uncond-cond"), id="halves"),
])  # fmt: skip
def test_compiled_code_decides_and_gives_what_single_operators_do(plain: Sample, policy: Policy) -> None:
    def sampled(mode: str) -> Run:
        model, outputs = optimized(plain, policy, STEPS, mode), []
        with dicompile.session(), torch.no_grad():
            for time, latent in zip(TIMES, latents(plain.inputs["x"]), strict=True):
                rows = latent if policy.name.startswith("first") else latent[[0, 0]]
                outputs.append(model(rows, torch.full((2,), time), plain.inputs["y"]))
            return Run(outputs, dicompile.report(model))

    found, expected = sampled("inductor"), sampled("eager")
    assert found.report.kinds == expected.report.kinds
    assert len(found.report.kinds) > 1
    torch.testing.assert_close(torch.stack(found.outputs), torch.stack(expected.outputs), atol=1e-5, rtol=1e-5)


def test_one_timestep_for_all_rows_becomes_one_for_each(plain: Sample) -> None:
    gate = Gate(probe="embedding", reference="previous", threshold=0.9, accumulates=True)
    policy = Policy(name="x", cadence=Cadence(gate=gate), rules=(Rule(sites=("stack",), do=Reuse(what="update")),))
    model = optimized(plain, policy.per_sample(), STEPS)
    expected = run(model, plain, [0, 1])
    with torch.no_grad():
        for time, latent, theirs in zip(TIMES, latents(plain.inputs["x"]), expected.outputs, strict=True):
            found = model(latent, torch.full((1,), time), plain.inputs["y"])
            torch.testing.assert_close(found, theirs, rtol=0, atol=0)
    assert dicompile.report(model).decisions == expected.report.decisions
    assert expected.report.kinds["mixed"] > 0


def test_both_halves_of_a_picture_decide_together(plain: Sample) -> None:
    """Their drift is that of both, as where a call has this picture alone."""
    policy = dicompile.FirstBlockCache(threshold=0.5)

    def sampled(model: Any, rows: list[int]) -> Run:
        outputs = []
        with dicompile.session(), torch.no_grad():
            for time, latent in zip(TIMES, latents(plain.inputs["x"]), strict=True):
                y = torch.cat([torch.full((len(rows),), 10), plain.inputs["y"][rows]])
                found = model(torch.cat([latent[rows]] * 2), torch.full((len(y),), time), y)
                outputs.append(found.unflatten(0, (2, -1)).transpose(0, 1))
            return Run(outputs, dicompile.report(model))

    together = sampled(optimized(plain, policy.per_sample(halves="uncond-cond"), STEPS), [0, 1])
    single = optimized(plain, policy, STEPS)
    check(together, [sampled(single, [row]) for row in (0, 1)])


def test_a_batch_of_another_size_begins_anew(plain: Sample) -> None:
    model = optimized(plain, dicompile.FirstBlockCache(threshold=9.0).per_sample(), STEPS)
    with torch.no_grad():
        for step, (time, latent) in enumerate(zip(TIMES, latents(plain.inputs["x"]), strict=True)):
            rows = range(2 if step < 4 else 1)
            model(latent[list(rows)], torch.full((len(rows),), time), plain.inputs["y"][list(rows)])
    kinds = [call.kind for call in dicompile.report(model).calls]
    assert kinds == ["full", *["recalled"] * 3, "full", *["recalled"] * 4]


class Mixing(models.PlainDiT):
    """Every picture sees the mean of the batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return super().forward(x - x.mean(0, keepdim=True), t, y)


def test_rows_that_see_each_other_are_refused() -> None:
    sample = Sample(models.redraw(Mixing(2)), models.plain_dit(2).inputs)
    model = optimized(sample, dicompile.FirstBlockCache().per_sample(), STEPS)
    with pytest.raises(CannotBatch, match=r"is not known to keep the rows of a batch apart") as raised, torch.no_grad():
        model(**sample.inputs)
    assert "aten.mean" in str(raised.value)


def test_a_policy_that_decides_nothing_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match=r"magcache.* decides nothing while sampling"):
        dicompile.MagCache("flux").per_sample()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"probe": "partner", "leads": "cond", "decides": "sample"}, "nothing of a sample is compared"),
        ({"probe": "partner", "leads": "left", "halves": "uncond-cond"}, "'left' is none of the halves"),
        ({"threshold": 0.1, "halves": "uncond-cond"}, "one decision holds for the whole call"),
    ],
)
def test_a_gate_says_what_it_cannot(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidPolicy, match=why):
        Gate(**options)


def test_what_has_one_graph_for_all_rows_is_refused() -> None:
    policy, sample = dicompile.FirstBlockCache().per_sample(), models.plain_dit(1)
    with pytest.raises(InvalidSetting, match=r"tells the rows of a batch apart, which does not go with warmup"):
        dicompile.optimize(sample.model, policy, schedule=TIMES, warmup="background")
    with pytest.raises(CannotBatch, match=r"tells the rows of a request apart"):
        Batcher(sample.model).request(policy, schedule=TIMES)
    with pytest.raises(InvalidSetting, match=r"tells the rows of a batch apart, which the backend cannot"):
        read_options({"policy": policy.to_dict(), "steps": 4})


def test_it_goes_to_text_and_back() -> None:
    policy = dicompile.TeaCache("flux").per_sample(halves="uncond-cond")
    assert Policy.from_yaml(policy.to_yaml()) == policy
