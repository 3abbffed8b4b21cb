"""Whether plans take as long as they say: `auto` on the demo model, by operations and by measured time.

    python examples/measure_time.py

Calibrates, times every kind of step, and prints a Markdown table of the shares of time that plans predict and take.
Contestants take turns; counted is the time of all calls of the model in a run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import dicompile
from dicompile.demo.sample import balanced_labels, load_model, load_scheduler, sample

BUDGETS = (0.5, 0.3)
UNCACHED = "no cache"


def contestants(recording: dicompile.Recording, timing: dicompile.Timing) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and what `optimize` is given."""
    yield UNCACHED, {"policy": "none"}
    for budget in BUDGETS:
        goal = {"policy": "auto", "recording": recording, "budget": budget}
        yield f"{budget:.0%} of the operations", goal
        yield f"{budget:.0%} of the time", {**goal, "timing": timing}


def main() -> None:
    """Parse arguments, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--runs", type=int, default=2, help="that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant")
    parser.add_argument("--backend", default="inductor", help="or eager")
    arguments = parser.parse_args()
    labels, scheduler, steps = balanced_labels(arguments.samples), load_scheduler(), arguments.steps

    def optimized(backend: str = arguments.backend, **given: Any) -> Any:
        return dicompile.optimize(load_model(), schedule=scheduler, backend=backend, **given)

    recorded, timed = optimized("eager", policy="none"), optimized(policy="none")
    with dicompile.calibrate(recorded) as recording:
        sample(recorded, scheduler, labels, steps, seed=1)
    with dicompile.measure(timed) as timing:
        for seed in range(arguments.runs):
            sample(timed, scheduler, labels, steps, seed=seed)
    print(timing)
    models = {name: optimized(**given) for name, given in contestants(recording, timing)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.rounds + 1):  # the first one compiles
        for name, model in models.items():
            sample(model, scheduler, labels, steps)
            if turn:
                seconds[name].append(sum(call.seconds for call in dicompile.report(model).calls))
    whole = statistics.median(seconds[UNCACHED])
    print("| budget | full steps | operations | time predicted | time measured | seconds |\n|---|---|---|---|---|---|")
    for name, model in models.items():
        plan, median = dicompile.plan_of(model), statistics.median(seconds[name])
        full = sum(step.kind == "full" for step in plan.steps)
        shares = (1 / plan.flop_speedup, 1 / plan.predicted_speedup, median / whole)
        print(f"| {name} | {full} | {' | '.join(f'{share:.1%}' for share in shares)} | {median:.2f} |")


if __name__ == "__main__":
    main()
