"""What the plan of two denoisers gains from being searched as one: PSNR to the uncached pictures, as a Markdown table.

    python examples/measure_denoisers.py --samples 24
    python examples/measure_denoisers.py --samples 24 --boundary 0     # the first has all steps: what a change costs

A pipeline as Wan 2.2 is one: a denoiser for the noisy steps, another for the rest. Here both are copies of the bundled
model, so their steps cost the same, and all contestants of a group that were searched have as many full steps: what
differs is who has them. Calibration and measurement use different labels and noise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dicompile
from dicompile.demo import metrics
from dicompile.demo.sample import balanced_labels, load_model, load_scheduler, sample
from dicompile.learn.frontier import Frontier, Point

BATCH = 12
INTERVALS = (3, 5)
"""Of the published policies; the searched ones get as many full steps."""


class Pair:
    """A pipeline of two denoisers.

    Args:
        model: is copied for both.
        boundary: share of the noise down to which the first one has the steps.
    """

    def __init__(self, model: nn.Module, boundary: float) -> None:
        self.transformer, self.transformer_2 = copy.deepcopy(model), copy.deepcopy(model)
        self.scheduler, self._boundary = load_scheduler(), boundary

    @property
    def components(self) -> dict[str, Any]:
        """As pipelines of diffusers have them."""
        return {name: getattr(self, name) for name in ("transformer", "transformer_2", "scheduler")}

    @property
    def denoisers(self) -> tuple[nn.Module, nn.Module]:
        """In the order of their steps."""
        return self.transformer, self.transformer_2

    def __call__(self, labels: Tensor, steps: int, seed: int = 0) -> Tensor:
        """Pictures of some labels."""
        sampled: Any = self._denoise
        return sample(sampled, self.scheduler, labels, steps, seed=seed)

    def _denoise(self, latent: Tensor, timestep: Tensor, **given: Any) -> Any:
        is_noisy = float(timestep[0]) >= self._boundary * self.scheduler.config.num_train_timesteps
        return self.denoisers[0 if is_noisy else 1](latent, timestep=timestep, **given)


class Contestant(NamedTuple):
    """What is measured.

    Attributes:
        name: in the table.
        policy: of the cache.
        steps: of the sampler.
        point: what is expected, where it was searched.
    """

    name: str
    policy: dicompile.Policy | str
    steps: int
    point: Point | None = None


def record(pair: Pair, steps: int, runs: int, probes: int) -> dicompile.Recording:
    """Record a few runs, and probe the first of them."""
    labels = balanced_labels(150)

    def sample(run: int) -> None:
        pair(labels[(torch.arange(BATCH) + 40 + run * BATCH) % len(labels)], steps, seed=100 + run)

    with dicompile.calibrate(pair) as recording:
        for run in range(runs):
            sample(run)
    if probes:
        dicompile.probe(pair, lambda: sample(0), recording, probes=probes)
    return recording


def contestants(frontier: Frontier, interval: int) -> Iterator[Contestant]:
    """Everybody with the full steps of one interval."""
    steps = frontier.facts.steps
    full = len(range(0, steps, interval))
    served = len(frontier.facts.stints[0].steps)
    splits = {
        "joint": None,
        "half and half": full // 2,
        "by their steps": round(full * served / steps),
    }
    points = [point for point in frontier.candidates() if len(point.full) == full]
    for name, first in splits.items():
        among = [point for point in points if first in (None, point.split[0])]
        if among:  # a denoiser of few steps may not have half of them
            best = min(among, key=lambda point: point.error)
            yield Contestant(f"{name}, {best.counts} full steps", frontier.policy(best), steps, best)
    yield Contestant(f"TaylorSeer, interval {interval}, order 2", dicompile.TaylorSeer(interval, order=2), steps)
    yield Contestant(f"FORA, interval {interval}", dicompile.FORA(interval), steps)
    yield Contestant(f"{full} steps", "none", full)


def main() -> None:
    """Parse arguments, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="calibration runs of 12 pictures each")
    parser.add_argument("--probes", type=int, default=6, help="steps of which it is found out what becomes of errors")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--boundary", type=float, default=0.875, help="share of the noise at which the second begins")
    arguments = parser.parse_args()
    steps, pair = arguments.steps, Pair(load_model(), arguments.boundary)
    frontier = record(pair, steps, arguments.runs, arguments.probes).frontier()
    print(frontier)
    labels = balanced_labels(arguments.samples)
    uncached = pair(labels, steps)
    print("| | compute | PSNR, dB | mean of pictures | relative error | expected |\n|---|---|---|---|---|---|")
    for interval in INTERVALS:
        for contestant in contestants(frontier, interval):
            dicompile.optimize(pair, contestant.policy, backend="eager", components=frontier.facts.components)
            pictures = pair(labels, contestant.steps)
            compute = sum(share(getattr(pair, name)) for name in frontier.facts.components) / steps
            dicompile.restore(pair)
            psnr, error = metrics.psnr(pictures, uncached), metrics.relative_error(pictures, uncached)
            mean = metrics.mean_psnr(pictures, uncached)
            expected = "" if contestant.point is None else f"{contestant.point.error:.4f}"
            cells = contestant.name, f"{compute:.3f}", f"{psnr:.1f}", f"{mean:.1f}", f"{error:.4f}", expected
            print(f"| {' | '.join(cells)} |", flush=True)


def share(denoiser: nn.Module) -> float:
    """Operations of what a denoiser has run, in full steps."""
    plan = dicompile.plan_of(denoiser)
    flops = {number: step.flops for number, step in zip(plan.schedule.numbers, plan.steps, strict=True)}
    ran = sum(flops[call.step] for call in dicompile.report(denoiser).calls)
    return ran / plan.baseline_flops * len(plan.steps)


if __name__ == "__main__":
    main()
