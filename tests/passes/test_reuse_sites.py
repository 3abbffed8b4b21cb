"""reuse-sites: a site's value is the plan's linear combination of fresh and stored values."""

from __future__ import annotations

import pytest
import torch

from dicompile.passes import LocalStep, SlotRef, Value, Weights
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.plan import SlotKind, What
from tests.passes.segments import (
    BATCH,
    FULL,
    REUSE,
    TOKENS,
    Channels,
    Cut,
    chain,
    cross_attention_block,
    cut,
    mlp_block,
    reported,
    rewritten,
    run_segment,
    self_attention_block,
)

WEIGHTS = Weights(0)


def slot(age: int = 0, position: int = 0) -> SlotRef:
    return SlotRef(position, SlotKind.VALUE, age)


@pytest.fixture
def block() -> Cut:
    return mlp_block()


FORECAST = """\
value0: f32[2,16,8] = input
value5: f32[8] = input
value[0]: f32[2,16,8] = input
weights[0]: f32[3] = input
value[0]-1: f32[2,16,8] = input
%5: f32[] = aten.select.int(weights[0], 0, 1)  # blocks.0
%6: f32[2,16,8] = aten.mul.Tensor(value[0], %5)  # blocks.0
%7: f32[] = aten.select.int(weights[0], 0, 2)  # blocks.0
%8: f32[2,16,8] = aten.mul.Tensor(value[0]-1, %7)  # blocks.0
%9: f32[2,16,8] = aten.add.Tensor(%6, %8)  # blocks.0
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
return value0 = %11"""
BLEND = """\
%11: f32[2,16,8] = aten.linear.default(%10, value3, value4)  # blocks.0.down
%12: f32[] = aten.select.int(weights[0], 0, 1)  # blocks.0
%13: f32[2,16,8] = aten.mul.Tensor(value[0], %12)  # blocks.0
%14: f32[] = aten.select.int(weights[0], 0, 0)  # blocks.0
%15: f32[2,16,8] = aten.mul.Tensor(%11, %14)  # blocks.0
%16: f32[2,16,8] = aten.add.Tensor(%15, %13)  # blocks.0
%17: f32[2,16,8] = aten.mul.Tensor(value5, %16)  # blocks.0
%18: f32[2,16,8] = aten.add.Tensor(value0, %17)  # blocks.0
return value0 = %18"""
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
    segment, reports = reported(block.segment, [LocalStep((0.0, 1.0, 1.0), variable=True)], ReuseSites(), DropDead())
    assert str(segment) == FORECAST
    assert reports[0].changed == ("site 0: 1 h1 + 1 h2",)
    newest, older = torch.randn_like(block.core()), torch.randn_like(block.core())
    values = {**block.arguments, slot(0): newest, slot(1): older, WEIGHTS: torch.tensor([0.0, 1.5, -0.5])}
    result = run_segment(segment, values)[Value(0)]
    with torch.no_grad():
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * (newest * 1.5 + older * -0.5)
    assert torch.equal(result, expected)


def test_a_weight_of_zero_reads_no_slot(block: Cut) -> None:
    segment = rewritten(block.segment, [LocalStep(weights=(0.0, 0.0, 1.0))], ReuseSites(), DropDead())
    assert segment.inputs == [Value(0), Value(5), slot(1)]


def test_a_blend_adds_a_share_of_the_stored_value_to_a_share_of_the_fresh_one(block: Cut) -> None:
    segment = rewritten(block.segment, [LocalStep((1.0, 1.0), variable=True)], ReuseSites(), DropDead())
    assert str(segment).endswith(BLEND)
    stored = torch.randn_like(block.core())
    values = {**block.arguments, slot(): stored, WEIGHTS: torch.tensor([0.25, 0.75])}
    result = run_segment(segment, values)[Value(0)]
    with torch.no_grad():
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * (block.core() * 0.25 + stored * 0.75)
    assert torch.equal(result, expected)


def test_weights_may_differ_between_tokens() -> None:
    block = mlp_block()
    step = LocalStep((1.0, 1.0), variable=True, per_token=True)
    segment = rewritten(block.segment, [step], ReuseSites(), DropDead())
    stored, share = torch.randn_like(block.core()), torch.rand(BATCH, TOKENS, 1)
    values = {**block.arguments, slot(): stored, WEIGHTS: torch.stack([share, 1 - share])}
    with torch.no_grad():
        blend = block.core() * share + stored * (1 - share)
        expected = block.arguments[Value(0)] + block.arguments[Value(5)] * blend
    torch.testing.assert_close(run_segment(segment, values)[Value(0)], expected)


def test_stored_attention_replaces_attention_and_is_projected_anew() -> None:
    block, attention = self_attention_block(), SlotRef(0, SlotKind.ATTENTION)
    step = LocalStep((0.0, 1.0), what=What.ATTENTION, attention=0)
    segment = rewritten(block.segment, [step], ReuseSites(), DropDead())
    assert "attention.default" not in str(segment)
    assert str(segment).count("aten.linear.default") == 1
    stored = block.peek(block.segment.sites[0].attention[0])
    assert torch.equal(run_segment(segment, {**block.arguments, attention: stored})[Value(0)], block.output())


def test_the_first_site_of_a_shared_attention_replaces_it_for_all() -> None:
    step = LocalStep((0.0, 1.0), what=What.ATTENTION, attention=1)
    segment, (report,) = reported(self_attention_block().segment, [step], ReuseSites())
    assert str(segment) == str(self_attention_block().segment)
    assert report.changed == ()


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
