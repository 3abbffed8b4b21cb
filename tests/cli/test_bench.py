"""``dicompile bench`` from the command line to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from dicompile.bench.results import CompileRow, Cost, Kind, Result, Row
from dicompile.cli.main import app
from dicompile.errors import DicompileError, UnknownPolicy


def run(*arguments: object, columns: int = 80) -> Outcome:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": str(columns)})


def refused(*arguments: object, error: type[DicompileError] = DicompileError) -> str:
    outcome = run(*arguments)
    assert isinstance(outcome.exception, error), outcome.output
    return str(outcome.exception)


def made_up(model: str) -> Result:
    return Result(model, "2 blocks", "eager", (Row("eager", (Kind("full", 4, 1.0),), 1.0, 1.0),))


def test_a_quick_run_fills_table_json_and_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # Dynamo takes seconds
    outcome = run(
        "dit", "--quick", "--backend", "eager", "-p", "fora",
        "-a", "eager", "-a", "torch.compile", "-a", "first-block", "-a", "fewer-steps",
        "--json", tmp_path / "new" / "bench.json", "--markdown", tmp_path / "bench.md",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    (model,) = content["models"]
    assert [row["name"] for row in model["rows"]] == ["eager", "torch.compile", "dicompile fora", "2 steps"]
    assert all(sum(kind["count"] for kind in row["kinds"]) == 4 for row in model["rows"][:3])
    fora = model["rows"][2]
    assert {kind["name"] for kind in fora["kinds"]} == {"full", "reuse"}
    assert fora["arrival"] == pytest.approx(fora["speedup"] / fora["flop_speedup"])
    assert fora["flop_speedup"] > 1.5
    assert fora["memory"]["held"] == fora["memory"]["planned"] == 2 * 2 * 2 * 16 * 64 * 4  # sites of 2 x 16 x 64 floats
    assert model["refused"] == {"first-block": "DiTTransformer2DModel has no enable_cache in diffusers"}
    text = (tmp_path / "bench.md").read_text()
    assert text.startswith("<!-- dicompile bench: step times on cpu -->\n")
    assert "| dicompile fora |" in text
    assert "first-block is left out" in " ".join(outcome.stdout.split())
    assert max(map(len, outcome.stdout.splitlines())) <= 80


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been measured; the second model is interrupted."""
    calls: list[Any] = []

    def measure(subject: Any, options: Any, costs: Any, tick: Callable[[str], object]) -> Result:
        tick(subject.name)
        calls.append((subject.name, options, costs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made_up(subject.title)

    monkeypatch.setattr("dicompile.bench.measure.measure", measure)
    monkeypatch.setattr("dicompile.bench.compiling.run", lambda _: [Cost(2, 3), Cost(1, 1)])
    return calls


def test_who_stops_in_the_middle_keeps_what_is_done_and_nothing_half_written(
    measured: list[Any], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# By hand\n")
    outcome = run("flux", "wan", "--json", tmp_path / "a.json", "--markdown", notes)
    assert outcome.exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "notes.md"]
    assert [model["model"] for model in json.loads((tmp_path / "a.json").read_text())["models"]] == ["FLUX.1-dev"]
    assert notes.read_text().startswith("# By hand\n\n<!-- dicompile bench")


def test_compiling_is_measured_for_everybody_who_compiles(measured: list[Any]) -> None:
    run("flux", "-p", "none", "-a", "eager", "-a", "compile-blocks", "-a", "fewer-steps")
    ((_, options, costs),) = measured
    assert costs == dict.fromkeys(["compile-blocks", "dicompile none"], (Cost(2, 3), Cost(1, 1)))
    assert (options.size, options.steps, options.rounds, options.dtype) == ("reduced", 20, 5, torch.float32)


def test_all_opponents_can_be_asked_for(measured: list[Any]) -> None:
    run("dit", "--no-compiling", "-a", "all", "--full")
    ((_, options, costs),) = measured
    assert {"first-block", "taylorseer", "magcache", "pab", "fastercache", "cache-dit"} < set(options.against)
    assert (costs, options.size) == ({}, "full")


def test_compile_times_are_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = CompileRow("DiT, 12 blocks", "dicompile fora", Cost(20, 30), 0.6, 1.2, 1.0, 1.5)
    monkeypatch.setattr("dicompile.bench.compiling.compile_times", lambda *_: iter([[row]]))
    outcome = run("--compile-times", "dit-12", "--markdown", tmp_path / "a.md")
    assert outcome.exit_code == 0, outcome.output
    assert "0.60x" in outcome.stdout
    assert "| dicompile fora | 20.0 | 30.0 | 0.60x | 1x | 1.20x | 1.5x |" in (tmp_path / "a.md").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "no model 'dlt' to measure" in refused("dlt")
    assert "no opponent 'teacache'" in refused("dit", "-a", "teacache")
    assert "no policy is called 'fora9'" in refused("dit", "-p", "fora9", error=UnknownPolicy)
    assert "no compile times for 'dit'" in refused("--compile-times", "dit")
    assert "options of their own" in refused("--compile-times", "-p", "fora")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused("dit", "--json", tmp_path / "file" / "a.json")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert f"there is no device '{device}'" in refused("dit", "--device", device)
