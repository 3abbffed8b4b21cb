"""A caching policy of one's own, in ten lines, on the bundled model.

    python examples/own_policy.py --threshold 0.2

The first two blocks run at every step. Where what they add is near to what they added at the last full step, the others
are forecast from the last two full steps. What happened, and how far the pictures are from uncached ones, is printed.
"""

from __future__ import annotations

import argparse

import torch

import dicompile
from dicompile import Cadence, Forecast, Gate, Policy, Rule
from dicompile.demo.sample import load_model, load_scheduler, sample


def own_policy(threshold: float) -> Policy:
    """Two blocks tell whether the others have to run; a line through the last two full steps stands in for them."""
    return Policy(
        name="own",
        cadence=Cadence(warmup=3, gate=Gate(threshold=threshold, longest=4, last=1)),
        outside=(2, 0),
        rules=(Rule(sites=("stack",), do=Forecast(order=1, what="update")),),
    )


def main() -> None:
    """Sample with and without the policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threshold", type=float, default=0.2, help="relative L1 distance from which a step is full")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    labels, model = torch.arange(4), load_model()
    uncached = sample(model, load_scheduler(), labels, arguments.steps)
    scheduler = load_scheduler()
    cached = dicompile.optimize(model, own_policy(arguments.threshold), schedule=scheduler, backend="eager")
    pictures = sample(cached, scheduler, labels, arguments.steps)
    print(dicompile.plan_of(cached).summary())
    print(dicompile.report(cached))
    print(f"relative L2 error {float((pictures - uncached).norm() / uncached.norm()):.4f}")


if __name__ == "__main__":
    main()
