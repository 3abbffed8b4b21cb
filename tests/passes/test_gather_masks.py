"""gather-masks: a mask goes to other ranks as bytes, and Inductor compiles what reads it; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_gather_tensor

from dicompile.lower import Backend, compile_segment
from dicompile.passes import Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.gather_masks import GatherMasks
from tests.passes.segments import FULL, Mlp, chain, cut, reported, run_segment


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Gathered(Mlp):
    """An MLP of the positive numbers of its input, as all ranks have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        mask = all_gather_tensor((x > 0).to(self.dtype), 0, distributed.group.WORLD)
        return x + self.down(F.gelu(self.up(torch.where(mask > 0, x, 0))))


def test_masks_are_gathered_as_bytes_and_compiled() -> None:
    found = cut(chain(Gathered(torch.bool)))
    segment, reports = reported(found.segment, [FULL], GatherMasks(), DropDead())
    assert len(reports[0].changed) == 1
    lines = [line.partition(": ")[2].partition("[")[0] + line.partition("=")[2].split("(")[0]
             for line in str(segment).splitlines() if "c10d" in line or "_to_copy" in line]  # fmt: skip
    assert lines[-4:] == [
        "u8 aten._to_copy.default",
        "u8 _c10d_functional.all_gather_into_tensor.default",
        "u8 _c10d_functional.wait_tensor.default",
        "b8 aten._to_copy.default",
    ]
    assert torch.equal(run_segment(segment, found.arguments)[Value(0)], found.output())
    segment.graph_module.recompile()
    compiled = compile_segment(segment, Backend())(*(found.arguments[item] for item in segment.inputs))
    torch.testing.assert_close(compiled[0], found.output())


def test_what_is_no_mask_is_gathered_as_it_is() -> None:
    found = cut(chain(Gathered(torch.float32)))
    segment, reports = reported(found.segment, [FULL], GatherMasks())
    assert not reports[0].changed
    assert str(segment) == str(found.segment)
