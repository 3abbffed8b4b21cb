"""Two processes of one group end with what a single one ends with, at the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dicompile.errors import InvalidSetting
from dicompile.learn.objective import Objective
from dicompile.learn.predictor import PredictorOptions, PredictorTraining
from dicompile.learn.processes import share
from dicompile.learn.router import RouterOptions, RouterTraining
from dicompile.learn.training import Files, run_to_end
from tests.learn.flows import recorded
from tests.models import PlainDiT, Sample, redraw

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a router and of a predictor with LoRA, each after four iterations of three trajectories."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    sample = Sample(redraw(PlainDiT(layers=2, width=16, size=8)), inputs)
    source = recorded(sample, 4, 3)
    options = RouterOptions(4, Objective(1e-4, "sum"), lr=0.1, batch=3)
    router = RouterTraining(sample.model, source, options)
    of_predictor = PredictorOptions(4, "table", lr=1e-2, batch=3, lora_blocks=1, lora_rank=2)
    predictor = PredictorTraining(sample.model, source, of_predictor)
    for training in (router, predictor):
        run_to_end(training, Files(folder / f"{training.name}.ckpt", folder / f"{training.name}.jsonl"), progress=False)
    made = predictor.predictor()
    adapters = {f"{name} {i}": each for name, pair in made.adapters.items() for i, each in enumerate(pair)}
    return {"logits": router.router().logits, "importance": made.importance, **adapters}


def process(rank: int, folder: str) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    with pytest.raises(InvalidSetting, match="2 processes cannot share a batch of 1"):
        share([0])
    torch.save(trained(Path(folder)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_what_one_ends_with(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = trained(tmp_path / "alone")
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    both: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, expected in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], expected, rtol=1e-3, atol=1e-4)
    for log in ("router.jsonl", "predictor.jsonl"):
        assert len((tmp_path / log).read_text().splitlines()) == 4
