"""Fit the forecasts of the bundled model: a policy file for every interval, and for every speedup of "auto".

python examples/fit_demo_forecast.py --out dicompile/demo/assets
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dicompile.cli.trainable import trainable
from dicompile.demo.sample import GUIDANCE
from dicompile.learn.runs import Runs
from dicompile.plan import Cadence

BATCH = 12


def main() -> None:
    """Parse arguments, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--intervals", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--speedups", type=float, nargs="+", default=[3, 4, 6])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--probes", type=int, default=6)
    arguments = parser.parse_args()
    subject = trainable("demo", BATCH, data=None, device="cpu")
    runs = Runs(subject.inputs, subject.scheduler, subject.data, subject.null, arguments.steps, GUIDANCE)
    recording = runs.record(subject.module, arguments.runs)
    runs.probe(subject.module, recording, arguments.probes)
    spaced = {n: recording.fitted(Cadence(interval=n, anchor="last", warmup=2)) for n in arguments.intervals}
    chosen = {x: recording.policy(speedup=x) for x in arguments.speedups}
    files = {f"fitted_{n}": policy for n, policy in spaced.items()} | {f"auto_{x:g}": p for x, p in chosen.items()}
    for name, policy in files.items():
        file = arguments.out / f"{name}.json"
        file.write_text(policy.to_json() + "\n", encoding="utf-8")
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
