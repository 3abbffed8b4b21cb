"""EasyCache beside its rule written out: equal decisions, equal outputs, and nothing of the model runs in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Cadence, Forecast, Gate, Policy, Reuse, Rule
from tests import models
from tests.models import Sample, optimized, timesteps
from tests.policies.trajectories import slowing

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 16
TIMES = timesteps(STEPS)
Call = Callable[[Tensor, float], Tensor]


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    return models.plain_dit(2)


@pytest.fixture(scope="module")
def model(sample: Sample) -> Any:
    """One for several tests, each of which has a session of its own."""
    return optimized(sample, dicompile.EasyCache(0.2, 3), STEPS)


def latents(sample: Sample, seed: int = 1) -> list[Tensor]:
    """A trajectory that goes on fast, then slowly; another one the other way round."""
    way = slowing(sample.inputs["x"], STEPS, seed)
    return way if seed == 1 else way[::-1]


def caller(model: torch.nn.Module, sample: Sample, text: int = 0) -> Call:
    """A model as a function of latent and time; partners have other labels."""
    labels = torch.full((4,), 10) if text else sample.inputs["y"]

    def call(x: Tensor, time: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(x, torch.full((4,), time), labels)
        return found

    return call


@dataclass
class Reference:
    """One guidance context, as section 3 of the paper and its code have it."""

    model: Call
    threshold: float
    warmup: int
    leader: Reference | None = None
    computed: list[bool] = field(default_factory=list)
    error: float = 0.0
    rate: Tensor | None = None
    before: Tensor | None = None
    full: tuple[Tensor, Tensor] | None = None

    def decides(self, x: Tensor) -> bool:
        step = len(self.computed)
        if step < self.warmup or step == STEPS - 1 or self.rate is None:
            return True
        assert self.before is not None and self.full is not None
        moved, size = (x - self.before).abs().mean(), self.full[1].abs().mean()
        self.error += float(self.rate * moved / size)
        return self.error >= self.threshold

    def call(self, x: Tensor, time: float) -> Tensor:
        computes = self.leader.computed[len(self.computed)] if self.leader else self.decides(x)
        self.computed.append(computes)
        self.before = x
        if not computes:
            assert self.full is not None
            return x + (self.full[1] - self.full[0])
        output = self.model(x, time)
        if self.full is not None:
            self.rate = (output - self.full[1]).abs().mean() / (x - self.full[0]).abs().mean()
        self.full, self.error = (x, output), 0.0
        return output


def computed(model: torch.nn.Module) -> list[bool]:
    return [call.kind != "recalled" for call in dicompile.report(model).calls]


@pytest.mark.parametrize(("threshold", "warmup"), [(0.1, 5), (0.3, 3), (0.3, 2)])
def test_it_decides_and_computes_as_published(sample: Sample, threshold: float, warmup: int) -> None:
    rule = Reference(caller(sample.model, sample), threshold, warmup)
    model = optimized(sample, dicompile.EasyCache(threshold, warmup), STEPS)
    ours = caller(model, sample)
    for x, time in zip(latents(sample), TIMES, strict=True):
        torch.testing.assert_close(ours(x, time), rule.call(x, time), rtol=1e-4, atol=1e-5)
    assert computed(model) == rule.computed
    assert warmup < sum(rule.computed) < STEPS - 2, "the test would say nothing"


def test_guidance_partners_follow_the_first(model: Any, sample: Sample) -> None:
    first = Reference(caller(sample.model, sample, 0), 0.2, 3)
    rules = [first, Reference(caller(sample.model, sample, 1), 0.2, 3, first)]
    own = Reference(caller(sample.model, sample, 1), 0.2, 3)
    for *given, time in zip(latents(sample), latents(sample, 2), TIMES, strict=True):
        for text, name in enumerate(("cond", "uncond")):
            with dicompile.cache_context(name):
                found = caller(model, sample, text)(given[text], time)
            torch.testing.assert_close(found, rules[text].call(given[text], time), rtol=1e-4, atol=1e-5)
        own.call(given[1], time)
    assert computed(model)[0::2] == computed(model)[1::2] == first.computed
    assert own.computed != first.computed, "the test would say nothing"


def test_a_partner_that_joins_late_computes_until_it_has_what_it_needs(sample: Sample) -> None:
    model = optimized(sample, dicompile.EasyCache(9.0, 3), STEPS)
    kinds: dict[str, list[str]] = {"cond": [], "uncond": []}
    for step, (x, time) in enumerate(zip(latents(sample), TIMES, strict=True)):
        for text, name in enumerate(("cond", "uncond")[: 1 + (step > 6)]):
            with dicompile.cache_context(name):
                caller(model, sample, text)(x, time)
            kinds[name].append(dicompile.report(model).calls[-1].kind)
    assert kinds["cond"] == ["full"] * 3 + ["recalled"] * 12 + ["full"]
    assert kinds["uncond"] == ["full"] * 3 + ["recalled"] * 5 + ["full"]


def test_with_one_full_step_there_is_no_rate_yet(sample: Sample) -> None:
    model = optimized(sample, dicompile.EasyCache(9.0, 1), STEPS)
    for x, time in zip(latents(sample), TIMES, strict=True):
        caller(model, sample)(x, time)
    assert computed(model) == [True] * 2 + [False] * 13 + [True]
    assert [d.drift is None for d in dicompile.report(model).decisions] == [True] + [False] * 13


def test_a_latent_that_stands_still_tells_no_rate(sample: Sample) -> None:
    model = optimized(sample, dicompile.EasyCache(9.0, 2), STEPS)
    for x, time in zip([latents(sample)[0]] * 4 + latents(sample)[4:], TIMES, strict=True):
        caller(model, sample)(x, time)
    # The second full step is at the first one's latent: nothing over nothing, so the third is full, and the fourth;
    # the fifth's latent has moved, and tells a rate.
    assert computed(model)[:7] == [True] * 5 + [False] * 2


@pytest.mark.parametrize("written", ["latent", "output"])
def test_what_is_written_to_in_place_is_remembered_as_it_was(model: Any, sample: Sample, written: str) -> None:
    found, place = dict[bool, list[Tensor]](), torch.empty_like(sample.inputs["x"])
    kinds = {}
    for is_written in (False, True):
        with dicompile.session():
            found[is_written] = []
            for x, time in zip(latents(sample), TIMES, strict=True):
                is_place = is_written and written == "latent"
                value = caller(model, sample)(place.copy_(x) if is_place else x, time)
                found[is_written].append(value.clone())
                if is_written and written == "output":
                    value.zero_()
            kinds[is_written] = computed(model)
    assert kinds[True] == kinds[False]
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_plan_says_that_nothing_runs(model: Any, sample: Sample) -> None:
    for x, time in zip(latents(sample), TIMES, strict=True):
        caller(model, sample)(x, time)
    plan = dicompile.plan_of(model)
    recalled = plan.steps[4]
    assert recalled.flops == 0
    assert " ".join(plan.grid().splitlines()[4].split()) == "4 749.00 gated 0.0% -- -- | F."
    assert plan.cache_bytes == dicompile.report(model).peak_cache_bytes == 4 * 4 * 4 * 16 * 16 * 4, "four latents"
    narrow = optimized(sample, dicompile.EasyCache(0.2, 3), STEPS, cache_dtype="float8_e4m3fn")
    for x, time in zip(latents(sample), TIMES, strict=True):
        caller(narrow, sample)(x, time)
    assert dicompile.plan_of(narrow).cache_bytes == plan.cache_bytes, "what a model adds is small, and stays exact"
    assert dicompile.report(narrow).decisions == dicompile.report(model).decisions


def test_the_whole_model_is_a_site_for_policies_that_are_planned_ahead(sample: Sample) -> None:
    full = (0, 1, 5, 9, 13)
    policy = Policy(
        name="output", cadence=Cadence(at=full), rules=(Rule(sites=("model",), do=Forecast(order=1, what="stream")),)
    )
    model, stored = optimized(sample, policy, STEPS), list[tuple[int, Tensor]]()
    for step, (x, time) in enumerate(zip(latents(sample), TIMES, strict=True)):
        found = caller(model, sample)(x, time)
        if step in full:
            expected = caller(sample.model, sample)(x, time)
            stored.append((step, expected))
        else:
            (before, old), (last, new) = stored[-2:]
            expected = new + (new - old) * (step - last) / (last - before)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(PolicyDoesNotFit, match=r"which this model's output does not allow") as caught:
        optimized(models.pixart(), dicompile.EasyCache(), STEPS)(**models.pixart().inputs)
    assert "not one tensor with the latent's shape and dtype" in str(caught.value)


def test_blocks_that_run_at_every_step_do_not_go_with_it() -> None:
    with pytest.raises(InvalidPolicy, match="has blocks that run at every step, and a rule for the whole model"):
        Policy(
            name="x",
            cadence=Cadence(gate=Gate(threshold=0.1)),
            outside=(1, 0),
            rules=(Rule(sites=("model",), do=Reuse(what="update")),),
        )


def test_it_goes_to_text_and_back() -> None:
    assert Policy.from_yaml(dicompile.EasyCache().to_yaml()) == dicompile.EasyCache()
