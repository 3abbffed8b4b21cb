"""MeanCache beside its rule written out, in a loop with Euler's method: equal trajectories, and the published steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Cadence, Policy, Rule, TimestepSchedule, Velocity, make_plan, unrolled_weights
from dicompile.policies.meancache import SCHEDULES
from tests import models
from tests.models import Sample
from tests.plan.toys import toy

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 50
Model = Callable[[Tensor, float], Tensor]

PUBLISHED = {
    ("qwen-image-2512", 10): (
        [0, 2, 4, 7, 14, 21, 28, 35, 42, 49],
        ["mean", "jvp1_s3", "mean", "mean", "mean", "mean", "mean", "mean", "jvp1_s4"],
    ),
    ("z-image", 20): (
        [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49],
        [*["chain"] * 4, *["jvp1_s2"] * 5, "jvp1_s5", "jvp1_s4", "jvp1_s5", "jvp1_s5", *["mean"] * 3, "jvp1_s5",
         "jvp1_s2", "chain"],
    ),
}  # fmt: skip
"""Steps that compute, and the rule for the steps in between, as the code of the authors has them."""


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500.0), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(models.PlainDiT(1, width=16, size=8)), inputs)


def levels() -> list[float]:
    """Noise levels as flow matching shifts them, 0 after the last."""
    even = np.linspace(1, 1 / STEPS, STEPS)
    return [*(float(3 * s / (1 + 2 * s)) for s in even), 0.0]


def caller(model: torch.nn.Module, sample: Sample) -> Model:
    """A model as a velocity of latent and noise level."""

    def call(x: Tensor, level: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(x, torch.full((2,), 1000 * level), sample.inputs["y"])
        return found

    return call


def noise(sample: Sample) -> Tensor:
    return torch.randn(sample.inputs["x"].shape, generator=torch.Generator().manual_seed(3))


def euler(model: Model, x: Tensor, begin: int = 0) -> list[Tensor]:
    """Latents of a run."""
    latents = [x]
    for level, following in itertools.pairwise(levels()[begin:]):
        latents.append(latents[-1] + (following - level) * model(latents[-1], level))
    return latents


def reference(model: Model, x: Tensor, full: list[int], rules: list[str]) -> list[Tensor]:
    """Latents of a run with the rule as published: average velocities come from the latents themselves."""
    order = dict.fromkeys(range(STEPS), 0)
    for start, end, rule in zip(full, full[1:], rules, strict=False):
        for step in range(start + 1, end):
            order[step] = {"chain": 0, "mean": 1}.get(rule) or int(rule[-1])
    sigmas, latents, velocities = levels(), [x], list[Tensor]()
    for step in range(STEPS):
        if step in full:
            velocities.append(model(latents[-1], sigmas[step]))
        else:
            first = step - min(order[step], step)
            length = sigmas[step] - sigmas[first]
            average = (latents[step] - latents[first]) / length
            change = (velocities[first] - average) / length
            velocities.append(velocities[-1] - change * (sigmas[step + 1] - sigmas[step]))
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * velocities[-1])
    return latents


@pytest.mark.parametrize(("model", "budget"), PUBLISHED)
def test_a_run_is_that_of_the_published_rule(sample: Sample, model: str, budget: int) -> None:
    policy = dicompile.MeanCache(model, budget)
    ours = dicompile.optimize(sample.model, policy, schedule=[1000 * level for level in levels()[:-1]], mode="eager")
    found = euler(caller(ours, sample), noise(sample))
    expected = reference(caller(sample.model, sample), noise(sample), *PUBLISHED[model, budget])
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, step=step: f"{step}: {text}")
    calls = dicompile.report(ours).calls
    assert [call.step for call in calls if call.kind == "full"] == PUBLISHED[model, budget][0]
    full, rules = PUBLISHED[model, budget]
    reused = reference(caller(sample.model, sample), noise(sample), full, ["mean"] * len(rules))
    assert not torch.allclose(found[-1], reused[-1], rtol=1e-3, atol=1e-3), "the test would say nothing"


@pytest.mark.parametrize(("model", "schedule"), [(name, each) for name, own in SCHEDULES.items() for each in own])
def test_every_gap_of_a_published_schedule_has_a_rule(model: str, schedule: tuple[tuple[int, ...], ...]) -> None:
    full, back = schedule
    gaps = [(start, end) for start, end in itertools.pairwise(full) if end > start + 1]
    assert len(gaps) == len(back)
    assert (full[0], full[-1]) == (0, STEPS - 1)
    policy = dicompile.MeanCache(model, len(full))
    assert policy.cadence.at == full
    recall = policy.rules[0].do
    assert isinstance(recall, Velocity)
    assert len(recall.back) == STEPS
    assert [set(recall.back[start + 1 : end]) for start, end in gaps] == [{far} for far in back]


def test_a_velocity_that_is_linear_in_the_noise_level_is_met_by_no_average_but_nearly() -> None:
    """Over one step the average is the velocity at its start; over two, half of the change is foreseen."""
    velocity = Velocity(back=(1, 1, 2, 2))
    weights = velocity.fitted([0, 1], 2, (40.0, 30.0, 20.0, 10.0)).weights[2]
    assert weights == pytest.approx((1.25, -0.25))
    reused = Velocity(back=(1,) * 4).fitted([0, 1], 3, (40.0, 30.0, 20.0, 10.0)).weights
    assert reused[2:] == ((1.0, 0.0), (1.0, 0.0))


def test_a_run_that_begins_later_looks_no_further_back_than_its_first_step(sample: Sample) -> None:
    schedule = TimestepSchedule.of([1000 * level for level in levels()[:-1]])
    begin = 12
    recall = dicompile.MeanCache("z-image", 20).rules[0].do
    assert isinstance(recall, Velocity)
    assert recall.back[13] == 2
    rest = schedule.rest(begin)
    assert recall.fitted([begin], begin + 1, rest.timesteps, begin).weights[-1] == pytest.approx((1.0,))
    later = recall.fitted([14, begin], 15, rest.timesteps, begin).weights[-1]
    assert len(later) == 2
    assert sum(later) == pytest.approx(1.0)


def test_forecasts_of_forecasts_are_sums_of_what_was_computed() -> None:
    rows = [(), (2.0,), (0.5, 3.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0)]
    assert unrolled_weights(rows, {0, 2}) == ((), (2.0,), (), (1.0, 0.0), (2.0, 3.0))


def policy(back: int = 4) -> Policy:
    return Policy(name="mine", cadence=Cadence(at=(0, 2)), rules=(Rule(do=Velocity(back=(1,) * back, what="core")),))


@pytest.mark.parametrize(
    ("back", "schedule", "said"),
    [
        (4, 4, "weighs velocities by the timesteps in between, and no timesteps are known"),
        (4, [900.0, 600.0, 600.0, 300.0], "two that follow each other are equal"),
        (5, [900.0, 600.0, 500.0, 300.0], "says for 5 steps how far to look back, the schedule has 4"),
    ],
)
def test_samplers_for_which_it_does_not_hold_are_refused(back: int, schedule: object, said: str) -> None:
    with pytest.raises(PolicyDoesNotFit, match=said):
        make_plan(toy([["self-attention", "mlp"]]), policy(back), TimestepSchedule.of(schedule))


@pytest.mark.parametrize(("model", "budget"), [("qwen-image", 20), ("flux", 17)])
def test_schedules_that_nobody_published_are_refused(model: str, budget: int) -> None:
    with pytest.raises(InvalidPolicy, match=f"no schedule of {budget} steps is known for '{model}'") as caught:
        dicompile.MeanCache(model, budget)
    assert "z-image: 25, 20, 17, 15, 13" in str(caught.value)
