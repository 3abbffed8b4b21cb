"""``dicompile train-predictor``, from the command line to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from typer.testing import CliRunner

from dicompile.cli.main import app
from dicompile.policies import TokenCache, load_predictor
from tests.models import PlainDiT, redraw


def factory() -> tuple[Any, dict[str, Any], Any]:
    model = redraw(PlainDiT(layers=3, width=16, size=8))
    inputs = {"x": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2, dtype=torch.long), "y": torch.tensor([1, 2])}
    return model, inputs, FlowMatchEulerDiscreteScheduler()


def test_a_predictor_with_lora_weights_is_trained_and_resumed(tmp_path: Path) -> None:
    save_file({"latents": torch.randn(6, 4, 8, 8), "y": torch.arange(6)}, tmp_path / "l.safetensors")
    out = tmp_path / "p.safetensors"
    spelled = f"{__name__}:factory" if __name__.startswith("tests.") else "tests.cli.test_predictor:factory"
    arguments = ["train-predictor", spelled, "--data", tmp_path / "l.safetensors", "--out", out, "--steps", 3]
    arguments += ["--iterations", 2, "--kind", "table", "--lora-blocks", 2, "--lora-rank", 3]
    for more in ([], ["--resume"]):
        result = CliRunner().invoke(app, [str(each) for each in (*arguments, *more)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert "1.00 1.00" in result.stdout, "the last two blocks of every step"
        known = load_predictor(out)
        assert (known.facts.adapted, known.facts.iterations, len(known.adapters)) == (2, 2, 8)
        assert {adapter.rank for adapter in known.adapters.values()} == {3}
    assert TokenCache(out).rules[0].do.counts[1][1:] == (16, 16)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2
