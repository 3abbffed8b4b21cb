"""SpeCa beside the authors' code for DiT, its scheduler and verification written out on a plain DiT's modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule, TimestepSchedule, make_plan
from dicompile.runtime import invariants
from dicompile.runtime.gate import Drift
from tests import models
from tests.models import PlainDiT, Sample, optimized, timesteps
from tests.plan.toys import toy
from tests.policies.trajectories import slowing

pytestmark = pytest.mark.usefixtures("own_session")

STEPS, LAYERS = 24, 3
TIMES = timesteps(STEPS)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(PlainDiT(LAYERS, width=16, size=8)), inputs)


def latents(sample: Sample, seed: int = 1) -> list[Tensor]:
    return slowing(sample.inputs["x"], STEPS, seed)


def factorial(k: int) -> int:
    return 1 if k < 2 else k * factorial(k - 1)


@dataclass
class Reference:
    """One run of `cal_type`, `derivative_approximation` and `DiTBlock.forward` of the authors' code for DiT."""

    model: PlainDiT
    threshold: float
    decay: float
    shortest: int
    longest: int
    order: int
    full: list[bool] = field(default_factory=list)
    compared: list[float] = field(default_factory=list)
    last: str = "none"
    count: int = 0
    checks: bool = False
    error: float | None = 0.0
    latest: int = 0
    factors: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)

    def decide(self, step: int) -> str:
        if self.last == "full":
            self.count, self.checks, self.error = 1, False, None
            return "taylor"
        threshold = max(self.threshold * self.decay ** ((step + 1) / STEPS), 0.01)
        self.checks = self.count >= self.shortest
        if self.checks and self.error is not None and step >= 3 and self.count < self.longest:
            self.compared.append(self.error)
        too_large = self.error is not None and self.error > threshold
        if step < 3 or self.count >= self.longest or (too_large and self.checks):
            self.count = 0
            return "full"
        self.count += 1
        return "taylor"

    def store(self, key: tuple[int, str], value: Tensor, step: int) -> Tensor:
        """New factors: backward differences over the steps since the last full one."""
        old, new = self.factors.get(key, []), [value]
        for lower in old[: self.order]:
            new.append((new[-1] - lower) / (step - self.latest))
        self.factors[key] = new
        return value

    def forecast(self, key: tuple[int, str], step: int) -> Tensor:
        away = step - self.latest
        return sum(factor * away**k / factorial(k) for k, factor in enumerate(self.factors[key]))  # type: ignore[return-value]

    def call(self, step: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.last = kind = self.decide(step)
        self.full.append(kind == "full")
        h, c = self.model.tokens(x), self.model.condition(t, y)
        for number, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = (v.unsqueeze(1) for v in block.modulation(c).chunk(6, dim=1))

            def attend(h: Tensor, block: Any = block, shift: Tensor = shift1, scale: Tensor = scale1) -> Tensor:
                return block.attend(block.norm1(h) * (1 + scale) + shift)

            def think(h: Tensor, block: Any = block, shift: Tensor = shift2, scale: Tensor = scale2) -> Tensor:
                return block.mlp(block.norm2(h) * (1 + scale) + shift)

            before, keys = h, ((number, "attention"), (number, "mlp"))
            if kind == "full":
                h = h + gate1 * self.store(keys[0], attend(h), step)
                h = h + gate2 * self.store(keys[1], think(h), step)
                continue
            h = h + gate1 * self.forecast(keys[0], step)
            h = h + gate2 * self.forecast(keys[1], step)
            if self.checks and number == LAYERS - 1:
                exact = before + gate1 * attend(before)
                exact = exact + gate2 * think(exact)
                self.error = float(((h - exact).abs() / (exact.abs() + 1e-10)).mean())
        if kind == "full":
            self.latest = step
        return self.model.picture(h, c, *x.shape[2:])


def run(model: Any, sample: Sample, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(x, torch.full((2,), time), sample.inputs["y"])
            for x, time in zip(latents(sample, seed), TIMES, strict=True)
        ]


def expected(sample: Sample, options: dict[str, Any]) -> tuple[list[Tensor], Reference]:
    reference = Reference(sample.model, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        found = [
            reference.call(step, x, torch.full((2,), time), sample.inputs["y"])
            for step, (x, time) in enumerate(zip(latents(sample), TIMES, strict=True))
        ]
    return found, reference


CASES = {
    "as published": {"threshold": 0.04, "decay": 0.3, "shortest": 2, "longest": 5, "order": 4},
    "verified from the second on": {"threshold": 0.03, "decay": 0.6, "shortest": 1, "longest": 8, "order": 1},
    "as long as it is near": {"threshold": 0.2, "decay": 0.05, "shortest": 1, "longest": 30, "order": 2},
}


@pytest.mark.parametrize(("name", "hoist"), list(zip(CASES, ("all", "off", "off"), strict=True)))
def test_it_decides_and_computes_as_the_authors_code(sample: Sample, name: str, hoist: str) -> None:
    outputs, reference = expected(sample, CASES[name])
    model = optimized(sample, dicompile.SpeCa(**CASES[name]), STEPS, hoist=hoist)
    for _ in range(2):  # a second generation begins anew
        for ours, theirs in zip(run(model, sample), outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        report = dicompile.report(model)
        assert [call.kind != "recalled" for call in report.calls] == reference.full
        assert drifts(model) == pytest.approx(reference.compared, rel=1e-2)
    rejected = [number for number, decision in enumerate(report.decisions) if decision.drift and not decision.recalls]
    assert 0 < len(rejected) < len(reference.compared), "the test would say nothing"


def drifts(model: Any) -> list[float]:
    return [found.drift for found in dicompile.report(model).decisions if found.drift is not None]


def test_guidance_partners_have_errors_of_their_own(sample: Sample) -> None:
    model, found = optimized(sample, dicompile.SpeCa(**CASES["as published"]), STEPS), dict[str, list[bool]]()
    with torch.no_grad():
        for *given, time in zip(latents(sample), latents(sample, 2), TIMES, strict=True):
            for x, name in zip(given, ("cond", "uncond"), strict=True):
                with dicompile.cache_context(name):
                    model(x, torch.full((2,), time), sample.inputs["y"])
                found.setdefault(name, []).append(dicompile.report(model).calls[-1].kind != "recalled")
    assert found["cond"] == expected(sample, CASES["as published"])[1].full
    assert found["uncond"] != found["cond"]


def test_a_step_with_another_timestep_than_was_foretold_is_verified_anew(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "_is_waited_for", lambda tensor: True)  # as if the CPU were an accelerator
    off_by, found = {4: 0.3, 6: -0.3, 11: 0.2}, dict[str, tuple[list[Tensor], list[float]]]()
    for hoist in ("off", "all"):
        model, outputs = optimized(sample, dicompile.SpeCa(**CASES["as published"]), STEPS, hoist=hoist), list[Tensor]()
        with torch.no_grad():
            for step, (x, time) in enumerate(zip(latents(sample), TIMES, strict=True)):
                outputs.append(model(x, torch.full((2,), time + off_by.get(step, 0.0)), sample.inputs["y"]))
        found[hoist] = outputs, drifts(model)
    assert found["all"][1] == pytest.approx(found["off"][1], rel=1e-2)
    for ours, theirs in zip(found["all"][0], found["off"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_only_what_decides_is_verified(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[int] = []
    real = Drift.verify

    def counted(self: Drift, *streams: Tensor) -> None:
        verified.append(1)
        real(self, *streams)

    monkeypatch.setattr(Drift, "verify", counted)
    model = optimized(sample, dicompile.SpeCa(threshold=9.0, shortest=2, longest=4), STEPS)
    run(model, sample)
    recalled = [call.kind == "recalled" for call in dicompile.report(model).calls]
    assert recalled == [False, True, False, *([True] * 4 + [False]) * 4, True]
    assert len(verified) == len(drifts(model)) == 4, "the third of four, for the fourth"


def test_the_plan_counts_what_is_verified(sample: Sample) -> None:
    structure = models.structure(sample)
    schedule = TimestepSchedule.of(TIMES)
    plan = make_plan(structure, dicompile.SpeCa(threshold=1.0, shortest=2, longest=4), schedule)
    last = structure.last
    assert last is not None
    assert last.block == LAYERS - 1
    block = sum(structure.sites[i].flops for i in last.inside)
    gated = [step for step in plan.steps if step.full is not None]
    assert [step.check[0] for step in gated] == [block] * (STEPS - 2)
    extra = [step.flops - planned.flops for step, planned in zip(plan.at_best, plan.steps, strict=True)]
    assert [step for step, flops in enumerate(extra) if flops == block] == [5, 10, 15, 20]
    assert "gated steps do this where the last forecast was near enough" in str(plan)


def test_values_that_are_not_stored_yet_are_not_counted(sample: Sample) -> None:
    plan = make_plan(models.structure(sample), dicompile.SpeCa(order=4), TimestepSchedule.of(TIMES))
    sites, size = 2 * LAYERS, sample.inputs["x"].shape[0] * 16 * 16 * 4
    assert [plan.held(step) for step in range(6)] == [sites * size * count for count in (1, 2, 3, 4, 5, 5)]


def test_a_narrow_cache_has_the_same_weights(sample: Sample) -> None:
    model = optimized(sample, dicompile.SpeCa(**CASES["as published"]), STEPS, cache_dtype="float8_e4m3fn")
    outputs = run(model, sample)
    assert all(output.isfinite().all() for output in outputs)
    assert dicompile.report(model).kinds["recalled"] > STEPS / 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shortest": 0}, "has no step that is compared before it decides"),
        ({"shortest": 1, "relative_to": "output"}, "compares with something else than what is recalled"),
        ({"shortest": 1, "reference": "previous"}, "compares with something else than what is recalled"),
        ({"shortest": 1, "partners": "first"}, "has guidance partners follow one that recalls something else"),
        ({"shortest": 1, "resume": 0.1}, "never decides right after a full step"),
        ({"shortest": 1, "depth": 1}, "watches the forecast through 1 blocks"),
    ],
)
def test_gates_that_cannot_verify_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidPolicy, match=why):
        Gate(probe="forecast", threshold=0.1, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rules": (Rule(sites=("stack",), do=Reuse(what="update")),)}, "nothing enters the last block"),
        ({"rules": (Rule(do=Reuse()),), "outside": (0, 1)}, "the last block, which it verifies, runs at every step"),
    ],
)
def test_policies_that_leave_nothing_to_verify_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidPolicy, match=why):
        Policy(name="x", cadence=Cadence(gate=Gate(probe="forecast", shortest=1, threshold=0.1)), **options)


def test_a_model_with_no_stream_to_verify_is_refused() -> None:
    with pytest.raises(PolicyDoesNotFit, match="verifies the stream behind the last block"):
        make_plan(toy([["self-attention", "mlp"]]), dicompile.SpeCa(), TimestepSchedule.of(4))
