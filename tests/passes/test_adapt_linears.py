"""LoRA weights beside linear layers: as graph text, against merged weights, and where there are none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dicompile.analysis import analyse
from dicompile.passes import Value, adaptable, outline, parameters_of, with_adapters
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.outline import Outline
from dicompile.passes.reuse_sites import ReuseSites
from tests.models import capture, flux
from tests.passes.segments import BATCH, REUSE, WIDTH, Mlp, Modulated, chain, cut, rewritten, run_segment

ADAPTED = """\
value0: f32[2,16,8] = input
value1: f32[16,8] = input
value2: f32[16] = input
value3: f32[8,16] = input
value4: f32[8] = input
value5: f32[8] = input
value6: f32[3,16] = input
value7: f32[8,3] = input
%8: f32[2,16,8] = aten.layer_norm.default(value0, [8])  # blocks.0
%9: f32[2,16,16] = aten.linear.default(%8, value1, value2)  # blocks.0.up
%10: f32[2,16,16] = aten.gelu.default(%9)  # blocks.0
%11: f32[2,16,8] = aten.linear.default(%10, value3, value4)  # blocks.0.down
%12: f32[2,16,3] = aten.linear.default(%10, value6)  # blocks.0.down
%13: f32[2,16,8] = aten.linear.default(%12, value7)  # blocks.0.down
%14: f32[2,16,8] = aten.add.Tensor(%11, %13)  # blocks.0.down
%15: f32[2,16,8] = aten.mul.Tensor(value5, %14)  # blocks.0
%16: f32[2,16,8] = aten.add.Tensor(value0, %15)  # blocks.0
return value0 = %16"""


class Adapted:
    """A chain of one block, cut out, with LoRA weights beside some of its layers."""

    def __init__(self, block: nn.Module, ranks: dict[str, int], c: Tensor | None = None) -> None:
        self.sample = chain(block, c=c)
        self.capture = capture(self.sample)
        self.structure = analyse(self.capture)
        nodes = {node.name: node for node in self.capture.graph.nodes}
        (only,) = self.structure.blocks
        sites = self.structure.sites_of(only)
        self.plain: Outline = outline(self.capture, self.structure, [nodes[name] for name in only.nodes], sites)
        self.made = with_adapters(self.plain, parameters_of(self.capture), ranks)


def test_a_layer_becomes_the_sum_of_itself_and_of_its_lora() -> None:
    made = Adapted(Mlp(), {"blocks.0.down.weight": 3}).made
    assert str(made.segment) == ADAPTED
    assert made.inputs[-2:] == ("blocks.0.down.weight:down", "blocks.0.down.weight:up")
    assert made.segment.owned >= {6, 7}


def test_it_computes_what_merged_weights_compute() -> None:
    ranks = {"down.weight": 3, "up.weight": 2}
    made = Adapted(Mlp(), {f"blocks.0.{name}": rank for name, rank in ranks.items()})
    drawn: dict[str, Tensor] = {}
    merged = copy.deepcopy(made.sample.model)
    for name, rank in ranks.items():
        weight = merged.get_parameter(f"blocks.0.{name}").data
        down, up = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
        weight += up @ down
        drawn |= {f"blocks.0.{name}:down": down, f"blocks.0.{name}:up": up}
    values = {Value(i): drawn[name] for i, name in enumerate(made.made.inputs) if name in drawn}
    found = run_segment(made.made.segment, cut(made.sample).arguments | values)[Value(0)]
    torch.testing.assert_close(found, merged(**made.sample.inputs).detach(), atol=1e-5, rtol=1e-5)


def test_passes_see_one_more_part_of_the_branch() -> None:
    """A reused branch runs neither the layer nor its LoRA, and the value that is stored has both."""
    made = Adapted(Mlp(), {"blocks.0.down.weight": 3}).made
    assert "aten.linear" not in str(rewritten(made.segment, [REUSE], ReuseSites(), DropDead()))
    assert made.segment.sites[0].core.target is torch.ops.aten.add.Tensor


def test_a_piece_without_such_a_layer_is_left_alone() -> None:
    made = Adapted(Mlp(), {"blocks.1.down.weight": 3})
    assert made.made is made.plain


def test_only_layers_that_the_latent_reaches_can_be_adapted() -> None:
    made = Adapted(Modulated(), {}, c=torch.randn(BATCH, 1, WIDTH))
    found = adaptable(made.capture, made.structure, made.structure.blocks)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {
        "blocks.0.up.weight": (2 * WIDTH, WIDTH), "blocks.0.down.weight": (WIDTH, 2 * WIDTH),
    }  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.sampled
def test_of_the_last_blocks_every_layer_on_the_way_of_text_and_picture(count: int) -> None:
    captured = capture(flux(layers=2))
    structure = analyse(captured)
    found = adaptable(captured, structure, structure.blocks[len(structure.blocks) - count :])
    blocks = {name.partition(".attn")[0].partition(".proj")[0] for name in found}
    assert blocks == {f"single_transformer_blocks.{number}" for number in range(2 - count, 2)}
    assert not any("norm" in name for name in found)
