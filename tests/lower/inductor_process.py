"""A process of its own that compiles a small model, for the test of warm starts: prints what was made in it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import CppBuilder

import dicompile
from dicompile.capture import capture_functional
from dicompile.lower import Program
from dicompile.passes import rewrite
from dicompile.plan import TimestepSchedule
from dicompile.runtime import current_session
from tests.lower.test_inductor import LAYERS, PLANNED, POLICY, STEPS
from tests.models import call, frames_of, plain_dit, state_of


def counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def main(output: Path) -> None:
    made: Counter[str] = Counter(captures=0, rewrites=0, libraries=0)
    dicompile.capture.shared.capture_functional = counted(made, "captures", capture_functional)  # type: ignore[attr-defined]
    dicompile.lower.variants.rewrite = counted(made, "rewrites", rewrite)  # type: ignore[attr-defined]
    CppBuilder.build = counted(made, "libraries", CppBuilder.build)  # type: ignore[method-assign]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sample = plain_dit(LAYERS)
    model = dicompile.optimize(sample.model, POLICY, schedule=PLANNED)
    current_session().keep_chosen = True
    outputs, chosen = [], []
    for step, timestep in enumerate(PLANNED[:STEPS]):
        outputs.append(call(model, sample.inputs, timestep, seed=step))
        state = state_of(model)
        chosen.append({site: tokens.sort().values.tolist() for site, tokens in state.contexts[""].chosen.items()})
    torch.save({"outputs": outputs, "chosen": chosen}, output)
    counters: Counter[str] = torch._dynamo.utils.counters["inductor"]
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    program: Program = frames_of(model)[0].programs.step(TimestepSchedule.of(PLANNED), 0).program
    print(json.dumps({name: counters[name] for name in names} | made | {
        "variants": len(frames_of(model)[0].programs.variants.variants), "calls": len(program.calls),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
