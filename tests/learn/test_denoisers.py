"""Several denoisers of one run: recorded, searched, timed and planned as one, each with its own steps."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import (
    CallOutsideSchedule,
    InvalidPolicy,
    InvalidRecording,
    InvalidTiming,
    PolicyDoesNotFit,
    UnsupportedModel,
)
from dicompile.learn.frontier import Frontier
from dicompile.learn.search import fit, sensitivity, squared_error
from dicompile.learn.trace import Facts, Part, Trace
from dicompile.plan import FULL, Stint, TimedKind, TimestepSchedule, TimingFacts, make_plan
from dicompile.store import save_tensors
from tests.models import plain_dit
from tests.pipelines import pipes
from tests.plan.toys import toy

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = 10


@pytest.fixture(scope="module")
def film() -> pipes.Sampler:
    """Wan 2.2, which every test leaves as it was."""
    return pipes.wan22()


@pytest.fixture(scope="module")
def recording(film: pipes.Sampler) -> dicompile.Recording:
    with dicompile.calibrate(film.pipe) as recorded:
        film(STEPS, seed=2)
        film(STEPS, seed=3)
    return recorded


@pytest.fixture
def optimized(film: pipes.Sampler) -> Iterator[Callable[..., pipes.Sampler]]:
    def restore() -> None:
        if any(isinstance(one, dicompile.CachedModel) for one in film.denoisers):
            dicompile.restore(film.pipe)

    def optimize(policy: Any, **options: Any) -> pipes.Sampler:
        restore()
        dicompile.optimize(film.pipe, policy, backend="eager", **options)
        return film

    yield optimize
    restore()
    film.pipe.register_to_config(boundary_ratio=0.875)


def boundary(sampler: pipes.Sampler) -> int:
    """Steps of the first denoiser in the last run."""
    return int((sampler.scheduler.timesteps >= 1000 * sampler.pipe.config.boundary_ratio).sum())


def test_every_denoiser_is_recorded_with_the_steps_that_it_has(
    film: pipes.Sampler, recording: dicompile.Recording
) -> None:
    first = boundary(film)
    assert 1 < first < STEPS - 1
    assert recording.facts.stints == (
        Stint(component="transformer", first=0, end=first),
        Stint(component="transformer_2", first=first, end=STEPS),
    )
    assert [(trace.run, trace.context) for trace in recording.traces] == list(
        itertools.product((0, 1), ("cond", "uncond"))
    )
    assert not any(isinstance(one, dicompile.CachedModel) for one in film.denoisers)
    assert f"transformer at steps 1 to {first}, transformer_2 at steps {first + 1} to {STEPS}" in str(recording)


def test_a_run_is_recorded_as_one_across_the_change(film: pipes.Sampler, recording: dicompile.Recording) -> None:
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].flatten().double())

    handles = [one.register_forward_pre_hook(note, with_kwargs=True) for one in film.denoisers]
    film(STEPS, seed=2)
    for handle in handles:
        handle.remove()
    latents = torch.stack(seen[::2])
    assert torch.allclose(recording.traces[0].gram[-1], latents @ latents.T, rtol=1e-4)


def test_the_budget_is_of_the_whole_run_and_divided_by_the_search(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]
) -> None:
    first = recording.facts.parts[1].stint.first
    point = recording.frontier().point(budget=0.5)
    assert point.compute <= 0.5
    sampler = optimized("auto", recording=recording, budget=0.5)
    sampler(STEPS)
    plans = [dicompile.plan_of(one) for one in sampler.denoisers]
    assert [plan.schedule.numbers for plan in plans] == [range(first), range(first, STEPS)]
    full = [[n for n, s in zip(p.schedule.numbers, p.steps, strict=True) if s.kind == "full"] for p in plans]
    assert [steps[0] for steps in full] == [0, first]
    assert (*full[0], *full[1]) == point.full
    assert tuple(map(len, full)) == point.split
    assert sum(p.flops for p in plans) == pytest.approx(point.compute * sum(p.baseline_flops for p in plans))
    assert max(plan.cache_bytes for plan in plans) == point.cache_bytes
    assert dicompile.report(sampler.pipe).kinds == pipes.kinds(plans[0], 2) + pipes.kinds(plans[1], 2)
    assert dicompile.report(sampler.pipe).cold_starts == []


def test_the_joint_plan_is_nearer_than_fewer_steps(
    film: pipes.Sampler, recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]
) -> None:
    uncached = film(STEPS, seed=7)
    point = recording.frontier().point(budget=0.5)
    cached = optimized("auto", recording=recording, budget=0.5)(STEPS, seed=7)
    error = float((cached - uncached).norm() / uncached.norm())
    assert 0 < error < 0.1 * point.fewer_steps


def test_no_denoiser_forecasts_from_what_another_has_stored(recording: dicompile.Recording) -> None:
    first, policy = recording.facts.parts[1].stint.first, recording.policy(budget=0.6)
    for rule in policy.rules:
        assert isinstance(rule.do, dicompile.Fitted)
        for step, row in enumerate(rule.do.weights):
            own = sum(full < step and (full >= first) == (step >= first) for full in policy.cadence.at)
            assert bool(row) == (step not in policy.cadence.at)
            assert all(len(weights) == min(own, 3) for weights in row)  # type: ignore[arg-type]


def test_evenly_spaced_full_steps_are_fitted_for_each(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]
) -> None:
    policy = recording.fitted(dicompile.Cadence(interval=3, anchor="last"), order=1)
    sampler = optimized(policy)
    sampler(STEPS)
    plans = [dicompile.plan_of(one) for one in sampler.denoisers]
    kinds = [[step.kind for step in plan.steps] for plan in plans]
    assert [row[:4] for row in kinds] == [(["full", "forecast", "forecast", "full"] * 2)[: len(r)][:4] for r in kinds]


def test_a_file_holds_who_had_which_steps(recording: dicompile.Recording, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    recording.save(file)
    read = dicompile.Recording.load(file)
    assert read.facts == recording.facts
    assert read.policy(budget=0.5) == recording.policy(budget=0.5)
    assert (read.of_runs([0]) + read.of_runs([1])).policy(budget=0.5) == recording.policy(budget=0.5)


def test_a_policy_file_goes_to_every_denoiser(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler], tmp_path: Path
) -> None:
    policy, file = recording.policy(budget=0.5), tmp_path / "p.yaml"
    file.write_text(policy.to_yaml())
    assert dicompile.get_policy(str(file)) == policy
    found = optimized(str(file))(STEPS, seed=7)
    assert torch.equal(optimized("auto", recording=recording, budget=0.5)(STEPS, seed=7), found)


def test_everything_can_be_made_ahead(recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]) -> None:
    sampler = optimized("auto", recording=recording, budget=0.5)
    sampler(STEPS)
    dicompile.prepare(sampler.pipe)
    made = [one.frames[0].programs.variants.variants for one in sampler.denoisers]
    sampler(STEPS)
    assert [one.frames[0].programs.variants.variants for one in sampler.denoisers] == made


# What is refused


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.7, "transformer was called at step {end}, and its policy is for transformer at steps 1 to {first}"),
        (0.95, "transformer_2 was called at step {at}, and its policy is for transformer_2 at steps {end} to"),
        (None, "transformer was called at step {end}, and its policy is for transformer at steps 1 to {first}"),
    ],
)
def test_another_boundary_is_refused_by_name(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler], ratio: float | None, text: str
) -> None:
    sampler = optimized("auto", recording=recording, budget=0.5)
    first = recording.facts.parts[0].stint.end
    sampler.pipe.register_to_config(boundary_ratio=ratio)
    with pytest.raises(CallOutsideSchedule) as caught:
        sampler(STEPS)
    at = boundary(sampler) + 1 if ratio else 0
    assert text.format(first=first, end=first + 1, at=at) in str(caught.value)


def test_calibration_of_an_optimized_pipeline_may_have_another_boundary(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]
) -> None:
    sampler = optimized("auto", recording=recording, budget=0.5)
    sampler.pipe.register_to_config(boundary_ratio=0.7)
    with dicompile.calibrate(sampler.pipe) as other:
        sampler(STEPS)
    assert other.facts.parts[1].stint.first == boundary(sampler) > recording.facts.parts[1].stint.first
    with pytest.raises(InvalidRecording, match="one is of transformer at steps 1 to"):
        recording + other


def test_another_number_of_steps_is_refused_by_name(
    recording: dicompile.Recording, optimized: Callable[..., pipes.Sampler]
) -> None:
    with pytest.raises(PolicyDoesNotFit, match=f"fitted to {STEPS} steps, the schedule has 4"):
        optimized("auto", recording=recording, budget=0.5)(4)


def test_a_pipeline_without_one_of_the_denoisers_is_refused(recording: dicompile.Recording) -> None:
    with pytest.raises(PolicyDoesNotFit, match=r"and transformer is to be optimized"):
        dicompile.optimize(pipes.wan().pipe, "auto", recording=recording, budget=0.5)
    with pytest.raises(PolicyDoesNotFit, match=r"and transformer is to be optimized"):
        dicompile.optimize(pipes.wan22().pipe, recording.policy(budget=0.5), components=["transformer"])


def test_a_recording_of_one_denoiser_is_not_for_several(optimized: Callable[..., pipes.Sampler]) -> None:
    single = pipes.wan()
    with dicompile.calibrate(single.pipe) as recorded:
        single(4)
    assert recorded.facts.stints == recorded.policy(budget=0.6).stints == ()
    with pytest.raises(InvalidRecording, match="of one denoiser, and transformer and transformer_2 are to be"):
        optimized("auto", recording=recorded, budget=0.6)


def test_one_of_several_that_has_all_steps_is_named(optimized: Callable[..., pipes.Sampler]) -> None:
    sampler = optimized("none")
    sampler.pipe.register_to_config(boundary_ratio=None)
    with dicompile.calibrate(sampler.pipe) as recorded:
        sampler(4)
    assert recorded.facts.stints == (Stint(component="transformer", first=0, end=4),)
    with pytest.raises(PolicyDoesNotFit, match="transformer and transformer_2 are to be optimized"):
        optimized("auto", recording=recorded, budget=0.6)
    optimized("auto", recording=recorded, budget=0.6, components=["transformer"])(4)
    assert dicompile.report(sampler.pipe).kinds["full"] < 8


def test_a_model_by_itself_gets_its_own_part(film: pipes.Sampler, recording: dicompile.Recording) -> None:
    policy, schedule = recording.policy(budget=0.5), recording.facts.timesteps
    module = pipes.wan().pipe.transformer
    with pytest.raises(PolicyDoesNotFit, match=r"policy\.of\('transformer'\)"):
        dicompile.optimize(module, policy, schedule=schedule)
    own = policy.of("transformer_2")
    assert own.stints == policy.stints[1:]
    assert own.of("transformer_2") == own
    with pytest.raises(InvalidPolicy, match="no steps for 'transformer'"):
        own.of("transformer")
    assert dicompile.FORA(2).of("anything") == dicompile.FORA(2)
    model = dicompile.optimize(module, own, schedule=schedule, backend="eager")
    generator, time = torch.Generator().manual_seed(0), schedule[policy.stints[1].first]
    latent = torch.randn(1, 4, 2, 8, 8, generator=generator)
    text = torch.randn(1, 8, pipes.TEXT, generator=generator)
    model(latent, torch.tensor([time]), text)
    assert dicompile.plan_of(model).schedule.numbers == policy.stints[1].steps
    with pytest.raises(CallOutsideSchedule, match="transformer_2 was called at step 1,"):
        model(latent, torch.tensor([schedule[0]]), text)


def test_steps_of_another_denoiser_are_not_planned() -> None:
    structure = toy([("mlp",), ("mlp",)])
    facts, traces = made((3, 4), (100, 100))
    point = next(point for point in Frontier(facts, traces).candidates() if point.level == "site")
    policy, whole = Frontier(facts, traces).policy(point), TimestepSchedule(7)
    own = policy.of("t1")
    assert len(make_plan(structure, own, whole.rest(3)).steps) == 4
    assert len(make_plan(structure, own, whole.rest(5)).steps) == 2, "a guidance partner that joins late"
    with pytest.raises(PolicyDoesNotFit, match="is for t1 at steps 4 to 7, and was asked for steps 1 to 7"):
        make_plan(structure, own, whole)
    with pytest.raises(PolicyDoesNotFit, match="for a pipeline with t0 at steps 1 to 3 and t1 at steps 4 to 7"):
        make_plan(structure, policy, whole)
    recall = dicompile.Velocity(back=(1,) * 7)
    with pytest.raises(InvalidPolicy, match="has stints, and weighs velocities"):
        own.from_dict(own.to_dict() | {"rules": [{"sites": ["model"], "do": recall.model_dump()}]})


def test_a_run_that_was_left_is_not_gone_on_with() -> None:
    models = {name: plain_dit(layers=1).model for name in ("transformer", "transformer_2")}
    pipe, shown = Toy(models, lambda step: called[step]), ("transformer", "transformer_2")
    with dicompile.calibrate(pipe) as recorded:
        for first, second in (((shown[0],), ()), ((), (shown[1],))):
            called = [first, first, second, second]
            pipe(4)
        assert not recorded.traces
        called = [shown[:1], shown[:1], shown[1:], shown[1:]]
        pipe(4)
    assert [stint.end for stint in recorded.facts.stints] == [2, 4]
    assert len(recorded.traces) == 1


@pytest.mark.parametrize("bounds", [((0, 4), (5, 8)), ((0, 4), (4, 4)), ((0, 4), (3, 8))])
def test_stints_follow_each_other(bounds: tuple[tuple[int, int], ...]) -> None:
    stints = tuple(Stint(component=f"t{i}", first=first, end=end) for i, (first, end) in enumerate(bounds))
    with pytest.raises(InvalidPolicy, match="stints that do not follow each other"):
        dicompile.Policy(name="mine", stints=stints)
    twice = (Stint(component="t", first=0, end=4), Stint(component="t", first=4, end=8))
    with pytest.raises(InvalidPolicy, match="stints that do not follow each other"):
        dicompile.Policy(name="mine", stints=twice)


class Toy:
    """A pipeline of two models, which a rule calls one after the other, or at the same steps.

    Args:
        models: by component.
        calls: who is called at a step.
    """

    def __init__(self, models: dict[str, nn.Module], calls: Callable[[int], tuple[str, ...]]) -> None:
        self.scheduler = pipes.DDIMScheduler()
        vars(self).update(models)
        self._names, self._calls = tuple(models), calls

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def __call__(self, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latent, labels = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
        for step, time in enumerate(self.scheduler.timesteps):
            for name in self._calls(step):
                latent = 0.9 * latent + 0.1 * getattr(self, name)(latent, time.expand(2), labels)
        return latent


@pytest.mark.parametrize(
    "calls",
    [
        lambda _: ("transformer", "transformer_2"),
        lambda step: ("transformer", "transformer_2") if step < 3 else ("transformer",),
        lambda step: ("transformer",) if step in (0, 1, 4) else ("transformer_2",),
        lambda step: ("transformer",) if step < 2 else ("transformer_2", "transformer"),
    ],
)
def test_denoisers_that_do_not_take_over_once_are_refused(calls: Callable[[int], tuple[str, ...]]) -> None:
    models = {name: plain_dit(layers=1).model for name in ("transformer", "transformer_2")}
    pipe = Toy(models, calls)
    if calls(3) == ("transformer",):  # the other one was there for a while only: the first has the run by itself
        with dicompile.calibrate(pipe) as recorded:
            pipe(5)
        assert [stint.component for stint in recorded.facts.stints] == ["transformer"]
        return
    with pytest.raises(InvalidRecording, match="run side by side"), dicompile.calibrate(pipe):
        pipe(5)
    assert pipe.components == models


def test_denoisers_with_other_branches_are_refused() -> None:
    models = {"transformer": plain_dit(layers=1).model, "transformer_2": plain_dit(layers=2).model}
    pipe = Toy(models, lambda step: ("transformer",) if step < 2 else ("transformer_2",))
    said = "transformer and transformer_2 have other branches than each other"
    with pytest.raises(UnsupportedModel, match=said), dicompile.calibrate(pipe):
        pipe(4)


# The search


def made(
    bounds: tuple[int, ...] = (3, 4), full: tuple[int, ...] = (100, 300), seed: int = 0
) -> tuple[Facts, tuple[Trace, ...]]:
    """A recording of values that move smoothly, of denoisers with so many steps and such costs."""
    rng, steps = np.random.default_rng(seed), sum(bounds)
    time = np.linspace(0, 1, steps)[:, None]

    def moving() -> Tensor:
        value = np.cos(4 * time * rng.normal(size=(1, 40))) + time**3 * rng.normal(size=(1, 40))
        return torch.tensor(value @ value.T)

    costs = [
        {"model": "Toy", "full_flops": cost, "site_flops": cost // 5, "stack_flops": cost // 10, "site_bytes": 10,
         "stack_bytes": 2} for cost in full
    ]  # fmt: skip
    ends = np.cumsum(bounds).tolist()
    parts = [
        Part(**cost, stint=Stint(component=f"t{i}", first=end - size, end=end))
        for i, (cost, end, size) in enumerate(zip(costs, ends, bounds, strict=True))
    ]
    facts = Facts(**costs[0], sites=("0.mlp", "1.mlp"), spans=("stack",), steps=steps, parts=tuple(parts))
    gram = torch.stack([moving() for _ in facts.values])
    reused = torch.tensor(rng.uniform(0.2, 1, (2, steps)))
    return facts, (Trace(0, "-", gram, reused),)


def expected(facts: Facts, trace: Trace, level: str, full: tuple[int, ...]) -> tuple[float, float]:
    """Cost and error of full steps, written out: every denoiser forecasts from its own last two full steps."""
    gram = trace.gram[:2].numpy() if level == "site" else trace.gram[2:3].numpy()
    gram = gram / gram.diagonal(axis1=1, axis2=2).mean(1)[:, None, None]
    frontier = Frontier(facts, [trace])
    moves, cost, square = frontier._moves, 0.0, 0.0
    for part in facts.parts:
        steps = part.stint.steps
        own = gram[:, steps.start : steps.stop, steps.start : steps.stop]
        arrives = sensitivity(own, trace.reused[facts.levels.index(level)].numpy()[steps.start : steps.stop])
        gap, stored = 0.0, []
        for step in steps:
            if step in full:
                square, gap, stored = square + gap**2, 0.0, [step - steps.start, *stored][:2]
                cost += part.full_flops
                continue
            weights = fit(own, step - steps.start, stored)
            wrong = math.sqrt(squared_error(own, step - steps.start, stored, weights).mean())
            gap += wrong * moves[step] * arrives[step - steps.start]
            cost += part.site_flops if level == "site" else part.stack_flops
        square += gap**2
    return cost / facts.full_run, math.sqrt(square) * (2 if level == "stack" else 1)


@pytest.mark.parametrize(
    ("bounds", "full"), [((3, 4), (100, 300)), ((4, 3), (100, 100)), ((2, 3, 2), (50, 200, 100)), ((1, 6), (90, 30))]
)
def test_the_split_is_that_of_brute_force(bounds: tuple[int, ...], full: tuple[int, ...]) -> None:
    facts, traces = made(bounds, full)
    firsts = {part.stint.first for part in facts.parts}
    others = [step for step in range(facts.steps) if step not in firsts]
    every = [
        expected(facts, traces[0], level, tuple(sorted({*firsts, *chosen})))
        for level in facts.levels
        for number in range(len(others) + 1)
        for chosen in itertools.combinations(others, number)
    ]
    frontier = Frontier(facts, traces)
    for budget in sorted({cost for cost, _ in every}):
        best = min(error for cost, error in every if cost <= budget + 1e-9)
        point = frontier.point(budget=budget)
        assert point.cost <= budget + 1e-9
        assert point.error == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_the_dearer_denoiser_has_fewer_full_steps() -> None:
    cheap, dear = (Frontier(*made((6, 6), full)).point(budget=0.5).split for full in ((100, 1000), (1000, 100)))
    assert cheap[0] > dear[0]
    assert cheap[1] < dear[1]


def test_a_single_denoiser_is_searched_as_ever() -> None:
    facts, traces = made((8,), (100,))
    alone = Frontier(facts.model_copy(update={"parts": ()}), traces)
    assert Frontier(facts, traces).points == alone.points
    policy = alone.policy(alone.point(budget=0.5))
    assert policy.stints == ()
    named = Frontier(facts, traces).policy(alone.point(budget=0.5))
    assert named.model_copy(update={"stints": ()}) == policy


def test_memory_is_that_of_the_denoiser_that_needs_most() -> None:
    facts, traces = made((5, 5))
    large = facts.parts[1].model_copy(update={"site_bytes": 1000})
    facts = facts.model_copy(update={"parts": (facts.parts[0], large)})
    points = [point for point in Frontier(facts, traces).candidates() if point.level == "site" and point.split[1] > 2]
    assert {point.cache_bytes for point in points if point.split[1] < 5} == {3000}
    assert all(point.level == "stack" for point in Frontier(facts, traces, 500).points)


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    facts, traces = made((8,), (100,))
    old = facts.model_copy(update={"parts": (), "version": 1})
    data = {name: value for name, value in old.to_dict().items() if name != "parts"}
    tensors = {"gram/0/-": traces[0].gram, "reused/0/-": traces[0].reused}
    save_tensors(tmp_path / "old.safetensors", tensors, {"dicompile.recording": json.dumps(data)})
    read = dicompile.Recording.load(tmp_path / "old.safetensors")
    assert read.facts == old
    assert read.policy(budget=0.5) == dicompile.Recording(old, traces).policy(budget=0.5)


@pytest.mark.parametrize("bounds", [((0, 3), (4, 7)), ((0, 3), (3, 8)), ((1, 3), (3, 7)), ((0, 2**62), (2**62, 7))])
def test_a_file_whose_denoisers_do_not_share_the_steps_is_refused(
    tmp_path: Path, bounds: tuple[tuple[int, int], ...]
) -> None:
    facts, traces = made((3, 4))
    stints = (Stint(component=f"t{i}", first=first, end=end) for i, (first, end) in enumerate(bounds))
    parts = tuple(p.model_copy(update={"stint": s}) for p, s in zip(facts.parts, stints, strict=True))
    dicompile.Recording(facts.model_copy(update={"parts": parts}), traces).save(tmp_path / "bad.safetensors")
    with pytest.raises(InvalidRecording, match="is not a recording"):
        dicompile.Recording.load(tmp_path / "bad.safetensors")


# Time


def timing(full: float, cached: float) -> dicompile.Timing:
    """Times of a denoiser whose steps take as long as these."""
    facts = {"model": "Toy", "sites": ("0.mlp", "1.mlp"), "spans": ("stack",), "latent": (), "dtype": "float32"}
    kinds = [TimedKind(name=FULL, flops=100, bytes=0, seconds=(full,))]
    for level, stored in itertools.product(("site", "stack"), (1, 2, 3)):
        kinds.append(TimedKind(name=f"{level}-{stored}", flops=10, bytes=0, seconds=(cached,)))
    return dicompile.Timing(TimingFacts(**facts, device="cpu", code="eager"), kinds)


def test_a_budget_of_time_is_of_what_each_denoiser_takes() -> None:
    facts, traces = made((5, 5), (100, 100))
    timed = dicompile.Timing(denoisers={"t0": timing(1.0, 0.5), "t1": timing(3.0, 0.1)})
    recording = dicompile.Recording(facts, traces)
    for point in recording.frontier(timing=timed).points:
        (first, second), (rest, others) = point.split, (5 - n for n in point.split)
        assert point.seconds == pytest.approx(1.0 * first + 0.5 * rest + 3.0 * second + 0.1 * others)
        assert point.time == pytest.approx(point.seconds / 20)
    assert recording.policy(budget=0.6, timing=timed) != recording.policy(budget=0.6)
    alike = recording.frontier(timing=timing(1.0, 0.5)).points
    assert (
        alike
        == recording.frontier(timing=dicompile.Timing(denoisers=dict.fromkeys(("t0", "t1"), timing(1.0, 0.5)))).points
    )
    with pytest.raises(InvalidTiming, match="of t0, and not of t1"):
        recording.frontier(timing=dicompile.Timing(denoisers={"t0": timing(1.0, 0.5)}))


def test_a_file_holds_the_times_of_each(tmp_path: Path) -> None:
    file = tmp_path / "timing.json"
    dicompile.Timing(denoisers={"t0": timing(1.0, 0.5), "t1": timing(3.0, 0.1)}).save(file)
    read = dicompile.Timing.load(file)
    assert {name: each.seconds(FULL) for name, each in read.denoisers.items()} == {"t0": 1.0, "t1": 3.0}
    assert read.of("t1").facts == timing(3.0, 0.1).facts
    with pytest.raises(InvalidTiming, match="of t0 and t1, and not of a model by itself"):
        dicompile.optimize(plain_dit(layers=1).model, "none", timing=file)
    for shown in (str(read), read._repr_html_()):
        assert "t0" in shown
        assert "3000.00 ms" in shown
    single = tmp_path / "single.json"
    timing(1.0, 0.5).save(single)
    old = json.loads(single.read_text())
    del old["denoisers"]
    single.write_text(json.dumps(old | {"version": 1}))
    assert dicompile.Timing.load(single).seconds(FULL) == 1.0
    single.write_text(json.dumps(old | {"denoisers": {"t0": {"facts": old["facts"], "kinds": old["kinds"]}}}))
    with pytest.raises(InvalidTiming, match="holds no times of steps"):
        dicompile.Timing.load(single)
