"""narrow-linear: a linear layer computes only the parts that somebody reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dicompile.passes import SlotRef, Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.narrow_linear import NarrowLinear
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.plan import SlotKind
from tests.passes.segments import (
    BATCH,
    FULL,
    REUSE,
    WIDTH,
    Modulated,
    chain,
    cut,
    modulated_block,
    reported,
    rewritten,
    run_segment,
)

LAST_BITS = 1e-6
"""A product with fewer columns may be summed in another order: a few units in the last place of float32."""

GATE_ONLY = """\
value0: f32[2,1,8] = input
value1: f32[24,8] = input
value2: f32[24] = input
value3: f32[2,16,8] = input
value[0]: f32[2,16,8] = input
%5: f32[8,8] = aten.slice.Tensor(value1, 0, 16, 24)  # blocks.0
%6: f32[8] = aten.slice.Tensor(value2, 0, 16, 24)  # blocks.0
%7: f32[2,1,8] = aten.linear.default(value0, %5, %6)  # blocks.0
%8: f32[2,16,8] = aten.mul.Tensor(%7, value[0])  # blocks.0
%9: f32[2,16,8] = aten.add.Tensor(value3, %8)  # blocks.0
return value0 = %9"""


def condition() -> Tensor:
    return torch.randn(BATCH, 1, WIDTH)


def test_a_reused_site_computes_its_gate_and_neither_shift_nor_scale() -> None:
    block = modulated_block()
    segment, reports = reported(block.segment, [REUSE], ReuseSites(), DropDead(), NarrowLinear(), DropDead())
    assert str(segment) == GATE_ONLY
    assert reports[2].changed == ("linear: 1 of 3 parts",)


def test_the_narrow_layer_agrees_with_the_wide_one() -> None:
    block = modulated_block()
    values = {**block.arguments, SlotRef(0, SlotKind.VALUE): block.core()}
    segment = rewritten(block.segment, [REUSE], ReuseSites(), DropDead(), NarrowLinear(), DropDead())
    torch.testing.assert_close(run_segment(segment, values)[Value(0)], block.output(), rtol=LAST_BITS, atol=LAST_BITS)


def test_a_layer_without_bias_can_be_narrowed() -> None:
    block = Modulated()
    block.ada = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    made = cut(chain(block, c=condition()))
    segment = rewritten(made.segment, [REUSE], ReuseSites(), DropDead(), NarrowLinear(), DropDead())
    values = {**made.arguments, SlotRef(0, SlotKind.VALUE): made.core()}
    assert str(segment).count("aten.slice.Tensor") == 1
    torch.testing.assert_close(run_segment(segment, values)[Value(0)], made.output(), rtol=LAST_BITS, atol=LAST_BITS)


def test_a_layer_whose_parts_are_all_read_is_left_alone_with_a_reason() -> None:
    block = modulated_block()
    segment, (report,) = reported(block.segment, [FULL], NarrowLinear())
    assert str(segment) == str(block.segment)
    assert report.skipped == ("linear: all of its parts are read",)


class Split(Modulated):
    """A block that takes its modulation apart in a way of its own."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.take_apart = split

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.take_apart(self.ada(c))
        return x + gate * self.down(self.up(x * (1 + scale) + shift))


def between_tokens(modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale, gate = modulation.unsqueeze(0).expand(3, -1, -1, -1)[..., :WIDTH].split(1)
    return shift[0], scale[0], gate[0]


def also_whole(modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return shift, scale, gate + modulation.mean()


@pytest.mark.parametrize("split", [between_tokens, also_whole])
def test_a_layer_that_is_not_just_cut_into_columns_is_left_alone(
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> None:
    block = cut(chain(Split(split), c=condition()))
    before = rewritten(block.segment, [REUSE], ReuseSites(), DropDead())
    after, reports = reported(block.segment, [REUSE], ReuseSites(), DropDead(), NarrowLinear())
    assert str(after) == str(before)
    assert reports[-1].changed == ()


def test_it_does_not_promise_the_same_bits() -> None:
    assert not NarrowLinear.exact
