"""Train the TokenCache predictor of the bundled model, and compare it with random tokens of the same numbers.

About ten minutes on one CPU core. The run can be stopped and resumed (``--resume``)::

    python examples/train_demo_predictor.py --out dicompile/demo/assets/tokencache_predictor.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dicompile
from dicompile import Policy, TimestepSchedule
from dicompile.cli.trainable import streamed, trainable
from dicompile.demo import metrics
from dicompile.demo.sample import GUIDANCE, balanced_labels, load_model, load_scheduler, sample
from dicompile.learn.predictor import PredictorOptions, train_predictor
from dicompile.learn.training import Files
from dicompile.policies import NoCache, Predictor, TokenCache

BATCH = 12
OPTIONS = {"iterations": 2000, "penalty": 0.002, "lr": 1e-3, "max_gap": 3}
"""The penalty is about the relative error of a step in which every block is cached: larger ones cache everything."""


def train(out: Path, steps: int, iterations: int, *, resume: bool) -> Predictor:
    """Run (or resume) the training and write the predictor."""
    subject = trainable("demo", BATCH, data=None, device="cpu")
    source = streamed(subject, steps, GUIDANCE, every=100, seed=0)
    options = PredictorOptions(**{**OPTIONS, "iterations": iterations})
    files = Files(out.with_suffix(".ckpt"), out.with_suffix(".jsonl"))
    predictor = train_predictor(subject.module, source, options, files=files, resume=resume)
    predictor.save(out)
    return predictor


def with_random_tokens(policy: Policy) -> Policy:
    """The same numbers of tokens at every step and block, but any tokens."""
    (rule,) = policy.rules
    score = rule.do.score.model_copy(update={"base": "random"})
    rule = rule.model_copy(update={"do": rule.do.model_copy(update={"score": score})})
    return policy.model_copy(update={"rules": (rule,), "predictor": None, "predictor_cost": 0.0})


def compare(file: Path, steps: int, samples: int) -> None:
    """Print the distance to the uncached samples."""
    model, labels = load_model(), balanced_labels(samples)

    def pictures(policy: Policy) -> tuple[torch.Tensor, float]:
        scheduler = load_scheduler()
        scheduler.set_timesteps(steps)
        fast = dicompile.optimize(model, policy, schedule=TimestepSchedule.of(scheduler), mode="eager")
        made = sample(fast, load_scheduler(), labels, steps, GUIDANCE)
        return made, dicompile.plan_of(fast).flop_speedup

    reference, _ = pictures(NoCache())
    for ratio, intervals in ((0.5, (1, 1)), (0.9, (1, 1)), (0.9, (3, 2))):
        policy = TokenCache(file, ratio=ratio, intervals=intervals)
        for name, one in (("TokenCache", policy), ("  random tokens", with_random_tokens(policy))):
            made, speedup = pictures(one)
            psnr = metrics.psnr(made, reference)
            print(f"{name:16} ratio {ratio}, phases {intervals}: {speedup:5.2f}x fewer FLOPs  PSNR {psnr:5.2f} dB")


def main() -> None:
    """Parse arguments, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tokencache_predictor.safetensors"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint beside the predictor")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=OPTIONS["iterations"])
    parser.add_argument("--samples", type=int, default=24, help="to compare with")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.iterations, resume=arguments.resume)
    compare(arguments.out, arguments.steps, arguments.samples)


if __name__ == "__main__":
    main()
