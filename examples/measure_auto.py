"""What ``auto`` gains on the bundled model at equal compute: PSNR to the uncached pictures, as a Markdown table.

    python examples/measure_auto.py --samples 24

Calibration and measurement use different labels and noise. Rivals that search for full steps (BudCache, CEM) get the
recording that ``auto`` gets; what they choose is measured as published, and with weights fitted as those of ``auto``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import dicompile
from dicompile.bench.step_search import Steps, anneal, least_cumulative_error, priors, reuse_loss
from dicompile.demo import metrics
from dicompile.demo.sample import balanced_labels, load_model, load_scheduler, sample
from dicompile.learn.frontier import Frontier
from dicompile.plan import Cadence, Forecast, Policy, Reuse, Rule

BATCH = 12
INTERVALS = (3, 5)
"""Of the published policies; `auto` gets as many full steps."""


class Contestant(NamedTuple):
    """What is measured.

    Attributes:
        name: in the table.
        policy: of the cache.
        steps: of the sampler.
        expected: error of the last latent, where it is foretold.
    """

    name: str
    policy: Policy | str
    steps: int
    expected: float | None = None


def record(model: torch.nn.Module, scheduler: Any, steps: int, runs: int, probes: int) -> dicompile.Recording:
    """Record a few runs of guided sampling, and probe the first of them."""
    fast = dicompile.optimize(model, "none", schedule=scheduler, backend="eager")
    labels = balanced_labels(150)

    def sampled(run: int) -> None:
        chosen = labels[(torch.arange(BATCH) + 40 + run * BATCH) % len(labels)]
        sample(fast, scheduler, chosen, steps, seed=100 + run)

    with dicompile.calibrate(fast) as recording:
        for run in range(runs):
            sampled(run)
    if probes:
        dicompile.probe(fast, lambda: sampled(0), recording, probes=probes)
    dicompile.restore(fast)
    return recording


def reusing(full: Steps) -> Policy:
    """What BudCache does at other steps: what the stack adds is added again."""
    rule = Rule(sites=("stack",), do=Reuse(what="update"))
    return Policy(name="budcache", cadence=Cadence(at=full), rules=(rule,))


def forecasting(full: Steps, order: int) -> Policy:
    """TaylorSeer, which CEM plugs into, between any full steps."""
    rule = Rule(do=Forecast(order=order, differences="divided"))
    return Policy(name="cem", cadence=Cadence(at=full), rules=(rule,))


def contestants(frontier: Frontier, interval: int) -> Iterator[Contestant]:
    """Everybody with the full steps of one interval."""
    steps = frontier.facts.steps
    evenly = tuple(range(0, steps, interval))
    full = len(evenly)
    point = min((point for point in frontier.candidates() if len(point.full) == full), key=lambda point: point.error)
    yield Contestant(f"auto, {full} full steps", frontier.policy(point), steps, point.error)

    def with_weights(full: Steps) -> Policy:
        return frontier.policy(replace(point, full=full))

    yield Contestant("the same weights, evenly spaced", with_weights(evenly), steps)
    annealed = anneal(reuse_loss(frontier), steps, full)
    yield Contestant("BudCache: stack reused", reusing(annealed), steps)
    yield Contestant("BudCache: the same weights", with_weights(annealed), steps)
    for name, spread in (("CEM", 1), ("CEM, any gap", steps)):
        chosen = least_cumulative_error(priors(frontier), full, spread)
        for order in (1, 2):
            yield Contestant(f"{name}: TaylorSeer, order {order}", forecasting(chosen, order), steps)
        yield Contestant(f"{name}: the same weights", with_weights(chosen), steps)
    for order in (1, 2):
        published = dicompile.TaylorSeer(interval, order=order)
        yield Contestant(f"TaylorSeer, interval {interval}, order {order}", published, steps)
    yield Contestant(f"FORA, interval {interval}", dicompile.FORA(interval), steps)
    yield Contestant(f"{full} steps", "none", full)


def main() -> None:
    """Parse arguments, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="calibration runs of 12 pictures each")
    parser.add_argument("--probes", type=int, default=6, help="steps of which it is found out what becomes of errors")
    parser.add_argument("--samples", type=int, default=36)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    arguments = parser.parse_args()
    steps = arguments.steps
    model, scheduler = load_model(), load_scheduler()
    frontier = record(model, scheduler, steps, arguments.runs, arguments.probes).frontier()
    print(frontier)
    labels = balanced_labels(arguments.samples)
    uncached = sample(model, scheduler, labels, steps)
    print("| | compute | PSNR, dB | mean of pictures | relative error | expected |\n|---|---|---|---|---|---|")
    for interval in INTERVALS:
        for contestant in contestants(frontier, interval):
            fast = dicompile.optimize(model, contestant.policy, schedule=scheduler, backend="eager")
            pictures = sample(fast, scheduler, labels, contestant.steps)
            plan = dicompile.plan_of(fast)
            compute = plan.flops / plan.baseline_flops * contestant.steps / steps
            dicompile.restore(fast)
            psnr, error = metrics.psnr(pictures, uncached), metrics.relative_error(pictures, uncached)
            expected = "" if contestant.expected is None else f"{contestant.expected:.4f}"
            mean = metrics.mean_psnr(pictures, uncached)
            cells = contestant.name, f"{compute:.3f}", f"{psnr:.1f}", f"{mean:.1f}", f"{error:.4f}", expected
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
