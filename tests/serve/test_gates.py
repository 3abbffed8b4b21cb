"""Gates of requests in one batch: each decides for itself, and gets what it gets alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.plan import Cadence, Forecast, Gate, Policy, Reuse, Rule
from dicompile.serve import Batcher
from tests import models
from tests.models import Sample
from tests.policies.trajectories import slowing
from tests.serve.clients import at_once

STEPS = 10
TIMES = models.timesteps(STEPS)
PATIENCE = 20.0
"""Seconds: nobody runs before everybody waits, however slow the machine is."""
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
"""Products of more rows may round in another way."""


class Run(NamedTuple):
    """What a request got.

    Attributes:
        outputs: at every call.
        kinds: how many calls did what.
        recalls: what its gate decided, where it did.
        drifts: what its gate held against the threshold, where it decided.
    """

    outputs: list[Tensor]
    kinds: Counter[str]
    recalls: list[bool]
    drifts: list[float | None]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Two rows: the halves of guidance, which are one context, and decide together."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    model = models.redraw(models.PlainDiT(3, width=16, size=8))
    model.time[2].weight.data *= 0.05  # then it is the latent that makes values drift
    return Sample(model, inputs)


def sampled(model: Any, sample: Sample, seed: int, report: Any, contexts: tuple[str, ...] = ("",)) -> Run:
    outputs = []
    with torch.no_grad():
        for x, time in zip(slowing(sample.inputs["x"], STEPS, seed), TIMES, strict=True):
            for name in contexts:
                with dicompile.cache_context(name) if name else contextlib.nullcontext():
                    outputs.append(model(x, torch.full((2,), time), sample.inputs["y"] - int(name == "uncond")))
    found = report()
    decisions = [each.recalls for each in found.decisions]
    return Run(outputs, Counter(found.kinds), decisions, [each.drift for each in found.decisions])


def alone(sample: Sample, policy: Policy, seed: int, contexts: tuple[str, ...]) -> Run:
    model = models.optimized(sample, policy, STEPS)
    with dicompile.session():
        return sampled(model, sample, seed, lambda: dicompile.report(model), contexts)


def forecast(threshold: float) -> Policy:
    return Policy(
        name="forecast",
        cadence=Cadence(warmup=2, gate=Gate(probe="residual", threshold=threshold)),
        outside=(1, 0),
        rules=(Rule(do=Forecast(order=1)),),
    )


def added_up(threshold: float) -> Policy:
    gate = Gate(probe="modulated", threshold=threshold, accumulates=True, reference="previous")
    rules = (Rule(sites=("stack",), do=Reuse(what="update")),)
    return Policy(name="added-up", cadence=Cadence(gate=gate), rules=rules)


CASES: dict[str, tuple[Policy, tuple[str, ...]]] = {
    "first block": (dicompile.FirstBlockCache(threshold=0.1), ("",)),
    "a block that runs at every step, twice over": (dicompile.DBCache(first=1, last=1, threshold=0.1, warmup=1), ("",)),
    "forecasts, whose weights follow from decisions": (forecast(0.1), ("",)),
    "modulated input, added up": (added_up(0.07), ("",)),
    "latent, and how far the output moves": (dicompile.EasyCache(threshold=0.3, warmup=3), ("",)),
    "weights made on the device": (dicompile.DiCache(depth=1, threshold=0.3, warmup=2), ("",)),
    "verified": (dicompile.SpeCa(threshold=0.1, shortest=1, longest=5), ("",)),
    "partners": (dicompile.GuidanceReuse(interval=3), ("cond", "uncond")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_every_request_decides_for_itself_and_gets_what_it_gets_alone(sample: Sample, name: str) -> None:
    policy, contexts = CASES[name]
    seeds = [1, 2, 3]
    batcher = Batcher(sample.model, backend="eager", patience=PATIENCE, sizes=(1, 2, 3))
    requests = [batcher.request(policy, schedule=TIMES, contexts=len(contexts)) for _ in seeds]

    def job(request: Any, seed: int) -> Run:
        with request:
            return sampled(request.model, sample, seed, lambda: request.report, contexts)

    found = at_once(*(lambda r=r, s=s: job(r, s) for r, s in zip(requests, seeds, strict=True)))
    expected = [alone(sample, policy, seed, contexts) for seed in seeds]
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, Run), ours
        assert ours.kinds == theirs.kinds
        assert ours.recalls == theirs.recalls
        for one, other in zip(ours.drifts, theirs.drifts, strict=True):
            assert one == (None if other is None else pytest.approx(other, rel=1e-3))
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    done = batcher.served()
    assert Counter(done.steps) == sum((run.kinds for run in expected), Counter()), "nobody computes for another one"
    assert sum(count for size, count in done.batches.items() if size > 1) > 0
    assert (done.cache_bytes, done.reserved_bytes) == (0, 0)
    if contexts == ("",):
        together = list(zip(*(run.recalls for run in expected), strict=True))
        assert {len(set(decided)) for decided in together} == {1, 2}, "the test would say nothing"


def test_a_gated_request_and_a_planned_one_are_one_batch_where_they_do_the_same(sample: Sample) -> None:
    batcher = Batcher(sample.model, backend="eager", patience=PATIENCE, sizes=(1, 2))
    first, second = CASES["first block"][0], dicompile.FirstBlockCache(threshold=0.3)
    requests = [batcher.request(policy, schedule=TIMES) for policy in (first, second)]

    def job(request: Any) -> Run:
        with request:
            return sampled(request.model, sample, 1, lambda: request.report)

    found = at_once(*(lambda r=r: job(r) for r in requests))
    for policy, ours in zip((first, second), found, strict=True):
        theirs = alone(sample, policy, 1, ("",))
        assert ours.kinds == theirs.kinds
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    assert found[0].recalls != found[1].recalls
    assert batcher.served().batches[2] > 0
