"""Inductor: compiled variants agree with the graphs they were made from, and a second process compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.errors import InvalidSetting
from dicompile.lower import MODES, check_mode, compile_segment
from dicompile.plan import Cadence, Line, Policy, Refresh, Reuse, Rule, TokenScore
from dicompile.runtime import current_session
from tests.models import call, optimized, plain_dit, state_of, timesteps
from tests.passes.segments import mlp_block

ROOT = Path(__file__).parents[2]
LAYERS, STEPS, TOKENS = 2, 4, 64
AGREES = 1e-5
"""Largest difference over the largest output: fused kernels round in other places than single operators."""

# All tokens at the second step, half of them at the third and one at the last: one compiled variant serves every count.
COUNTS = ([], [TOKENS] * LAYERS, [TOKENS // 2] * LAYERS, [1] * LAYERS)
_LEAST = 1.5 / TOKENS
_BY_STEP = Line(start=1.5 - _LEAST / 2, slope=-2 * (1 - _LEAST))
_RULES = (
    Rule(sites=("mlp",), do=Refresh(ratio=1.0, by_step=_BY_STEP, score=TokenScore(grid_cell=2, grid_bonus=0.5))),
    Rule(do=Reuse()),
)
POLICY = Policy(name="extremes", cadence=Cadence(interval=STEPS, counting="up"), rules=_RULES)


@dataclass(frozen=True)
class Ran:
    """What a process printed and saved."""

    counters: dict[str, int]
    outputs: list[Tensor]
    chosen: list[dict[int, Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Ran]:
    """The same model compiled by two processes, one after the other, with one cache folder that was empty."""
    folder = tmp_path_factory.mktemp("inductor")
    cold, warm = (run_process(folder, name) for name in ("cold", "warm"))
    return cold, warm


def run_process(folder: Path, name: str) -> Ran:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.lower.inductor_process", str(folder / name)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / name, weights_only=True)
    return Ran(json.loads(done.stdout.splitlines()[-1]), saved["outputs"], saved["chosen"])


def test_the_first_process_compiles_every_variant_once(processes: tuple[Ran, Ran]) -> None:
    cold, _ = processes
    assert cold.counters["fxgraph_cache_miss"] == cold.counters["variants"] > LAYERS
    assert cold.counters["fxgraph_cache_bypass"] == 0


def test_the_second_process_compiles_nothing(processes: tuple[Ran, Ran]) -> None:
    cold, warm = processes
    assert warm.counters["fxgraph_cache_miss"] == 0
    assert warm.counters["fxgraph_cache_hit"] == cold.counters["fxgraph_cache_miss"]


def test_a_warm_start_gives_the_same_bits(processes: tuple[Ran, Ran]) -> None:
    cold, warm = processes
    assert all(torch.equal(a, b) for a, b in zip(cold.outputs, warm.outputs, strict=True))


def test_compiled_variants_agree_with_their_graphs_and_refresh_the_same_tokens(processes: tuple[Ran, Ran]) -> None:
    compiled, _ = processes
    torch.manual_seed(0)
    sample = plain_dit(LAYERS)
    model = optimized(sample, POLICY, STEPS)
    current_session().keep_chosen = True
    for step, timestep in enumerate(timesteps(STEPS)):
        output = call(model, sample.inputs, timestep, seed=step)
        chosen = state_of(model).contexts[""].chosen
        assert {site: tokens.sort().values.tolist() for site, tokens in chosen.items()} == compiled.chosen[step]
        assert [tokens.shape[1] for tokens in chosen.values()] == COUNTS[step]
        assert ((compiled.outputs[step] - output).abs().max() / output.abs().max()).item() < AGREES


def test_eager_mode_runs_the_rewritten_graph_itself() -> None:
    segment = mlp_block().segment
    assert compile_segment(segment, "eager").__self__ is segment.graph_module


def test_an_unknown_mode_is_refused_with_the_modes_there_are() -> None:
    with pytest.raises(InvalidSetting) as caught:
        check_mode("triton")
    assert str(caught.value) == (
        "mode 'triton' does not exist\n  where: dicompile\n  fix:   use one of: inductor, eager"
    )
    for mode in MODES:
        check_mode(mode)
