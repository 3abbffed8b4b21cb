"""store-values: computed branch outputs and token stamps leave the segment, as they are, in one layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dicompile.passes import LocalStep, SlotRef, Value, Weights
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.passes.store_values import StoreValues
from dicompile.plan import Score, ScoreBase, SlotKind, What
from tests.models import Sample
from tests.passes.segments import (
    REUSE,
    TOKENS,
    WIDTH,
    Chain,
    Channels,
    chain,
    cut,
    mlp_block,
    reported,
    rewritten,
    run_segment,
    self_attention_block,
)

VALUE, STAMP = SlotRef(0, SlotKind.VALUE), SlotRef(0, SlotKind.STAMP)
WITH_BOTH = """\
%6: f32[2,16,8] = aten.layer_norm.default(value0, [8])  # blocks.0
%7: f32[2,16,16] = aten.linear.default(%6, value1, value2)  # blocks.0.up
%8: f32[2,16,16] = aten.gelu.default(%7)  # blocks.0
%9: f32[2,16,8] = aten.linear.default(%8, value3, value4)  # blocks.0.down
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
%12: i32[2,16] = aten.zeros.default([2, 16], dtype=torch.int32, device=cpu, pin_memory=False)
return value0 = %11
return value[0] = %9
return stamp[0] = %12"""


def test_the_branch_output_before_its_gate_and_fresh_stamps_leave_the_segment() -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [LocalStep(writes=(VALUE.kind, STAMP.kind))], StoreValues())
    assert "\n".join(str(segment).splitlines()[6:]) == WITH_BOTH
    assert report.changed == ("site 0: value", "site 0: stamp")


@pytest.mark.parametrize("what", [What.CORE, What.UPDATE])
def test_what_is_stored_is_the_fresh_tensor_and_the_output_does_not_change_by_a_bit(what: What) -> None:
    block = mlp_block()
    results = run_segment(
        rewritten(block.segment, [LocalStep(what=what, writes=(VALUE.kind, STAMP.kind))], StoreValues()),
        block.arguments,
    )
    assert torch.equal(results[Value(0)], block.output())
    assert torch.equal(results[VALUE], block.core() if what is What.CORE else block.update())
    assert not results[STAMP].any()


def test_the_output_of_attention_leaves_beside_the_value_whatever_the_value_is() -> None:
    block, attention = self_attention_block(), SlotRef(0, SlotKind.ATTENTION)
    segment = rewritten(block.segment, [LocalStep(writes=(VALUE.kind, attention.kind))], StoreValues())
    results = run_segment(segment, block.arguments)
    assert torch.equal(results[attention], block.peek(block.segment.sites[0].attention[0]))
    assert torch.equal(results[VALUE], block.core())
    assert results[attention].is_contiguous()


def test_a_branch_output_with_another_layout_is_stored_contiguous() -> None:
    block = cut(chain(Channels()))
    assert not block.core().is_contiguous()
    segment = rewritten(block.segment, [LocalStep(writes=(VALUE.kind,))], StoreValues())
    results = run_segment(segment, block.arguments)
    assert results[VALUE].is_contiguous()
    assert torch.equal(results[VALUE], block.core())
    assert torch.equal(results[Value(0)], block.output())
    assert str(segment).count("aten.clone.default") == 1


class Leading(nn.Module):
    """A branch whose output is the first half of a tensor, as one sample leaves joint attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(torch.cat([x, x], dim=1))[:, :TOKENS]


def test_a_part_of_a_larger_tensor_does_not_keep_the_whole_in_memory() -> None:
    block = cut(Sample(Chain(Leading()), {"x": torch.randn(1, TOKENS, WIDTH)}))
    assert block.core().is_contiguous()
    assert block.core().untyped_storage().nbytes() == 2 * block.core().nbytes
    segment = rewritten(block.segment, [LocalStep(writes=(VALUE.kind,))], StoreValues())
    stored = run_segment(segment, block.arguments)[VALUE]
    assert torch.equal(stored, block.core())
    assert stored.untyped_storage().nbytes() == stored.nbytes


def test_a_contiguous_branch_output_is_not_copied() -> None:
    segment = rewritten(mlp_block().segment, [LocalStep(writes=(VALUE.kind,))], StoreValues())
    assert "clone" not in str(segment)


def test_a_blend_stores_the_fresh_value_not_the_blend() -> None:
    block = mlp_block()
    step = LocalStep(weights=(1.0, 1.0), variable=True, writes=(VALUE.kind,))
    old = torch.randn_like(block.core())
    segment = rewritten(block.segment, [step], ReuseSites(), StoreValues())
    results = run_segment(segment, {**block.arguments, VALUE: old, Weights(0): torch.tensor([0.25, 0.75])})
    assert torch.equal(results[VALUE], block.core())
    assert not torch.allclose(results[Value(0)], block.output())


@pytest.mark.parametrize(
    "step",
    [
        REUSE,
        LocalStep(),
        LocalStep(weights=(1.0, 1.0), refresh=Score(ScoreBase.RANDOM), writes=(VALUE.kind, STAMP.kind)),
    ],
    ids=["reused", "computed but never read", "refreshed by tokens, which stores for itself"],
)
def test_nothing_is_stored_for_a_site_that_is(step: LocalStep) -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [step], StoreValues())
    assert str(segment) == str(block.segment)
    assert report.changed == ()
