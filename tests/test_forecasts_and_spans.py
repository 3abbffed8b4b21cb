"""Policies that forecast, store attention or skip all blocks: from `optimize` to numbers, on tiny models."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx

import dicompile
from dicompile.analysis import node_flops
from dicompile.lower import Program
from dicompile.ops.kinds import ATTENTION
from dicompile.plan import (
    Cadence,
    Forecast,
    Plan,
    Policy,
    Refresh,
    Reuse,
    Rule,
    Table,
    TimestepSchedule,
    TokenScore,
)
from tests.models import MODELS, Sample, call, frames_of, optimized, run, state_of, timesteps

STEPS = 9
REUSED = 1e-5
"""An update is the difference of two streams; adding it again rounds once more in each of them."""

RANDOM = TokenScore(base="random", age_weight=0.0)
BESIDE = Policy(
    name="tokens-beside-forecast",
    cadence=Cadence(interval=3, counting="up", anchor="last", warmup=2),
    rules=(
        Rule(sites=("mlp",), do=Refresh(ratio=0.3, score=RANDOM, otherwise=Forecast(order=1))),
        Rule(do=Forecast(order=1)),
    ),
)


def table(sites: int) -> Policy:
    """Every third site, and another third at every step, after two full ones."""
    rows = [[step < 2 or (site + step) % 3 == 0 for site in range(sites)] for step in range(STEPS)]
    compute = tuple(tuple(row) for row in rows)
    return Policy(name="table", rules=(Rule(do=Table(compute=compute, otherwise=Forecast(order=1))),))


POLICIES: dict[str, list[Policy]] = {
    "dit": [
        dicompile.DuCa(ratio=0.2, age_weight=0.1),
        dicompile.DuCa(score="value-norm", aggressive="update", decide="block"),
        dicompile.TaylorSeer(interval=3, order=2),
        dicompile.TaylorSeerLite(interval=3, what="stream"),
        BESIDE,
        table(4),
        dicompile.HiCache(interval=3, order=2),
        dicompile.Spectrum(warmup=3, share=0.5),
    ],
    "pixart": [
        dicompile.DuCaPixArt(score="random", aggressive="update"),
        dicompile.TaylorSeer(interval=3, order=1),
        dicompile.TaylorSeerLite(interval=3),
    ],
    "sd3": [
        dicompile.ToCaFlux(interval=3, ratio=0.3),
        dicompile.DuCaFlux(interval=4, ratio=0.3, aggressive="stream"),
        dicompile.TaylorSeer(interval=3, order=2),
        dicompile.TaylorSeerLite(interval=3),
        BESIDE,
    ],
    "flux": [
        dicompile.ToCaFlux(interval=3, ratio=0.3),
        dicompile.ToCaFlux(interval=3, ratio=0.3, score="key-norm"),
        dicompile.DuCaFlux(interval=4, ratio=0.3),
        dicompile.DuCaFlux(interval=4, ratio=0.3, score="random", aggressive="stream"),
        dicompile.TaylorSeer(interval=3, order=1),
        dicompile.TaylorSeerLite(interval=3, what="stream"),
        table(10),
        dicompile.Spectrum(warmup=3),
    ],
}
NIGHTLY = {("dit", 5), ("pixart", 1), ("sd3", 2), ("sd3", 3), ("sd3", 4), ("flux", 0), ("flux", 3), ("flux", 5)}
"""Methods that another model runs in `make test`, or this one with another score."""
CASES = [
    pytest.param(
        (name, policy),
        id=f"{name}-{number}-{policy.name}",
        marks=pytest.mark.nightly if (name, number) in NIGHTLY else (),
    )
    for name, own in POLICIES.items()
    for number, policy in enumerate(own)
]


class Ran(NamedTuple):
    """A model under a policy, after one run."""

    sample: Sample
    policy: Policy
    model: Any
    outputs: list[Tensor]

    @property
    def plan(self) -> Plan:
        return dicompile.plan_of(self.model)

    def program(self, step: int) -> Program:
        return frames_of(self.model)[-1].programs.step(TimestepSchedule.of(timesteps(STEPS)), step).program


@pytest.fixture(scope="module", params=CASES)
def ran(request: pytest.FixtureRequest) -> Ran:
    torch.manual_seed(0)
    name, policy = request.param
    sample = MODELS[name](2)
    model = optimized(sample, policy, STEPS)
    return Ran(sample, policy, model, run(model, sample.inputs, timesteps(STEPS), seed=3))


@pytest.mark.sampled
def test_full_steps_equal_the_model_and_others_do_not(ran: Ran) -> None:
    uncached = run(ran.sample.model, ran.sample.inputs, timesteps(STEPS), seed=3)
    kinds = [step.kind for step in ran.plan.steps]
    assert kinds[0] == "full"
    assert set(kinds) != {"full"}
    for kind, output, expected in zip(kinds, ran.outputs, uncached, strict=True):
        assert output.isfinite().all()
        assert torch.allclose(output, expected, rtol=REUSED, atol=REUSED) == (kind == "full")


@pytest.mark.sampled
def test_a_second_run_is_equal_bit_by_bit(ran: Ran) -> None:
    again = run(ran.model, ran.sample.inputs, timesteps(STEPS), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again, ran.outputs, strict=True))
    report = dicompile.report(ran.model)
    assert report.cold_starts == []
    assert report.kinds.total() == STEPS


def executed(ran: Ran, step: int) -> list[fx.Node]:
    """Nodes of the graphs that a step runs."""
    graphs = {
        id(variant.function): variant.segment.graph for variant in ran.model.frames[-1].programs.variants.variants
    }
    return [node for item in ran.program(step).calls for node in graphs[id(item.function)].nodes]


@pytest.mark.sampled
def test_steps_execute_what_the_plan_says_and_a_skip_leaves_no_block(ran: Ran) -> None:
    found = dicompile.structure_of(ran.model)
    outside = found.flops - sum(span.flops for span in found.spans if span.kind.value == "stack")
    for number, step in enumerate(ran.plan.steps):
        actions = [site.action for site in step.sites]
        nodes = executed(ran, number)
        flops = sum(map(node_flops, nodes))
        if step.kind == "full":
            assert flops == found.flops  # on a CPU a score is made of the weights of attention
        elif all(action.is_skip for action in actions[: len(found.sites)]):
            assert not any(node.target is ATTENTION for node in nodes)
            assert flops <= 1.01 * outside  # a reused stream needs no embedding of the latent either
            assert step.flops == pytest.approx(outside, rel=0.01)
        elif not any(action.tokens for action in actions):
            # Of what several sites share, the plan counts parts: joint attention that one of two streams reuses runs,
            # and modulation is narrowed to what is still read.
            assert -0.05 <= (flops - step.flops) / found.flops <= 0.1


@pytest.mark.sampled
def test_what_is_held_is_what_the_plan_says(ran: Ran) -> None:
    """The largest number of bytes between two steps, reached and not exceeded."""
    state = state_of(ran.model)
    held = []
    for step, time in enumerate(timesteps(STEPS)):
        call(ran.model, ran.sample.inputs, time, 3000 + step)
        held.append(state.cache_bytes)
    assert max(held) == ran.plan.cache_bytes
    assert held[-1] == 0


def test_two_rules_may_keep_two_values_of_one_site() -> None:
    """Every step is as if its rule were the only one."""
    sample = MODELS["flux"]()

    def outputs(*rules: tuple[Any, Any]) -> list[Tensor]:
        named = tuple(Rule(sites=("parallel",), when=when, do=Reuse(what=what)) for when, what in rules)
        policy = Policy(name="two", cadence=Cadence(interval=4), rules=named)
        return run(optimized(sample, policy, 8), sample.inputs, timesteps(8))

    both = outputs(("odd", "attention"), ("always", "core"))
    alone = [outputs(("always", what)) for what in ("attention", "core")]
    alike = [[torch.equal(*pair) for pair in zip(both, each, strict=True)] for each in alone]
    assert all(map(any, zip(*alike, strict=True)))
    assert not any(map(all, alike))
