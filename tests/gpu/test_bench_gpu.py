"""On a GPU: the same command, with another device and dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicompile.cli.main import app
from tests.gpu.test_variants_gpu import MARKS

pytestmark = MARKS


@pytest.mark.parametrize("model", ["dit", "pixart", "sd3", "flux", "wan", "cogvideox"])
def test_the_benchmark_measures_peak_memory(model: str, tmp_path: Path) -> None:
    command = f"bench {model} --quick --backend eager --device cuda --dtype bfloat16 -p fora -a eager --json"
    outcome = CliRunner().invoke(app, [*command.split(), str(tmp_path / "bench.json")])
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((tmp_path / "bench.json").read_text())
    eager, fora = content["models"][0]["rows"]
    assert eager["memory"]["peak"] > 0
    assert fora["memory"]["held"] == fora["memory"]["planned"] < fora["memory"]["peak"]
