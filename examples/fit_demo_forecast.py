"""Fit the forecasts of the bundled model: one policy file per interval, from one recorded run.

python examples/fit_demo_forecast.py --out dicompile/demo/assets
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dicompile.cli.trainable import trainable
from dicompile.learn.runs import Runs
from dicompile.plan import Cadence

BATCH, GUIDANCE = 12, 2.0


def main() -> None:
    """Parse arguments, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--intervals", type=int, nargs="+", default=[3, 4, 6])
    arguments = parser.parse_args()
    subject = trainable("demo", BATCH, data=None, device="cpu")
    runs = Runs(subject.inputs, subject.scheduler, subject.data, subject.null, arguments.steps, GUIDANCE)
    recording = runs.record(subject.module, 1)
    for interval in arguments.intervals:
        policy = recording.fitted(Cadence(interval=interval, anchor="last", warmup=2))
        file = arguments.out / f"fitted_{interval}.json"
        file.write_text(policy.to_json() + "\n", encoding="utf-8")
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
