"""The service in examples/serve: its engine by itself, and under load on Ray where that is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dicompile
from dicompile.demo.sample import load_model, load_scheduler
from tests.serve.clients import at_once

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "serve"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("engine", FOLDER / "engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engine", module)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_that_of_its_single_run(engine: ModuleType) -> None:
    service = engine.Engine(sizes=(1, 2), backend="eager")
    orders = [engine.Order(label, label, 5, tier) for label, tier in enumerate(("fast", "fast", "balanced"))]

    def serve(order: object) -> torch.Tensor:
        request, pictures = service.open(order)
        with request:
            *_, picture = pictures
        return picture

    found = at_once(*[lambda order=order: serve(order) for order in orders])
    for order, picture in zip(orders, found, strict=True):
        scheduler = load_scheduler()
        scheduler.set_timesteps(order.steps)
        model = dicompile.optimize(load_model(), engine.TIERS[order.tier], schedule=scheduler, backend="eager")
        *_, alone = engine.sampled(model, scheduler, order)
        torch.testing.assert_close(picture, alone, rtol=1e-3, atol=1e-3)
    assert service.batcher.served().cache_bytes == 0


def test_under_load_every_finished_picture_is_that_of_its_single_run() -> None:
    """With cancellations, and a replica that is killed; the script asserts that nothing is left behind."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: its 60 packages are an extra of the example alone (dicompile[serve])")
    command = [sys.executable, "load_test.py", "--requests", "12", "--at-once", "4", "--undisturbed", "4"]
    usual = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **usual, "RAY_worker_niceness": "0"}  # by default replicas give way to everything else
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| disturbed |" in done.stdout
    assert "edges: 3 previews" in done.stdout
