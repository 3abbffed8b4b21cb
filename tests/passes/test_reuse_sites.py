"""reuse-sites: a site's value is the plan's linear combination of fresh and stored values."""

from __future__ import annotations

import pytest
import torch

from dicompile.passes import LocalStep, SlotRef, Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.plan import SlotKind, What
from tests.passes.segments import (
    FULL,
    REUSE,
    Channels,
    Cut,
    chain,
    cross_attention_block,
    cut,
    mlp_block,
    reported,
    rewritten,
    run_segment,
)


def slot(age: int = 0, position: int = 0) -> SlotRef:
    return SlotRef(position, SlotKind.VALUE, age)


@pytest.fixture
def block() -> Cut:
    return mlp_block()


FORECAST = """\
value0: f32[2,16,8] = input
value5: f32[8] = input
value[0]: f32[2,16,8] = input
value[0]-1: f32[2,16,8] = input
%4: f32[2,16,8] = aten.mul.Tensor(value[0], 1.5)  # blocks.0
%5: f32[2,16,8] = aten.mul.Tensor(value[0]-1, -0.5)  # blocks.0
%6: f32[2,16,8] = aten.add.Tensor(%4, %5)  # blocks.0
%7: f32[2,16,8] = aten.mul.Tensor(value5, %6)  # blocks.0
%8: f32[2,16,8] = aten.add.Tensor(value0, %7)  # blocks.0
return value0 = %8"""
BLEND = """\
%10: f32[2,16,8] = aten.linear.default(%9, value3, value4)  # blocks.0.down
%11: f32[2,16,8] = aten.mul.Tensor(%10, 0.25)  # blocks.0
%12: f32[2,16,8] = aten.mul.Tensor(value[0], 0.75)  # blocks.0
%13: f32[2,16,8] = aten.add.Tensor(%11, %12)  # blocks.0
%14: f32[2,16,8] = aten.mul.Tensor(value5, %13)  # blocks.0
%15: f32[2,16,8] = aten.add.Tensor(value0, %14)  # blocks.0
return value0 = %15"""
UPDATE = """\
value0: f32[2,16,8] = input
value[0]: f32[2,16,8] = input
%2: f32[2,16,8] = aten.add.Tensor(value0, value[0])  # blocks.0
return value0 = %2"""


def test_reusing_what_would_be_computed_changes_no_bit(block: Cut) -> None:
    segment = rewritten(block.segment, [REUSE], ReuseSites(), DropDead())
    assert torch.equal(run_segment(segment, {**block.arguments, slot(): block.core()})[Value(0)], block.output())


def test_a_reused_site_still_gets_the_gate_of_the_current_step(block: Cut) -> None:
    segment = rewritten(block.segment, [REUSE], ReuseSites(), DropDead())
    stored = torch.randn_like(block.core())
    gate, stream = block.arguments[Value(5)], block.arguments[Value(0)]
    with torch.no_grad():
        assert torch.equal(run_segment(segment, {**block.arguments, slot(): stored})[Value(0)], stream + gate * stored)


def test_a_forecast_is_a_weighted_sum_of_stored_values(block: Cut) -> None:
    segment, reports = reported(block.segment, [LocalStep(weights=(0.0, 1.5, -0.5))], ReuseSites(), DropDead())
    assert str(segment) == FORECAST
    assert reports[0].changed == ("site 0: 1.5 h1 + -0.5 h2",)
    newest, older = torch.randn_like(block.core()), torch.randn_like(block.core())
    result = run_segment(segment, {**block.arguments, slot(0): newest, slot(1): older})[Value(0)]
    with torch.no_grad():
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * (newest * 1.5 + older * -0.5)
    assert torch.equal(result, expected)


def test_a_weight_of_zero_reads_no_slot(block: Cut) -> None:
    segment = rewritten(block.segment, [LocalStep(weights=(0.0, 0.0, 1.0))], ReuseSites(), DropDead())
    assert segment.inputs == [Value(0), Value(5), slot(1)]


def test_a_blend_adds_a_share_of_the_stored_value_to_a_share_of_the_fresh_one(block: Cut) -> None:
    segment = rewritten(block.segment, [LocalStep(weights=(0.25, 0.75))], ReuseSites(), DropDead())
    assert str(segment).endswith(BLEND)
    stored = torch.randn_like(block.core())
    result = run_segment(segment, {**block.arguments, slot(): stored})[Value(0)]
    with torch.no_grad():
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * (block.core() * 0.25 + stored * 0.75)
    assert torch.equal(result, expected)


def test_a_stored_update_replaces_the_gate_too(block: Cut) -> None:
    step = LocalStep(weights=(0.0, 1.0), what=What.UPDATE)
    segment = rewritten(block.segment, [step], ReuseSites(), DropDead())
    assert str(segment) == UPDATE
    assert torch.equal(run_segment(segment, {**block.arguments, slot(): block.update()})[Value(0)], block.output())


def test_a_reused_value_lies_in_memory_as_the_computed_one_does() -> None:
    block = cut(chain(Channels()))
    computed, segment = block.core(), rewritten(block.segment, [REUSE], ReuseSites(), DropDead())
    assert [line.split(" = ")[1].split("(")[0] for line in str(segment).splitlines()[2:-1]] == [
        "aten.permute.default", "aten.clone.default", "aten.permute.default", "aten.add.Tensor",
    ]  # fmt: skip
    add = segment.sites[0].add
    assert add.all_input_nodes[1].meta["val"].stride() == computed.stride()
    result = run_segment(segment, {**block.arguments, slot(): computed.contiguous()})[Value(0)]
    assert torch.equal(result, block.output())
    assert result.stride() == block.output().stride()


def test_attention_is_gone_when_its_site_is_reused() -> None:
    block = cross_attention_block()
    segment = rewritten(block.segment, [REUSE], ReuseSites(), DropDead())
    assert "attention" not in str(segment)
    assert torch.equal(run_segment(segment, {**block.arguments, slot(): block.core()})[Value(0)], block.output())


def test_a_computed_site_is_left_alone(block: Cut) -> None:
    segment, (report,) = reported(block.segment, [FULL], ReuseSites())
    assert str(segment) == str(block.segment)
    assert report.changed == ()
