"""Every script in examples/ runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "bench.py": ("--quick",),
    "train_demo_classifier.py": ("--steps", "2", "--batch", "4", "--out", "classifier.safetensors"),
    "train_demo_model.py": ("--steps", "2", "--batch", "4", "--out", "model", "--checkpoint", "model.ckpt"),
}
"""Arguments that keep a script short; it runs in an empty folder."""

RESULTS = {
    "train_demo_classifier.py": ("classifier.safetensors",),
    "train_demo_model.py": (
        "model/config.json",
        "model/diffusion_pytorch_model.safetensors",
        "model/scheduler_config.json",
    ),
}
"""Files that it then has written."""


def scripts() -> list[str]:
    return sorted(path.name for path in EXAMPLES.glob("*.py"))


def run_example(name: str, arguments: Sequence[str], folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_has_its_arguments_here() -> None:
    assert set(scripts()) <= set(ARGUMENTS)


@pytest.mark.parametrize("name", scripts())
def test_it_runs_and_writes_what_it_says(name: str, tmp_path: Path) -> None:
    assert run_example(name, ARGUMENTS[name], tmp_path)
    for file in RESULTS.get(name, ()):
        assert (tmp_path / file).stat().st_size > 0, file
