"""Gates while sampling: a plain DiT decides as the rule written out does, and returns what that returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, InvalidSetting, PolicyDoesNotFit
from dicompile.plan import Cadence, Forecast, Gate, Policy, Reuse, Rule
from dicompile.runtime import gate as runtime_gate
from dicompile.runtime import invariants
from tests import models
from tests.models import PlainDiT, Sample, optimized, timesteps

STEPS, LAYERS = 10, 4
TIMES = timesteps(STEPS)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    return models.plain_dit(LAYERS)


def latents(seed: int = 0) -> list[Tensor]:
    """A trajectory that goes on slowly, then fast."""
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(4, 4, 16, 16, generator=generator) for _ in range(2))
    return [start + (end - start) * (step / STEPS) ** 2 for step in range(STEPS)]


def policy(
    gate: Gate, *, outside: tuple[int, int] = (1, 0), warmup: int = 1, order: int = 0, at: tuple[int, ...] = ()
) -> Policy:
    recall = Forecast(order=order, what="update", differences="divided") if order else Reuse(what="update")
    rules = (Rule(sites=("stack",), do=recall),)
    return Policy(name="gated", cadence=Cadence(warmup=warmup, at=at, gate=gate), outside=outside, rules=rules)


@dataclass
class Reference:
    """The rule written out on the model's own modules, one guidance context."""

    model: PlainDiT
    policy: Policy
    reference: Tensor | None = None
    total: float = 0.0
    run: int = 0
    recalled: list[bool] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    stored: list[tuple[int, Tensor]] = field(default_factory=list)
    anchors: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def call(self, step: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        gate, (first, last) = self.policy.gate, self.policy.outside
        assert gate is not None
        blocks = list(self.model.blocks)
        stop = len(blocks) - last
        h = start = self.model.tokens(x)
        c = self.model.condition(t, y)
        for block in blocks[:first]:
            h = block(h, c)
        shift, scale = blocks[0].modulation(c).chunk(6, dim=1)[:2]
        modulated = blocks[0].norm1(start) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        probe = {
            "modulated": modulated, "residual": h - start, "latent": x, "embedding": c,
            "modulation": blocks[0].modulation(c),
        }[gate.probe]  # fmt: skip
        full = step < self.policy.cadence.warmup or step >= STEPS - gate.last
        if self.policy.cadence.at:
            full = step in self.policy.cadence.at
        recalls = not full and self.recalls(gate, probe, (step + 1) / STEPS)
        if not full:
            self.recalled.append(recalls)
        if gate.reference == "previous" or not recalls:
            self.reference = probe
        if recalls:
            self.run += 1
            h = h + self.forecast(step)
        else:
            self.run, self.total, before = 0, 0.0, h
            for block in blocks[first:stop]:
                h = block(h, c)
            self.stored.insert(0, (step, h - before))
        for block in blocks[stop:]:
            h = block(h, c)
        output = self.model.picture(h, c, *x.shape[2:])
        if not recalls:
            self.anchors.insert(0, (probe, output))
        return output

    def recalls(self, gate: Gate, probe: Tensor, share: float) -> bool:
        if (gate.longest is not None and self.run >= gate.longest) or sum(self.recalled) >= (gate.most or 10**9):
            return False
        if self.run < gate.shortest:
            return True
        assert self.reference is not None
        size = self.reference.abs().mean()
        if gate.relative_to == "output":
            if len(self.anchors) < 2:
                return False
            (last, output), (before, output_before) = self.anchors[:2]
            rate = (output - output_before).abs().mean() / (last - before).abs().mean()
            size = output.abs().mean() / rate
        drift = float((probe - self.reference).abs().mean() / size)
        drift = sum(c * drift**power for power, c in enumerate(reversed(gate.rescale)))
        self.total = self.total + drift if gate.accumulates else drift
        self.drifts.append(self.total)
        start = gate.threshold if gate.resume is None or self.run else gate.resume
        return self.total < max(start * gate.decay**share, gate.floor)

    def forecast(self, step: int) -> Tensor:
        (latest, value), *older = self.stored
        if not getattr(self.policy.rules[0].do, "order", 0) or not older:
            return value
        before, older_value = older[0]
        return value + (value - older_value) * (step - latest) / (latest - before)


def expected(sample: Sample, chosen: Policy, seed: int = 0, labels: Tensor | None = None) -> tuple[list[Tensor], Any]:
    reference = Reference(sample.model, chosen)  # type: ignore[arg-type]
    y = sample.inputs["y"] if labels is None else labels
    with torch.no_grad():
        found = [
            reference.call(step, x, torch.full((4,), time), y)
            for step, (x, time) in enumerate(zip(latents(seed), TIMES, strict=True))
        ]
    return found, reference


def sampled(model: Any, sample: Sample, steps: Sequence[int] = range(STEPS), seed: int = 0) -> list[Tensor]:
    with torch.no_grad():
        return [model(latents(seed)[step], torch.full((4,), TIMES[step]), sample.inputs["y"]) for step in steps]


def recalls(model: Any) -> list[bool]:
    return [decision.recalls for decision in dicompile.report(model).decisions]


def drifts(model: Any) -> list[float]:
    return [d.drift for d in dicompile.report(model).decisions if d.drift is not None]


GATES = {
    "first block": policy(Gate(threshold=0.55)),
    "two blocks, one at the end": policy(Gate(threshold=0.5), outside=(2, 1)),
    "forecast": policy(Gate(threshold=0.6), warmup=2, order=1),
    "forecast as soon as two values are stored": policy(Gate(threshold=0.6), at=(0, 6), order=1),
    "at least two in a row": policy(Gate(threshold=0.3, shortest=2)),
    "a threshold that decays": policy(Gate(threshold=1.2, decay=0.3, floor=0.5)),
    "modulated": policy(
        Gate(probe="modulated", reference="previous", accumulates=True, threshold=0.4, last=1), outside=(0, 0)
    ),
    "rescaled": policy(
        Gate(probe="modulated", reference="previous", accumulates=True, threshold=1.0, rescale=(2.0, 1.5, 0.01)),
        outside=(0, 0),
    ),
    "from step to step": policy(Gate(reference="previous", threshold=0.4)),
    "at most two in a row": policy(Gate(threshold=0.9, longest=2, last=2)),
    "at most three": policy(Gate(threshold=0.9, most=3)),
    "hard to begin": policy(Gate(threshold=0.7, resume=0.39)),
    "modulation": policy(
        Gate(probe="modulation", reference="previous", accumulates=True, threshold=0.6), outside=(0, 0)
    ),
    "embedding": policy(Gate(probe="embedding", threshold=0.5), outside=(0, 0)),
    "the latent": policy(Gate(probe="latent", threshold=0.6), outside=(0, 0)),
    "by the output": policy(
        Gate(probe="latent", reference="previous", relative_to="output", threshold=0.3, accumulates=True),
        outside=(0, 0),
    ),
    "by the output, from the last full step": policy(
        Gate(probe="modulated", relative_to="output", threshold=0.3), outside=(0, 0), warmup=2, order=1
    ),
    "first block, by the output": policy(Gate(reference="previous", relative_to="output", threshold=0.25, last=2)),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.sampled
def test_it_decides_and_computes_as_the_rule_written_out(sample: Sample, name: str) -> None:
    chosen = GATES[name]
    outputs, reference = expected(sample, chosen)
    model = optimized(sample, chosen, STEPS)
    for _ in range(2):  # a second generation begins anew
        for ours, theirs in zip(sampled(model, sample), outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert recalls(model) == reference.recalled
        assert drifts(model) == pytest.approx(reference.drifts, rel=1e-3)
    assert 0 < sum(reference.recalled) < len(reference.recalled), "the test would say nothing"


def test_guidance_partners_decide_for_themselves(sample: Sample) -> None:
    chosen = policy(Gate(threshold=0.55))
    model = optimized(sample, chosen, STEPS)
    labels = {"cond": sample.inputs["y"], "uncond": torch.full((4,), 10)}
    found: dict[str, list[Tensor]] = {name: [] for name in labels}
    with torch.no_grad():
        for step in range(STEPS):
            for seed, (name, y) in enumerate(labels.items()):
                with dicompile.cache_context(name):
                    found[name].append(model(latents(seed)[step], torch.full((4,), TIMES[step]), y))
    both = []
    for seed, (name, y) in enumerate(labels.items()):
        outputs, reference = expected(sample, chosen, seed, y)
        both.append(reference.recalled)
        for ours, theirs in zip(found[name], outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert recalls(model) == [decision for pair in zip(*both, strict=True) for decision in pair]
    assert both[0] != both[1]


def test_a_partner_that_joins_late_computes_first(sample: Sample) -> None:
    model = optimized(sample, policy(Gate(threshold=9.0), warmup=2), STEPS)
    with torch.no_grad():
        for step in range(STEPS):
            for name in ("cond", "uncond")[: 1 + (step > 4)]:
                with dicompile.cache_context(name):
                    model(latents()[step], torch.full((4,), TIMES[step]), sample.inputs["y"])
    # two full steps of each, and then nothing but recalls
    assert dicompile.report(model).kinds == {"full": 4, "recalled": 8 + 3}


def test_a_run_that_begins_in_the_middle_is_planned_from_there(sample: Sample) -> None:
    model = optimized(sample, policy(Gate(threshold=9.0), warmup=2, order=1), STEPS)
    sampled(model, sample, range(4, STEPS))
    assert dicompile.report(model).kinds == {"full": 2, "recalled": 4}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a gate waits for the device."""
    found: list[int] = []
    real = runtime_gate.numbers_of

    def counted(values: Sequence[Tensor]) -> list[float]:
        found.append(1)
        return real(values)

    monkeypatch.setattr(runtime_gate, "numbers_of", counted)
    return found


def test_a_gate_waits_once_a_step_and_only_where_there_is_something_to_decide(sample: Sample, waits: list[int]) -> None:
    sampled(optimized(sample, policy(Gate(threshold=0.0), warmup=3), STEPS), sample)
    assert len(waits) == STEPS - 3
    waits.clear()
    sampled(optimized(sample, policy(Gate(threshold=9.0, longest=1)), STEPS), sample)
    assert len(waits) == 5  # of nine gated steps every second one is full since the one before has recalled
    waits.clear()
    sampled(optimized(sample, dicompile.FORA(3), STEPS), sample)
    assert not waits


def test_the_report_says_what_a_threshold_would_have_changed(sample: Sample) -> None:
    never = optimized(sample, policy(Gate(threshold=0.0)), STEPS)
    sampled(never, sample)
    least = min(drifts(never))
    assert f"never, a threshold above {least:.3g} would have" in str(dicompile.report(never))
    assert "was never applied" in str(dicompile.report(never))
    sooner = optimized(sample, policy(Gate(threshold=least * 1.01)), STEPS)
    sampled(sooner, sample)
    assert any(recalls(sooner))

    always = optimized(sample, policy(Gate(threshold=9.0)), STEPS)
    sampled(always, sample)
    most = max(drifts(always))
    assert f"always, one of {most:.3g} would not have" in str(dicompile.report(always))
    assert "the gate recalled at 9 of 9 steps, drift " in str(dicompile.report(always))
    later = optimized(sample, policy(Gate(threshold=most * 0.99)), STEPS)
    sampled(later, sample)
    assert not all(recalls(later))
    ahead = optimized(sample, dicompile.FORA(3), STEPS)
    sampled(ahead, sample)
    assert "gate" not in str(dicompile.report(ahead))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_narrow_cache_changes_no_decision(sample: Sample, dtype: str) -> None:
    exact, narrow = (
        optimized(sample, policy(Gate(threshold=0.55)), STEPS, **more) for more in ({}, {"cache_dtype": dtype})
    )
    sampled(exact, sample), sampled(narrow, sample)
    assert drifts(narrow) == drifts(exact)
    assert recalls(narrow) == recalls(exact)


def test_without_room_for_the_probe_everything_is_computed(sample: Sample) -> None:
    chosen = policy(Gate(threshold=9.0))
    free = optimized(sample, chosen, STEPS)
    sampled(free, sample)
    wanted = dicompile.plan_of(free).cache_bytes
    assert wanted == 2 * 4 * 64 * 32 * 4  # the probe, and what the other blocks add
    model = optimized(sample, chosen, STEPS, max_cache_bytes=wanted - 1, over_budget="degrade")
    sampled(model, sample)
    plan = dicompile.plan_of(model)
    assert {step.kind for step in plan.steps} == {"full"}
    assert plan.gate is None
    assert dicompile.report(model).kinds == {"full": STEPS}
    fits = optimized(sample, chosen, STEPS, max_cache_bytes=wanted)
    sampled(fits, sample)
    assert dicompile.report(fits).peak_cache_bytes == wanted


def test_branches_may_be_recalled_one_by_one(sample: Sample) -> None:
    chosen = Policy(
        name="branches", cadence=Cadence(gate=Gate(threshold=0.55)), outside=(1, 0), rules=(Rule(do=Reuse()),)
    )  # fmt: skip
    model = optimized(sample, chosen, STEPS)
    sampled(model, sample)
    _, reference = expected(sample, policy(Gate(threshold=0.55)))
    assert recalls(model) == reference.recalled
    recalled = next(step for step in dicompile.plan_of(model).steps if step.full is not None)
    assert [action.action.symbol for action in recalled.sites[: 2 * LAYERS]] == ["F", "F", *"." * 6]


@pytest.mark.parametrize("name", ["first block", "modulated", "modulation", "by the output"])
@pytest.mark.sampled
def test_a_step_with_another_timestep_than_was_foretold_is_decided_anew(
    sample: Sample, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "_is_waited_for", lambda tensor: True)  # as if the CPU were an accelerator
    off_by, kept, found = {2: 0.3, 5: -0.3}, [], []
    for hoist in ("off", "all"):
        model = optimized(sample, GATES[name], STEPS, hoist=hoist)
        with torch.no_grad():
            for step, (x, time) in enumerate(zip(latents(), TIMES, strict=True)):
                found.append(model(x, torch.full((4,), time + off_by.get(step, 0.0)), sample.inputs["y"]))
                kept += [table.wrong for table in models.state_of(model).tables.values()]
        found.append(torch.tensor(drifts(model)))
    for ours, theirs in zip(found[: STEPS + 1], found[STEPS + 1 :], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert max(kept) == 2, "both were noticed after the step had begun"


REFUSED = {
    "compile_mode": ({"mode": "inductor", "compile_mode": "reduce-overhead"}, "cannot stop in the middle"),
    "cache_device": ({"cache_device": "cpu"}, "would be in host memory when it decides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_decide_in_the_middle_is_refused(sample: Sample, name: str) -> None:
    options, why = REFUSED[name]
    with pytest.raises(InvalidSetting, match=f"policy 'gated' has a gate, which does not go with {name}") as caught:
        sampled(optimized(sample, policy(Gate(threshold=0.3)), STEPS, **options), sample)
    assert why in str(caught.value)
    assert "dicompile.FORA" in str(caught.value)


def test_more_blocks_than_the_model_has_are_refused(sample: Sample) -> None:
    with pytest.raises(PolicyDoesNotFit, match=r"runs 4 blocks at every step, the model has 4"):
        sampled(optimized(sample, policy(Gate(threshold=0.3), outside=(3, 1)), STEPS), sample)


def test_a_gate_with_nothing_to_watch_is_refused(sample: Sample) -> None:
    with pytest.raises(PolicyDoesNotFit, match=r"has nothing for it to watch") as caught:
        sampled(optimized(sample, policy(Gate(threshold=0.3), outside=(0, 1)), STEPS), sample)
    assert "there are no blocks before the stack" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rule(do=Reuse(), cadence=Cadence(interval=2)), "has a cadence of its own"),
        (Rule(do=Reuse(), when="odd"), "holds at odd steps only"),
        (Rule(do=dicompile.Refresh(ratio=0.1)), "does 'refresh'"),
        (Rule(do=dicompile.Fitted(weights=((), (1.0,)))), "does 'fitted'"),
    ],
)
def test_rules_that_have_to_be_known_ahead_are_refused(rule: Rule, why: str) -> None:
    with pytest.raises(InvalidPolicy, match=f"has a gate, but one of its rules {why}"):
        Policy(name="x", cadence=Cadence(gate=Gate(threshold=0.1)), rules=(rule,))


def test_settings_of_one_policy_share_what_is_watched() -> None:
    other = dicompile.Elsewhere(policy=policy(Gate(threshold=0.1)))
    with pytest.raises(InvalidPolicy, match="has a setting 'gated' with another probe or other blocks outside"):
        Policy(name="x", elsewhere=(other,))
    assert Policy(name="x", outside=(1, 0), cadence=Cadence(gate=Gate(threshold=0.2)), elsewhere=(other,))


def test_a_policy_with_a_gate_goes_to_text_and_back() -> None:
    for chosen in (dicompile.TeaCache(), dicompile.DBCache(order=1, longest=3), dicompile.FirstBlockCache()):
        assert Policy.from_yaml(chosen.to_yaml()) == chosen
        assert Policy.from_json(chosen.to_json()) == chosen
