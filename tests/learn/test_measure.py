"""Measuring: calls of every kind of step are timed, and plans take as long as they say, by a clock that counts."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dicompile
from dicompile.errors import InvalidSetting, InvalidTiming, NotOptimized
from dicompile.learn import measure as measuring
from dicompile.learn.measure import Timer
from dicompile.plan import TURN
from dicompile.plan.plan import ROOFLINE
from dicompile.runtime import storage
from dicompile.wrapper import record_of
from tests.models import Sample, frames_of, plain_dit, timesteps
from tests.pipelines import pipes

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS, TURNS = 20, 2
POOLED = 0.01
"""Full steps count as one kind, whatever they store, and by this clock they differ a little."""


class Clock:
    """Goes on while pieces of code run: by ten for every weight that they read, and by one for any other value.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, function: Any, inputs: Sequence[int], outputs: Sequence[int], registers: list[Any]) -> None:
        self.now += sum(10 if isinstance(registers[i], nn.Parameter) else 1 for i in inputs)
        _RUN(function, inputs, outputs, registers)

    def seconds(self, run: Callable[[], object]) -> float:
        before = self.now
        run()
        return self.now - before


_RUN = storage._run_call


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    made = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_run_call", made.run)
        patch.setattr(measuring, "perf_counter", made)
        patch.setattr(measuring, "COMPILING", SimpleNamespace(seconds=0.0))
        yield made


@pytest.fixture(scope="module")
def sample() -> Sample:
    return plain_dit(layers=2)


def sampled(model: nn.Module, sample: Sample, steps: int = STEPS, batch: int = 4) -> None:
    """A run of the model; latents go from one draw to another."""
    ends = torch.randn(2, *sample.inputs["x"].shape, generator=torch.Generator().manual_seed(0))
    for step, time in enumerate(timesteps(steps)):
        latent = torch.lerp(ends[0], ends[1], step / steps)
        inputs = {**sample.inputs, "x": latent, "t": torch.full((4,), time)}
        model(**{name: value[:batch] for name, value in inputs.items()})


@contextlib.contextmanager
def optimized(sample: Sample, policy: Any, steps: int = STEPS, **options: Any) -> Iterator[nn.Module]:
    model = dicompile.optimize(sample.model, policy, schedule=timesteps(steps), backend="eager", **options)
    try:
        yield model
    finally:
        dicompile.restore(model)


@pytest.fixture(scope="module")
def timing(clock: Clock, sample: Sample) -> dicompile.Timing:
    with optimized(sample, "none") as model, dicompile.measure(model) as measured:
        for _ in range(TURNS):
            sampled(model, sample)
    return measured


@pytest.fixture(scope="module")
def recording(sample: Sample) -> dicompile.Recording:
    with optimized(sample, "none") as model, dicompile.calibrate(model) as made:
        sampled(model, sample)
    return made


def taken(clock: Clock, sample: Sample, policy: Any, **options: Any) -> tuple[float, dicompile.Plan]:
    """Seconds of a run, and its plan."""
    with optimized(sample, policy, **options) as model:
        seconds = clock.seconds(lambda: sampled(model, sample))
        return seconds, dicompile.plan_of(model)


def test_calls_of_every_kind_are_counted_but_for_the_first_of_each(timing: dicompile.Timing) -> None:
    assert {kind.name: len(kind.seconds) for kind in timing.kinds} == {
        "full": 15, "site-1": 3, "site-2": 3, "site-3": 3, "stack-1": 3, "stack-2": 3, "stack-3": 3
    }  # fmt: skip
    full, *others = timing.kinds
    assert max(full.seconds) / min(full.seconds) - 1 < POOLED
    assert all(len(set(kind.seconds)) == 1 for kind in others), "each has a time of its own by this clock"
    medians = [kind.median for kind in others]
    assert full.median > max(medians)
    assert medians[0] < medians[1] < medians[2] > medians[3] < medians[4] < medians[5], "every stored value is read"
    facts = timing.facts
    assert (facts.model, facts.latent, facts.dtype, facts.code) == ("PlainDiT", (4, 4, 16, 16), "float32", "eager")
    assert facts.sites[:2] == ("0.self-attention", "0.mlp")


@pytest.mark.parametrize("policy", [dicompile.FORA(3), dicompile.TaylorSeer(3, order=2), dicompile.TaylorSeerLite(3)])
def test_a_plan_takes_as_long_as_it_says(
    clock: Clock, sample: Sample, timing: dicompile.Timing, policy: dicompile.Policy
) -> None:
    seconds, plan = taken(clock, sample, policy, timing=timing)
    assert sum(step.time for step in plan.steps) == pytest.approx(seconds, rel=POOLED)
    uncached, plain = taken(clock, sample, "none")
    assert plan.predicted_speedup == pytest.approx(uncached / seconds, rel=POOLED)
    assert plain.clock == ROOFLINE


@pytest.mark.parametrize("speedup", [1.5, 2])
def test_auto_keeps_a_budget_of_time(
    clock: Clock, sample: Sample, timing: dicompile.Timing, recording: dicompile.Recording, speedup: float
) -> None:
    goal = {"recording": recording, "speedup": speedup}
    uncached, _ = taken(clock, sample, "none")
    seconds, plan = taken(clock, sample, "auto", timing=timing, **goal)
    assert seconds <= uncached / speedup * (1 + POOLED)
    point = recording.frontier(timing=timing).point(speedup=speedup)
    assert (point.time, point.seconds) == pytest.approx((seconds / uncached, seconds), rel=POOLED)
    assert plan.predicted_speedup == pytest.approx(uncached / seconds, rel=POOLED)
    by_operations, _ = taken(clock, sample, "auto", **goal)
    assert by_operations > 1.1 * uncached / speedup, "by this clock a cached step costs more than its operations"


def test_budgets_and_the_frontier_are_of_time(timing: dicompile.Timing, recording: dicompile.Recording) -> None:
    frontier = recording.frontier(timing=timing)
    times = [point.time for point in frontier.points]
    assert times == sorted(times, reverse=True)
    assert frontier.points[0].time == 1.0
    assert frontier.point(budget=0.6) == frontier.point(speedup=1 / 0.6)
    with pytest.raises(InvalidSetting, match=r"1\.0% of the time are not enough"):
        frontier.point(budget=0.01)
    for shown in (str(frontier), frontier._repr_html_()):
        assert "time measured on" in " ".join(shown.split())
    assert "of the time (" in str(frontier.point(budget=0.6))
    counted = recording.frontier()
    assert "operations are counted" in str(counted)
    assert counted.table().columns[2].header != "time" == frontier.table().columns[2].header
    policy = recording.policy(budget=0.6, timing=timing)
    assert policy == frontier.policy(frontier.point(budget=0.6))


def test_the_summary_says_what_times_follow_from(sample: Sample, timing: dicompile.Timing, tmp_path: Path) -> None:
    file = tmp_path / "timing.json"
    timing.save(file)
    for options, clock_text in (({"timing": file}, "time measured on"), ({}, ROOFLINE)):
        with optimized(sample, dicompile.FORA(2), **options) as model:
            sampled(model, sample)
            assert clock_text in " ".join(str(dicompile.summary(model)).split())


def test_a_pipeline_is_then_as_it_was(clock: Clock) -> None:
    sampler = pipes.sd3()
    transformer = sampler.pipe.transformer
    with dicompile.measure(sampler.pipe, backend="eager") as timing:
        sampler(2 * STEPS)
    assert timing.facts.model == "SD3Transformer2DModel"
    assert sampler.pipe.transformer is transformer
    with pytest.raises(KeyboardInterrupt), dicompile.measure(sampler.pipe):
        raise KeyboardInterrupt
    assert sampler.pipe.transformer is transformer
    flux = pipes.flux()
    with pytest.raises(InvalidTiming, match="of SD3Transformer2DModel, the model is FluxTransformer2DModel"):
        dicompile.optimize(flux.pipe, "fora", timing=timing)
    assert not isinstance(flux.pipe.transformer, dicompile.CachedModel)


def test_an_optimized_model_goes_on_with_its_policy(clock: Clock, sample: Sample) -> None:
    with optimized(sample, dicompile.FORA(2)) as model:
        sampled(model, sample)
        calls = record_of(model).calls
        with dicompile.measure(model):
            for _ in range(TURNS):
                sampled(model, sample)
        assert record_of(model).calls is calls
        sampled(model, sample)
        assert dicompile.report(model).kinds == {"full": STEPS // 2 + 1, "reuse": STEPS // 2 - 1}


def test_an_optimized_model_is_timed_with_its_own_options(clock: Clock, sample: Sample) -> None:
    with optimized(sample, "none", 2 * STEPS, cache_dtype="bfloat16") as model, dicompile.measure(model) as timing:
        sampled(model, sample, 2 * STEPS)
    assert timing.facts.code == "eager, cache bfloat16"
    with optimized(sample, "none", timing=timing) as model:
        with pytest.raises(InvalidTiming, match="times are of code eager, cache bfloat16, the call is of eager"):
            sampled(model, sample)
        assert not frames_of(model)


def test_another_size_or_dtype_is_refused_at_its_first_call(sample: Sample, timing: dicompile.Timing) -> None:
    with optimized(sample, "none", timing=timing) as model:
        sampled(model, sample)
        with pytest.raises(InvalidTiming, match=r"latent \[4, 4, 16, 16\], the call is of \[2, 4, 16, 16\]"):
            sampled(model, sample, batch=2)
        inputs = {name: v.double() if v.is_floating_point() else v for name, v in sample.inputs.items()}
        with pytest.raises(InvalidTiming, match="dtype float32, the call is of float64"):
            model.double()(**inputs)
        model.float()
        assert len(frames_of(model)) == 1


def test_times_of_another_size_than_the_recording_are_refused(
    timing: dicompile.Timing, recording: dicompile.Recording
) -> None:
    def other(**facts: object) -> dicompile.Timing:
        return dicompile.Timing(timing.facts.model_copy(update=facts), timing.kinds)

    with pytest.raises(InvalidTiming, match=r"size \[4, 8, 8\], the recording is of \[4, 16, 16\]"):
        recording.frontier(timing=other(latent=(4, 4, 8, 8)))
    with pytest.raises(InvalidTiming, match="of branches 1, the recording is of 4"):
        recording.policy(speedup=2, timing=other(sites=("0.mlp",)))
    assert recording.frontier(timing=other(latent=(8, 4, 16, 16))).points, "another batch is no other size"


def test_what_cannot_be_timed_is_said(clock: Clock, sample: Sample) -> None:
    with optimized(sample, "none") as model:
        with pytest.raises(InvalidTiming, match="it was not called"), dicompile.measure(model):
            pass
        with pytest.raises(InvalidTiming, match="there were latents"), dicompile.measure(model):
            for batch in (4, 2):
                sampled(model, sample, batch=batch)
    text = "too few steps ran: of stack-1, stack-2, stack-3 nothing was timed"
    with optimized(sample, "none", 10) as model, pytest.raises(InvalidTiming, match=text), dicompile.measure(model):
        for _ in range(TURNS):
            sampled(model, sample, 10)
    with pytest.raises(NotOptimized, match="was not optimized"), dicompile.measure(sample.model):
        pass


def test_every_denoiser_of_a_pipeline_is_timed(clock: Clock) -> None:
    sampler = pipes.wan22()
    text = r"times of transformer \(WanTransformer3DModel\) are incomplete"
    with pytest.raises(InvalidTiming, match=text) as caught, dicompile.measure(sampler.pipe, backend="eager"):
        sampler(4)
    assert f"so many that transformer has {TURN} of them" in str(caught.value)
    with dicompile.measure(sampler.pipe, backend="eager") as timing:
        sampler(3 * TURN)
    assert not any(isinstance(one, dicompile.CachedModel) for one in sampler.denoisers)
    assert list(timing.denoisers) == ["transformer", "transformer_2"]
    counts = [sum(len(kind.seconds) for kind in each.kinds) for each in timing.denoisers.values()]
    assert sum(counts) == 2 * 3 * TURN - 2 * 7, "both guidance contexts, but for the first call of each kind"
    assert counts[0] < counts[1]
    dicompile.optimize(sampler.pipe, "fora", timing=timing, backend="eager")
    sampler(4)
    for name, one in zip(timing.denoisers, sampler.denoisers, strict=True):
        assert dicompile.plan_of(one).clock == timing.of(name).clock


class Stub:
    """Calls of a model: each takes some seconds, of which it compiles for some, and is a replay or not."""

    def __init__(self, timer: Timer, clock: Clock, compiling: SimpleNamespace) -> None:
        self._timer, self._clock, self._compiling = timer, clock, compiling

    def __call__(self, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seconds, compiled, replayed = given
        self._clock.now += seconds + compiled
        self._compiling.seconds += compiled
        report = self._timer._report
        report.latest = "full"
        report.replayed += replayed


def timer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Timer:
    made = Timer(record_of(dicompile.optimize(plain_dit(layers=1).model, "none", schedule=4, backend="eager")))
    compiling = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(measuring, "COMPILING", compiling)
    monkeypatch.setattr(made, "_calls", Stub(made, clock, compiling))
    return made


def test_time_spent_compiling_does_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    made = timer(clock, monkeypatch)
    for seconds, compiled in ((7.0, 100.0), (2.0, 50.0), (3.0, 0.0)):
        made((seconds, compiled, 0), {})
    assert made.seconds == {"full": [2.0, 3.0]}
    assert statistics.median(made.seconds["full"]) == 2.5


def test_of_cuda_graphs_only_replays_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    made = timer(clock, monkeypatch)
    made._records_steps = True
    for seconds, replayed in ((9.0, 0), (8.0, 0), (2.0, 1), (7.0, 0), (3.0, 1)):
        made((seconds, 0.0, replayed), {})
    assert made.seconds == {"full": [2.0, 3.0]}


def test_a_device_has_done_its_work_before_and_after(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    made, at, start = timer(clock, monkeypatch), list[float](), clock.now

    def wait(device: torch.device) -> None:
        at.append(clock.now - start)
        clock.now += 0.5  # what was still running

    monkeypatch.setattr(measuring, "wait_for", wait)
    for _ in range(2):
        made((2.0, 0.0, 0), {})
    assert at == [0.0, 2.5, 3.0, 5.5]
    assert made.seconds == {"full": [2.5]}, "what ran before does not count, what the call left does"
