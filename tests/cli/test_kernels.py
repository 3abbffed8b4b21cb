"""``dicompile inspect --kernels``: refused by name where it cannot be done; a row per policy and kind of step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from dicompile.cli.kernels import VERSION, check_can_count, kernel_table
from dicompile.cli.show import make_console
from dicompile.config import environment_with
from tests.cli.terminal import check_fits, error_of

has_internals = pytest.mark.skipif(not torch.__version__.startswith(VERSION), reason=f"needs torch {VERSION}*")


def test_without_triton_it_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    error = error_of(capsys, monkeypatch, "inspect", "demo", "--kernels")
    assert "kernels cannot be counted without triton" in error
    assert "pip install 'dicompile[triton]'" in error


def test_with_another_torch_it_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: "there")
    error = error_of(capsys, monkeypatch, "inspect", "demo", "--kernels")
    assert "kernels cannot be counted with torch 2.99.0" in error


@has_internals
def test_a_step_launches_what_its_calls_do() -> None:
    from dicompile.bench.deviceless import Lowered, Row

    call = Lowered({"triton": 3, "gemm": 2, "attention": 1, "received": 1, "sort": 1}, 1, 0, 100, 80, {})
    assert Row.of("toca", "all", "full", [call, call]) == Row("toca", "all", "full", 8, 6, 2, 2, 200, 160)


@has_internals
def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dicompile.bench.deviceless import Row

    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        Row("torch.compile", "off", "full", 1234, 1234, 157, 12, 10**9, 10**9),
        Row("toca", "all", "partial", 1234, 1234, 157, 12, 10**9, 10**9),
    ]
    make_console().print(kernel_table(rows))
    text = capsys.readouterr().out
    check_fits(text, 80)
    assert "torch.compile full" in text


@pytest.mark.nightly
@has_internals
def test_kernels_of_a_model_are_counted_in_a_process_of_its_own() -> None:
    check_can_count()
    command = [
        sys.executable,
        "-m",
        "dicompile",
        "inspect",
        "demo",
        "--kernels",
        "-p",
        "fora",
        "--steps",
        "6",
        "--json",
    ]
    environment = environment_with({"DICOMPILE_CACHE_DIR": "off"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["kernels"]
    assert [(row["policy"], row["step"]) for row in rows] == [
        ("torch.compile", "full"), ("fora", "full"), ("fora", "reuse"),
    ]  # fmt: skip
    uncached, full, reuse = rows
    assert uncached["attention"] == full["attention"] == 8
    assert reuse["attention"] == 0
    assert 0 < reuse["triton"] < full["triton"] < uncached["triton"]
    assert all(0 < row["least"] <= row["bytes"] for row in rows)
