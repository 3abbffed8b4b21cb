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

import dicompile
from dicompile.backend import read_options
from dicompile.errors import InvalidSetting
from dicompile.lower import Backend, compile_segment, inductor
from dicompile.plan import Cadence, Line, Policy, Refresh, Reuse, Rule, TokenScore
from dicompile.runtime import current_session
from tests.models import call, optimized, plain_dit, state_of, timesteps
from tests.passes.segments import mlp_block

ROOT = Path(__file__).parents[2]
LAYERS, STEPS, TOKENS = 2, 4, 64
PLANNED = timesteps(STEPS + 1)
"""One step more than is run: what steps store is then of use, and the last one is no variant of its own."""
AGREES = 1e-5
"""Largest difference over the largest output: fused kernels round in other places than single operators."""

# All tokens at the second step, half of them at the third, one at the fourth: one compiled variant serves every count.
COUNTS = ([], [TOKENS] * LAYERS, [TOKENS // 2] * LAYERS, [1] * LAYERS)
_LEAST = 1.5 / TOKENS
_BY_STEP = Line(start=1.5 - _LEAST / 2, slope=-(1 - _LEAST) * len(PLANNED) / 2)
_RULES = (
    Rule(sites=("mlp",), do=Refresh(ratio=1.0, by_step=_BY_STEP, score=TokenScore(grid_cell=2, grid_bonus=0.5))),
    Rule(do=Reuse()),
)
POLICY = Policy(name="extremes", cadence=Cadence(interval=len(PLANNED), counting="up"), rules=_RULES)


@dataclass(frozen=True)
class Ran:
    """What a process printed and saved."""

    counters: dict[str, int]
    outputs: list[Tensor]
    chosen: list[dict[int, Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Ran]:
    """The same model compiled by two processes, one after the other, with one cache folder that was empty.

    Inductor's own folder is empty for both of them.
    """
    folder = tmp_path_factory.mktemp("processes")
    cold, warm = (run_process(folder, name) for name in ("cold", "warm"))
    return cold, warm


def run_process(folder: Path, name: str) -> Ran:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "DICOMPILE_CACHE_DIR": str(folder / "kept"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{name}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # libraries are compiled in the process itself, and counted
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # nothing is compiled to find out whether the compiler knows the CPU
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.lower.inductor_process", str(folder / f"{name}.pt")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    return Ran(json.loads(done.stdout.splitlines()[-1]), saved["outputs"], saved["chosen"])


def test_the_first_process_compiles_every_variant_once(processes: tuple[Ran, Ran]) -> None:
    cold, _ = processes
    assert cold.counters["fxgraph_cache_miss"] == cold.counters["variants"] > LAYERS
    assert cold.counters["fxgraph_cache_bypass"] == 0
    assert cold.counters["captures"] == 1
    assert cold.counters["rewrites"] == cold.counters["variants"]
    assert cold.counters["libraries"] >= cold.counters["variants"]


def test_the_second_process_captures_rewrites_and_compiles_nothing(processes: tuple[Ran, Ran]) -> None:
    cold, warm = processes
    for made in ("captures", "rewrites", "libraries", "fxgraph_cache_miss"):
        assert warm.counters[made] == 0, made
    assert warm.counters["fxgraph_cache_hit"] == warm.counters["variants"] == cold.counters["variants"]


def test_a_warm_start_gives_the_same_bits(processes: tuple[Ran, Ran]) -> None:
    cold, warm = processes
    assert all(torch.equal(a, b) for a, b in zip(cold.outputs, warm.outputs, strict=True))


def test_compiled_variants_agree_with_their_graphs_and_refresh_the_same_tokens(processes: tuple[Ran, Ran]) -> None:
    compiled, _ = processes
    torch.manual_seed(0)
    sample = plain_dit(LAYERS)
    model = optimized(sample, POLICY, len(PLANNED))
    current_session().keep_chosen = True
    for step, timestep in enumerate(PLANNED[:STEPS]):
        output = call(model, sample.inputs, timestep, seed=step)
        chosen = state_of(model).contexts[""].chosen
        assert {site: tokens.sort().values.tolist() for site, tokens in chosen.items()} == compiled.chosen[step]
        assert [tokens.shape[1] for tokens in chosen.values()] == COUNTS[step]
        assert ((compiled.outputs[step] - output).abs().max() / output.abs().max()).item() < AGREES


def test_eager_mode_runs_the_rewritten_graph_itself() -> None:
    segment = mlp_block().segment
    assert compile_segment(segment, Backend("eager")).__self__ is segment.graph_module


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"backend": "triton"},
            "backend 'triton' does not exist\n  where: dicompile\n  fix:   use one of: inductor, eager",
        ),
        (
            {"compile_mode": "fast"},
            "mode 'fast' cannot be had\n  where: compile_mode\n"
            "  fix:   use one of: default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs",
        ),
        (
            {"options": {"max_autotone": True}},
            "option 'max_autotone' of Inductor cannot be had\n  where: options\n"
            "  why:   Inductor has none of this name\n  fix:   see torch._inductor.list_options()",
        ),
        (
            {"options": {"triton.cudagraphs": True}},
            "option 'triton.cudagraphs' of Inductor cannot be had\n  where: options\n"
            "  why:   Inductor's CUDA graphs overwrite what an earlier step stored\n"
            "  fix:   compile_mode='reduce-overhead'",
        ),
        (
            {"compile_mode": "reduce-overhead", "cache_device": "cpu"},
            "compile_mode 'reduce-overhead' takes no cache_device\n  where: cache_device\n"
            "  why:   what comes back from the host lies elsewhere at every step\n  fix:   leave out one of them",
        ),
        (
            {"compile_mode": "reduce-overhead", "max_cache_bytes": "1GiB"},
            "compile_mode 'reduce-overhead' takes no max_cache_bytes\n  where: max_cache_bytes\n"
            "  why:   recorded steps keep every slot, and a pool that no plan knows\n  fix:   leave out one of them",
        ),
        (
            {"compile_mode": "reduce-overhead", "backend": "eager"},
            "backend 'eager' takes no compile_mode\n  where: compile_mode\n"
            "  why:   it is about compiling, and nothing is compiled\n"
            "  fix:   leave it out, or use backend='inductor'",
        ),
        (
            {"backend": "eager", "options": {"max_autotune": True}},
            "backend 'eager' takes no options\n  where: options\n"
            "  why:   it is about compiling, and nothing is compiled\n"
            "  fix:   leave it out, or use backend='inductor'",
        ),
        (
            {"backend": "eager", "compile_mode": "default"},
            "backend 'eager' takes no compile_mode\n  where: compile_mode\n"
            "  why:   it is about compiling, and nothing is compiled\n"
            "  fix:   leave it out, or use backend='inductor'",
        ),
        (
            {"backend": "eager", "warmup": "background"},
            "backend 'eager' takes no warmup\n  where: warmup\n"
            "  why:   it is about compiling, and nothing is compiled\n"
            "  fix:   leave it out, or use backend='inductor'",
        ),
        (
            {"warmup": "later"},
            "warmup 'later' cannot be had\n  where: warmup\n  fix:   use 'background', or leave it out",
        ),
        (
            {"backend": "eager", "dynamic": False},
            "backend 'eager' takes no dynamic\n  where: dynamic\n"
            "  why:   it is about compiling, and nothing is compiled\n"
            "  fix:   leave it out, or use backend='inductor'",
        ),
        (
            {"dynamic": "auto"},
            "dynamic='auto' cannot be had\n  where: dynamic\n"
            "  fix:   True makes symbols of sizes at once, False of none; None of what varied",
        ),
    ],
    ids=[
        "backend",
        "mode",
        "option",
        "CUDA graphs",
        "recorded, cache_device",
        "recorded, max_cache_bytes",
        "recorded, eager",
        "options, eager",
        "mode, eager",
        "warmup, eager",
        "warmup",
        "dynamic, eager",
        "dynamic",
    ],
)
def test_what_cannot_be_had_is_refused_by_both_front_ends(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        dicompile.optimize(plain_dit(1).model, **given)
    assert str(caught.value) == text
    with pytest.raises(InvalidSetting) as caught:
        read_options(given)
    assert str(caught.value) == text


def test_options_of_inductor_are_in_effect_while_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiled(graph_module: Any, arguments: Any, mode: Any) -> Any:
        seen.append((torch._inductor.config.max_autotune, torch._inductor.config.epilogue_fusion))
        return graph_module.forward

    monkeypatch.setattr(inductor, "_compiled", compiled)
    model, inputs = plain_dit(1)
    for given in ({}, {"options": {"epilogue_fusion": False}}, {"compile_mode": "max-autotune"}):
        before = len(seen)
        call(dicompile.optimize(model, "none", **given), inputs, 500, seed=0)
        assert len(seen) > before, "compiled anew: other options are other code"
    assert len(set(seen)) == 3
    assert not torch._inductor.config.max_autotune


def test_the_older_word_for_a_backend_is_still_taken() -> None:
    assert read_options({"mode": "eager"}).backend == read_options({"backend": "eager"}).backend == Backend("eager")
