"""On a GPU: weights that are brought part by part give the same bits, and leave the GPU; the host does not wait."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor

import dicompile
from tests.gpu.test_variants_gpu import DEVICE, MARKS, latents, model_and_inputs, scheduler, waiting_is_an_error

pytestmark = MARKS

BLOCKS: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAVES: dict[str, Any] = {"offload_type": "leaf_level"}


def grouped(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, folder: apply_group_offloading(model, torch.device(DEVICE), torch.device("cpu"), **options)


HOW: dict[str, Callable[[Any, Path], Any]] = {
    "blocks": grouped(**BLOCKS),
    "blocks, stream": grouped(use_stream=True, **BLOCKS),
    "leaves, stream": grouped(use_stream=True, record_stream=True, **LEAVES),
    "leaves, low memory": grouped(use_stream=True, low_cpu_mem_usage=True, **LEAVES),
    "disk": lambda model, folder: grouped(offload_to_disk_path=f"{folder}", **BLOCKS)(model, folder),
    "sequential": lambda model, folder: accelerate.cpu_offload(model, DEVICE, offload_buffers=True),
    "sequential, disk": lambda model, folder: accelerate.disk_offload(model, f"{folder}", DEVICE, offload_buffers=True),
}


class Sampling:
    """A model whose weights lie elsewhere, if so asked, with inputs that do not depend on what it returns."""

    def __init__(self, how: str | None = None, folder: Path = Path(), mode: str = "inductor") -> None:
        torch.manual_seed(0)
        self.original, self.inputs = model_and_inputs(torch.float32)
        if how is not None:
            HOW[how](self.original.to("cpu"), folder)
        self.scheduler, self.latents = scheduler(), latents(torch.float32)
        self.model = dicompile.optimize(self.original, "fora", schedule=self.scheduler, mode=mode)

    def run(self) -> list[Tensor]:
        pairs = zip(self.scheduler.timesteps, self.latents, strict=True)
        return [self.model(**self.inputs | {"hidden_states": x, "timestep": t.expand(4)})[0] for t, x in pairs]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_the_same_bits_wherever_the_weights_are(how: str, mode: str, tmp_path: Path) -> None:
    wanted = Sampling(mode=mode).run()
    moved = Sampling(how, tmp_path, mode)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(moved.run(), wanted, strict=True))
    report = dicompile.report(moved.model)
    assert report.fetched_bytes["reuse"] / report.kinds["reuse"] < report.fetched_bytes["full"] / report.kinds["full"]
    dicompile.disable(moved.model)  # the hooks run again
    plain = Sampling(mode=mode)
    dicompile.disable(plain.model)
    torch.testing.assert_close(moved.run(), plain.run(), rtol=1e-4, atol=1e-4)


def test_weights_leave_the_gpu(tmp_path: Path) -> None:
    moved = Sampling("blocks, stream", tmp_path)
    moved.run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, total = torch.cuda.memory_allocated(), sum(weight.nbytes for weight in moved.original.parameters())
    moved.run()
    assert torch.cuda.memory_allocated() < before + total / 4
    assert all(weight.device.type == "cpu" for weight in moved.original.parameters())


def test_nothing_waits_where_weights_are_pinned(tmp_path: Path) -> None:
    moved = Sampling("blocks, stream", tmp_path)
    moved.run()
    with waiting_is_an_error():
        moved.run()
