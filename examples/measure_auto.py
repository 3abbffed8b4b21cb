"""What ``auto`` gains on a flow-matching model, at equal compute: PSNR to the uncached pictures, as a Markdown table.

    python examples/measure_auto.py --model flow_model

The model is trained first if its folder is not there (`train_flow_model.py`). Calibration and measurement use different
labels and noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import train_flow_model
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

import dicompile
from dicompile.demo import metrics
from dicompile.demo.sample import balanced_labels, sample
from dicompile.learn.frontier import Frontier, Point

BATCH = 12
INTERVALS = (3, 5)
"""Of the published policies; `auto` gets as many full steps."""


def record(
    model: torch.nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, runs: int
) -> dicompile.Recording:
    """Record a few runs of guided sampling."""
    fast = dicompile.optimize(model, "none", schedule=scheduler, backend="eager")
    labels = balanced_labels(150)
    with dicompile.calibrate(fast) as recording:
        for run in range(runs):
            chosen = labels[(torch.arange(BATCH) + 40 + run * BATCH) % len(labels)]
            sample(fast, scheduler, chosen, steps, seed=100 + run)
    dicompile.restore(fast)
    return recording


def contestants(frontier: Frontier, interval: int) -> Iterator[tuple[str, dicompile.Policy | str, int, Point | None]]:
    """Name, policy, number of steps and, of ours, what was expected."""
    steps = frontier.facts.steps
    evenly = tuple(range(0, steps, interval))
    full = len(evenly)
    point = min((point for point in frontier.candidates() if len(point.full) == full), key=lambda point: point.error)
    even = replace(point, full=evenly)
    yield "auto", frontier.policy(point), steps, point
    yield "the same weights, evenly spaced", frontier.policy(even), steps, None
    for order in (1, 2):
        yield (
            f"TaylorSeer, interval {interval}, order {order}",
            dicompile.TaylorSeer(interval, order=order),
            steps,
            None,
        )
    yield f"FORA, interval {interval}", dicompile.FORA(interval), steps, None
    yield f"{full} steps", "none", full, None


def main() -> None:
    """Parse arguments, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("flow_model"))
    parser.add_argument("--runs", type=int, default=2, help="calibration runs of 12 pictures each")
    parser.add_argument("--samples", type=int, default=36)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--training-steps", type=int, default=1200, help="of a model that is not there")
    arguments = parser.parse_args()
    steps = arguments.steps
    if not arguments.model.is_dir():
        train_flow_model.save(arguments.model, arguments.training_steps)
    model = DiTTransformer2DModel.from_pretrained(arguments.model).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(arguments.model)
    frontier = record(model, scheduler, steps, arguments.runs).frontier()
    print(frontier)
    labels = balanced_labels(arguments.samples)
    uncached = sample(model, scheduler, labels, steps)
    print("| | compute | PSNR, dB | relative error | expected |\n|---|---|---|---|---|")
    for interval in INTERVALS:
        for name, policy, calls, point in contestants(frontier, interval):
            fast = dicompile.optimize(model, policy, schedule=scheduler, backend="eager")
            pictures = sample(fast, scheduler, labels, calls)
            plan = dicompile.plan_of(fast)
            compute = plan.flops / plan.baseline_flops * calls / steps
            dicompile.restore(fast)
            psnr, error = metrics.psnr(pictures, uncached), metrics.relative_error(pictures, uncached)
            expected = "" if point is None else f"{point.error:.4f}"
            print(f"| {name} | {compute:.3f} | {psnr:.1f} | {error:.4f} | {expected} |", flush=True)


if __name__ == "__main__":
    main()
