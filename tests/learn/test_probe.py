"""Probes: how an error of one step has grown is measured, kept, and what `auto` goes by."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import InvalidRecording, InvalidSetting
from dicompile.learn.frontier import Frontier
from dicompile.learn.probe import Prober, nudged, probed_steps
from dicompile.learn.trace import Growth
from dicompile.plan import TimestepSchedule
from dicompile.runtime import Seen
from dicompile.store import save_tensors
from tests.models import plain_dit, timesteps
from tests.pipelines import pipes

# diffusers turns tensors into numpy arrays and back in ways that numpy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = 8
TIMES = timesteps(STEPS)


def sampled(model: nn.Module, inputs: dict[str, Tensor], wrong: int | None = None, **options: float) -> list[Tensor]:
    """A sampler of our own: the latents before every step, and at the end; at one step the output may be wrong."""
    latent, before, latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3)), None, []
    for step, time in enumerate(TIMES):
        latents.append(latent)
        with torch.no_grad():
            output = model(**inputs | {"x": latent, "t": torch.full((4,), time)})
        if step == wrong:
            assert before is not None
            output = nudged(output, before)
        before = output
        latent = options.get("keep", 1.0) * latent - 0.1 * output[:, :4]
    return [*latents, latent]


@pytest.fixture(scope="module")
def film() -> pipes.Sampler:
    """Wan 2.2: two denoisers, and guidance whose halves are calls of their own."""
    return pipes.wan22()


@pytest.fixture(scope="module")
def recording(film: pipes.Sampler) -> dicompile.Recording:
    with dicompile.calibrate(film.pipe) as recorded:
        film(STEPS, seed=2)
    return recorded


def test_a_probe_tells_what_a_sampler_makes_of_a_step_that_is_wrong() -> None:
    sample = plain_dit(layers=2)
    model = dicompile.optimize(sample.model, "none", schedule=TIMES, backend="eager")
    with dicompile.calibrate(model) as recorded:
        sampled(model, sample.inputs, keep=1.2)
    dicompile.probe(model, lambda: sampled(model, sample.inputs, keep=1.2), recorded, probes=3, progress=False)
    right = sampled(sample.model, sample.inputs, keep=1.2)
    assert [each.step for each in recorded.growth] == list(probed_steps(STEPS, 3)) == [1, 3, 5]
    for each in recorded.growth:
        wrong = sampled(sample.model, sample.inputs, each.step, keep=1.2)
        apart = [(a - b).flatten(1).norm(dim=1) for a, b in zip(wrong, right, strict=True)]
        grown = (apart[STEPS - 1] / apart[each.step + 1]).log().mean().exp()
        assert each.factor == pytest.approx(float(grown), rel=1e-3)
    assert recorded.growth[0].factor > recorded.growth[2].factor > 1, "every step multiplies by 1.2"
    assert torch.allclose(sampled(model, sample.inputs)[-1], sampled(sample.model, sample.inputs)[-1], atol=1e-5)


def test_an_output_is_wrong_by_a_share_of_its_size_whatever_it_is_stored_in() -> None:
    output, before = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    output[2] = before[2]
    moved = nudged(output, before) - output
    sizes = moved.flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)
    assert sizes.tolist() == pytest.approx([0.05, 0.05, 0.0], rel=1e-3)
    assert torch.nn.functional.cosine_similarity(moved[0].flatten(), (before - output)[0].flatten(), dim=0) > 0.999
    rough = nudged(output.bfloat16(), before.bfloat16())
    assert rough.dtype is torch.bfloat16
    assert float((rough - output.bfloat16())[0].norm() / output[0].norm()) == pytest.approx(0.2, rel=0.02)


def test_samples_that_become_others_count_no_more_than_the_rest() -> None:
    prober, schedule = Prober(6, (), (2,)), TimestepSchedule(6)
    for wrong in (None, 2):
        prober.begin(wrong)
        for step in range(6):
            latent = torch.ones(2, 4)
            if wrong is not None and step > wrong:
                latent[:, 0] += torch.tensor([0.01, 1.0]) if step == 5 else 0.01
            prober.ended(Seen(0, "", step, schedule, latent), [torch.randn(2, 4)], dict)
        prober.end()
    assert [each.step for each in prober.found] == [2]
    assert prober.found[0].factor == pytest.approx(10.0, rel=1e-3), "once and a hundred times"


def test_a_pipeline_of_two_denoisers_is_probed_as_one_and_left_as_it_was(
    film: pipes.Sampler, recording: dicompile.Recording
) -> None:
    denoisers, before, runs = film.denoisers, film(STEPS, seed=5), []

    def run() -> None:
        runs.append(film(STEPS, seed=2))

    probed = dicompile.Recording(recording.facts, recording.traces)
    dicompile.probe(film.pipe, run, probed, probes=2, progress=False)
    assert len(runs) == 1 + len(probed.growth) == 3
    assert torch.allclose(runs[0], film(STEPS, seed=2), atol=1e-5), "the first one is as it is"
    assert all(not torch.equal(run, runs[0]) for run in runs[1:])
    assert film.denoisers == denoisers
    assert torch.equal(film(STEPS, seed=5), before)
    assert "2 probes" in str(probed)


def frontier_with(recording: dicompile.Recording, *growth: Growth) -> Frontier:
    return dicompile.Recording(recording.facts, recording.traces, growth).frontier()


def test_errors_count_by_what_becomes_of_them(recording: dicompile.Recording) -> None:
    plain, probed = frontier_with(recording), frontier_with(recording, Growth(2, 8.0), Growth(2, 2.0), Growth(4, 1.0))
    factors = probed.effect("site") / plain.effect("site")
    assert factors.tolist() == pytest.approx([4.0, 4.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert factors[[2, 4]].tolist() == pytest.approx([4.0, 1.0]), "the geometric mean of what was probed"
    assert probed._fewer_steps[3] > plain._fewer_steps[3]
    assert frontier_with(recording).points == recording.frontier().points


def test_auto_computes_the_steps_whose_errors_grow(recording: dicompile.Recording) -> None:
    early, late = (
        next(p for p in frontier_with(recording, *growth).candidates() if p.level == "site" and len(p.full) == 4).full
        for growth in ([Growth(1, 100.0), Growth(3, 50.0)], [Growth(1, 0.01), Growth(3, 0.02)])
    )
    assert sum(early) < sum(late)


def test_what_was_probed_is_in_the_file_and_adds_up(recording: dicompile.Recording, tmp_path: Path) -> None:
    probed = dicompile.Recording(recording.facts, recording.traces, [Growth(2, 3.5)])
    probed.save(tmp_path / "r.safetensors")
    assert dicompile.Recording.load(tmp_path / "r.safetensors").growth == (Growth(2, 3.5),)
    assert (probed + probed).growth == (Growth(2, 3.5), Growth(2, 3.5))
    assert probed.of_runs([0]).growth == probed.growth
    recording.save(tmp_path / "plain.safetensors")
    assert dicompile.Recording.load(tmp_path / "plain.safetensors").growth == ()


@pytest.mark.parametrize(
    "growth",
    [
        *(torch.tensor([row], dtype=torch.float64) for row in (
            [2.0, -1.0], [2.0, math.inf], [float(STEPS), 1.0], [math.nan, 1.0], [math.inf, 1.0], [2.5, 1.0], [2.0],
        )),
        torch.ones(4, dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.complex64),
    ],
    ids=lambda growth: str(growth.tolist()),
)  # fmt: skip
def test_probes_that_cannot_be_are_refused(recording: dicompile.Recording, tmp_path: Path, growth: Tensor) -> None:
    file = tmp_path / "r.safetensors"
    trace = recording.traces[0]
    tensors = {f"gram/0/{trace.context}": trace.gram, f"reused/0/{trace.context}": trace.reused}
    save_tensors(file, tensors | {"growth": growth}, {"dicompile.recording": recording.facts.to_json()})
    with pytest.raises(InvalidRecording, match="is not a recording"):
        dicompile.Recording.load(file)


SEEDS = iter(range(100, 200))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda film: None, "none of its calls was at the last step"),
        (lambda film: film(STEPS, seed=next(SEEDS)), "before anything is changed, are not those of its first call"),
        (lambda film: (film(STEPS, seed=2), film(STEPS, seed=2)), "it samples more than once"),
    ],
)
def test_runs_that_are_not_one_and_the_same_are_refused(
    film: pipes.Sampler, recording: dicompile.Recording, run: Callable[[pipes.Sampler], object], why: str
) -> None:
    denoisers, probed = film.denoisers, dicompile.Recording(recording.facts, recording.traces)
    with pytest.raises(InvalidRecording, match=why) as raised:
        dicompile.probe(film.pipe, lambda: run(film), probed, probes=1, progress=False)
    assert "generator" in str(raised.value)
    assert (film.denoisers, probed.growth) == (denoisers, ())


def test_a_run_of_another_schedule_is_refused(film: pipes.Sampler, recording: dicompile.Recording) -> None:
    with pytest.raises(InvalidRecording, match=f"the run has 9 steps, the recording {STEPS}"):
        dicompile.probe(film.pipe, lambda: film(9, seed=2), recording, probes=1, progress=False)
    times = tuple(time + 1 for time in recording.facts.timesteps)
    other = dicompile.Recording(recording.facts.model_copy(update={"timesteps": times}), recording.traces)
    with pytest.raises(InvalidRecording, match="other timesteps than the recording"):
        dicompile.probe(film.pipe, lambda: film(STEPS, seed=2), other, probes=1, progress=False)


def test_a_step_that_changes_nothing_is_refused() -> None:
    sample = plain_dit(layers=2)
    model = dicompile.optimize(sample.model, "none", schedule=TIMES, backend="eager")

    def run() -> None:
        for time in TIMES:
            model(**sample.inputs | {"t": torch.full((4,), time)})

    with dicompile.calibrate(model) as recorded:
        run()
    with pytest.raises(InvalidRecording, match="at step 4 changes nothing"):
        dicompile.probe(model, run, recorded, probes=1, progress=False)


def test_numbers_of_probes_that_make_no_sense_are_refused(film: pipes.Sampler, recording: dicompile.Recording) -> None:
    assert probed_steps(50, 6) == (4, 12, 20, 28, 36, 44)
    assert probed_steps(4, 6) == (1,)
    for steps, probes, fix in ((STEPS, 0, "probes=6"), (3, 6, "more steps")):
        with pytest.raises(InvalidSetting, match="probes") as raised:
            probed_steps(steps, probes)
        assert fix in str(raised.value)
    with pytest.raises(InvalidRecording, match="nothing was recorded"):
        dicompile.probe(film.pipe, lambda: None, dicompile.Recording(recording.facts))
