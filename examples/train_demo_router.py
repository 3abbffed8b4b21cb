"""Train the Learning-to-Cache router of the bundled model, and compare it with what costs as much.

About ten minutes on one CPU core. The run can be stopped and resumed (``--resume``)::

    python examples/train_demo_router.py --out dicompile/demo/assets/l2c_router.safetensors

``--evaluate FILE`` only compares: guided samples of 50 steps against those of the uncached model.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import dicompile
from dicompile import Policy, Router, TimestepSchedule
from dicompile.cli.trainable import streamed, trainable
from dicompile.demo import metrics
from dicompile.demo.sample import GUIDANCE, balanced_labels, load_model, load_scheduler, sample
from dicompile.learn.objective import Objective
from dicompile.learn.router import RouterOptions, train_router
from dicompile.learn.training import Files
from dicompile.policies import FORA, LearningToCache, NoCache, load_router, save_router

BATCH = 4
OPTIONS = RouterOptions(iterations=3000, objective=Objective(penalty=5e-5), lr=0.1, threshold=0.1)
"""A row is trained 120 times, 1/92 of what the published ones were: the learning rate is 100 times theirs."""


def train(out: Path, steps: int, options: RouterOptions, *, resume: bool) -> Router:
    """Run (or resume) the training and write the router."""
    subject = trainable("demo", BATCH, data=None, device="cpu")
    source = streamed(subject, steps, GUIDANCE, every=100, seed=options.seed)
    files = Files(out.with_suffix(".ckpt"), out.with_suffix(".jsonl"))
    router = train_router(subject.module, source, options, files=files, resume=resume)
    save_router(router, out)
    return router


def shuffled(router: Router, seed: int) -> Router:
    """A router that caches as many sites at every step, but any."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in router.logits])
    return Router(logits, router.grid, router.threshold, router.facts, f"shuffled with seed {seed}")


def pictures(model: nn.Module, policy: Policy, labels: Tensor, steps: int) -> tuple[Tensor, float]:
    """Samples of a policy, and its operations."""
    scheduler = load_scheduler()
    scheduler.set_timesteps(steps)
    fast = dicompile.optimize(model, policy, schedule=TimestepSchedule.of(scheduler), mode="eager")
    made = sample(fast, load_scheduler(), labels, steps, GUIDANCE)
    return made, dicompile.plan_of(fast).flops


def compare(router: Router, samples: int) -> None:
    """Print the distance to the uncached samples of the router and of its opponents."""
    model, labels, full = load_model(), balanced_labels(samples), router.steps
    reference, flops = pictures(model, NoCache(), labels, full)

    def show(name: str, policy: Policy, steps: int = full) -> float:
        made, own = pictures(model, policy, labels, steps)
        print(f"{name:42} {flops / own:5.2f}x fewer FLOPs  PSNR {metrics.psnr(made, reference):5.2f} dB", flush=True)
        return own

    own = show("Learning-to-Cache", LearningToCache(router))
    for seed in range(3):
        show(f"  as many sites per step, seed {seed}", LearningToCache(shuffled(router, seed)))
    show("  uncached, as many FLOPs", NoCache(), round(own / flops * full))
    own = show("FORA, interval 2", FORA(interval=2))
    show("  uncached, as many FLOPs", NoCache(), round(own / flops * full))
    for threshold in (0.5, 0.9):
        own = show(f"Learning-to-Cache, threshold {threshold}", LearningToCache(router, threshold))
        show("  uncached, as many FLOPs", NoCache(), round(own / flops * full))


def main() -> None:
    """Parse arguments, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("l2c_router.safetensors"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint beside the router")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=OPTIONS.iterations)
    parser.add_argument("--evaluate", type=Path, help="do not train: compare this router")
    parser.add_argument("--samples", type=int, default=36, help="to compare with")
    arguments = parser.parse_args()
    if arguments.evaluate:
        router = load_router(arguments.evaluate)
    else:
        options = replace(OPTIONS, iterations=arguments.iterations)
        router = train(arguments.out, arguments.steps, options, resume=arguments.resume)
    print(router.summary())
    compare(router, arguments.samples)


if __name__ == "__main__":
    main()
