"""Every script in examples/ runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


class Example(NamedTuple):
    """What keeps a script short, and what it then prints and writes into the folder it runs in."""

    arguments: str
    prints: str
    writes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


EXAMPLES = {
    "fit_demo_forecast.py": Example(
        "--steps 6 --intervals 3 --speedups 2 --runs 1", prints="wrote", writes=("fitted_3.json", "auto_2.json")
    ),
    "measure_auto.py": Example(
        "--runs 1 --samples 1 --steps 11",
        prints="| budcache: stack reused |",
    ),
    "measure_denoisers.py": Example("--runs 1 --samples 1 --steps 11", prints="| half and half, "),
    "measure_time.py": Example("--samples 1 --steps 20 --rounds 1 --backend eager", prints="| 50% of the time |"),
    "own_policy.py": Example("--steps 8", prints="the gate recalled at "),
    "offload.py": Example("--policies fora --steps 4", prints="| fora | 3 full: "),
    "overhead.py": Example("--quick", prints="dit, 28 blocks"),
    "train_demo_classifier.py": Example(
        "--steps 2 --batch 4 --out classifier.safetensors", prints="saved", writes=("classifier.safetensors",)
    ),
    "train_demo_model.py": Example(
        "--steps 2 --batch 4 --out model --checkpoint model.ckpt",
        prints="saved",
        writes=("model/config.json", "model/diffusion_pytorch_model.safetensors", "model/scheduler_config.json"),
        environment=(("TORCHDYNAMO_DISABLE", "1"),),  # torch.compile of the training graph takes a minute
    ),
    "train_demo_predictor.py": Example(
        "--iterations 2 --steps 4 --samples 2 --out predictor.safetensors",
        prints="psnr",
        writes=("predictor.safetensors", "predictor.ckpt", "predictor.jsonl"),
    ),
    "train_demo_router.py": Example(
        "--iterations 2 --steps 4 --samples 2 --out router.safetensors",
        prints="psnr",
        writes=("router.safetensors", "router.json", "router.ckpt", "router.jsonl"),
    ),
}


def test_every_script_is_run_here() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.py")) == sorted(EXAMPLES)


NIGHTLY = ("fit_demo_forecast.py", "measure_auto.py", "measure_denoisers.py", "measure_time.py", "offload.py",
           "overhead.py", "train_demo_classifier.py", "train_demo_model.py", "train_demo_predictor.py",
           "train_demo_router.py")  # fmt: skip
"""Minutes of compiling, training or comparing, of which tests/learn, cli, bench and pipelines test the parts."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in EXAMPLES]
)
def test_it_prints_and_writes_what_it_says(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *example.arguments.split()],
        cwd=tmp_path,
        env=os.environ | dict(example.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert example.prints in done.stdout.lower()
    for file in example.writes:
        assert (tmp_path / file).stat().st_size > 0, file
