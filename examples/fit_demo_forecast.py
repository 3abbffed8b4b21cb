"""Fit the forecasts of the bundled model: one policy file per interval, about half a minute each.

python examples/fit_demo_forecast.py --out dicompile/demo/assets
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dicompile.cli.trainable import trainable
from dicompile.learn.forecast import ForecastOptions, fit_forecast, learnable_for
from dicompile.learn.samplers import Ddim
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
    both = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in subject.inputs.items()}
    for interval in arguments.intervals:
        cadence = Cadence(interval=interval, anchor="last", warmup=2)
        options = ForecastOptions(cadence, order=2, guidance=GUIDANCE, runs=1)
        model = learnable_for(subject.module, both, options)
        policy = fit_forecast(model, Ddim(subject.scheduler, arguments.steps), subject.data, options, subject.null)
        file = arguments.out / f"fitted_{interval}.json"
        file.write_text(policy.to_json() + "\n", encoding="utf-8")
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
