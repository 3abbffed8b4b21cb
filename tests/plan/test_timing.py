"""Measured times: kinds of step, the line through them, plans and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dicompile.errors import InvalidTiming
from dicompile.plan import (
    FULL,
    MOST_STORED,
    TURN,
    Cadence,
    Forecast,
    Plan,
    Policy,
    Rule,
    TimedKind,
    TimestepSchedule,
    Timing,
    TimingFacts,
    make_plan,
    timing_plan,
)
from dicompile.plan.plan import ROOFLINE
from dicompile.plan.timing import Line, kind_of
from dicompile.policies import FORA, NoCache, SpeCa, ToCa
from tests.plan.toys import toy

TOY = toy([["self-attention", "mlp"]] * 3, spans=True)
SECONDS = {"full": 1.0, "site-1": 0.1, "site-2": 0.15, "site-3": 0.2, "stack-1": 0.01, "stack-2": 0.02, "stack-3": 0.03}
FACTS = TimingFacts(
    model="Toy", sites=tuple(site.label for site in TOY.sites), spans=("2.stack",), latent=(2, 4, 8, 8),
    dtype="float32", device="a machine", code="inductor",
)  # fmt: skip


def kind(name: str, flops: int, size: int, *seconds: float) -> TimedKind:
    return TimedKind(name=name, flops=flops, bytes=size, seconds=seconds)


def timing() -> Timing:
    steps = {step.kind: step for step in timing_plan(TOY, TimestepSchedule(TURN)).steps}
    return Timing(FACTS, [kind(name, steps[name].flops, steps[name].bytes, SECONDS[name]) for name in SECONDS])


def planned(policy: Policy, steps: int = 9) -> Plan:
    return make_plan(TOY, policy, TimestepSchedule(steps))


@pytest.mark.parametrize("spans", [True, False])
def test_steps_of_every_kind_come_in_turns_and_are_known_by_what_they_do(spans: bool) -> None:
    plan = timing_plan(toy([["self-attention", "mlp"]] * 2, spans=spans), TimestepSchedule(2 * TURN))
    kinds = [step.kind for step in plan.steps]
    assert set(kinds) == {name for name in SECONDS if spans or not name.startswith("stack")}
    assert set(kinds[:TURN]) == set(kinds[TURN:])
    assert [kind_of(plan, step) for step in plan.steps] == kinds
    assert max(len(site.action.weights) for step in plan.steps for site in step.sites) == MOST_STORED + 1
    assert kinds[0] == FULL, "whenever a context joins, nothing is stored yet"


def test_a_full_step_of_a_turn_stores_what_is_recalled_in_it_and_no_more() -> None:
    plan = timing_plan(TOY, TimestepSchedule(TURN))
    stored = [{TOY.everything[slot.site].kind.is_span for slot in step.live} for step in plan.steps]
    assert stored[: TURN // 2 - 1] == [{False}] * (TURN // 2 - 1)
    assert stored[TURN // 2 : -1] == [{True}] * (TURN // 2 - 1)


def at(full: tuple[int, ...], order: int, level: str) -> Policy:
    recall = Forecast(order=order, what="core" if level == "site" else "update")
    rule = Rule(sites=() if level == "site" else ("stack",), do=recall)
    return Policy(name="test", cadence=Cadence(at=full), rules=(rule,))


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (NoCache(), ["full"] * 4),
        (at((0, 3), 0, "site"), ["full", "site-1", "site-1", "full", "site-1"]),
        (at((0, 2, 3), 2, "site"), ["full", "site-1", "full", "full", "site-3", "site-3"]),
        (at((0, 2), 1, "stack"), ["full", "stack-1", "full", "stack-2"]),
    ],
)
def test_a_plan_takes_the_measured_time_of_every_kind_of_step(policy: Policy, kinds: list[str]) -> None:
    plan = planned(policy, len(kinds))
    assert [kind_of(plan, step) for step in plan.steps] == kinds
    timed = timing().on(plan)
    assert [step.time for step in timed.steps] == [SECONDS[name] for name in kinds]
    assert timed.predicted_speedup == pytest.approx(len(kinds) / sum(SECONDS[name] for name in kinds))
    assert (plan.clock, timed.clock) == (ROOFLINE, "time measured on a machine, float32, inductor")
    assert f"({timed.clock})" in timed.summary()


def test_what_was_not_measured_lies_on_the_line_through_what_was() -> None:
    plan = planned(ToCa(interval=3))
    timed, line = timing().on(plan), timing().line
    others = [i for i, step in enumerate(plan.steps) if not kind_of(plan, step)]
    assert others
    for i in others:
        step = plan.steps[i]
        assert timed.steps[i].time == line.at(step.flops, step.bytes) > line.seconds


def test_what_a_gate_verifies_takes_its_share_of_a_full_step() -> None:
    plan = planned(SpeCa(order=1, shortest=1, longest=3, full=(0, 1)))
    timed = timing().on(plan)
    gated = [i for i, step in enumerate(plan.steps) if step.full is not None]
    assert {kind_of(plan, plan.steps[i]) for i in gated} == {"site-2"}
    for i in gated:
        assert (timed.steps[i].time, timed.steps[i].full.time) == (SECONDS["site-2"], SECONDS["full"])
        share = plan.steps[i].check[1] / (plan.baseline_time / len(plan.steps))
        assert 0 < share < 1
        assert timed.steps[i].check == pytest.approx((plan.steps[i].check[0], share * SECONDS["full"]))
    extra = [a.time - b.time for a, b in zip(timed.at_best, timed.steps, strict=True)]
    assert max(extra) < SECONDS["full"]


def test_the_line_finds_what_times_are_made_of() -> None:
    sizes = [(10**9, 10**8), (10**7, 4 * 10**7), (10**7, 6 * 10**7), (10**6, 10**6)]
    true = Line(2e-3, 3e-12, 5e-11, 0.0)
    found = Line.through([kind(str(i), *size, true.at(*size)) for i, size in enumerate(sizes)])
    assert (found.seconds, found.per_flop, found.per_byte) == pytest.approx((2e-3, 3e-12, 5e-11), rel=1e-6)
    assert found.deviation == pytest.approx(0, abs=1e-9)


def test_nothing_of_the_line_is_negative_and_it_says_how_wrong_it_is() -> None:
    # More bytes in less time: no share of the bytes explains that.
    found = Line.through([kind("a", 100, 10, 1.0), kind("b", 10, 1000, 0.1), kind("c", 1, 2000, 0.05)])
    assert min(found.seconds, found.per_flop, found.per_byte) >= 0
    wrong = [found.at(100, 10) / 1.0 - 1, found.at(10, 1000) / 0.1 - 1, found.at(1, 2000) / 0.05 - 1]
    assert found.deviation == pytest.approx(max(map(abs, wrong)))
    assert "within" in str(timing())


def test_medians_are_not_moved_by_one_slow_call() -> None:
    one = kind("full", 1, 1, 1.0, 1.1, 1.2, 9.0, 1.1)
    assert one.median == 1.1
    assert one.middle == pytest.approx((1.1, 1.2))


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "timing.json"
    timing().save(file)
    read = Timing.load(file)
    assert (read.facts, read.kinds) == (FACTS, timing().kinds)
    assert read.on(planned(FORA(interval=3))) == timing().on(planned(FORA(interval=3)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"kinds"', '"sorts"'),
        lambda text: text.replace('"full"', '"whole"'),
        lambda text: text.replace('"version": 2', '"version": 3'),
        lambda text: text.replace("0.1\n", "-0.1\n"),
        lambda text: text.replace("0.1\n", "Infinity\n"),
        lambda text: text[:100],
        lambda _: "[]",
    ],
)
def test_what_is_no_timing_is_refused(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "timing.json"
    timing().save(file)
    changed = damage(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    for path in (file, tmp_path / "gone.json"):
        with pytest.raises(InvalidTiming, match=f"{path.name} holds no times of steps"):
            Timing.load(path)


def test_times_of_another_model_are_refused_by_name() -> None:
    with pytest.raises(InvalidTiming, match="times are of Toy, the model is Other"):
        timing().check_model("Other")
    other = make_plan(toy([["self-attention", "mlp"]]), NoCache(), TimestepSchedule(2))
    with pytest.raises(InvalidTiming, match="times are of Toy with 6 branches, the plan is for 2"):
        timing().on(other)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latent", (1, 4, 8, 8), r"latent \[2, 4, 8, 8\], the call is of \[1, 4, 8, 8\]"),
        ("dtype", "bfloat16", "dtype float32, the call is of bfloat16"),
        ("device", "another", "device a machine, the call is of another"),
        ("code", "eager", "code inductor, the call is of eager"),
    ],
)
def test_other_conditions_are_refused_by_name(name: str, value: object, text: str) -> None:
    timing().check(**{name: getattr(FACTS, name)})
    with pytest.raises(InvalidTiming, match=f"times are of {text}"):
        timing().check(**{name: value})


def test_before_anything_was_timed_that_is_said() -> None:
    with pytest.raises(InvalidTiming, match="nothing was timed"):
        Timing().on(planned(NoCache()))
    few = Timing(FACTS, timing().kinds[:2])
    with pytest.raises(InvalidTiming, match="no step of kind 'stack-3' was timed"):
        few.seconds("stack-3")


def test_a_notebook_shows_what_the_terminal_does() -> None:
    html, text = timing()._repr_html_(), str(timing())
    assert html.partition("<tbody>")[2].partition("</tbody>")[0].count("<tr>") == len(SECONDS)
    for part in ("Toy, latent [2, 4, 8, 8]", "stack forecast from 3", "10.00 ms", "1.0%", "other steps"):
        assert part in html
        assert part in text
