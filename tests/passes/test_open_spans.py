"""open-spans: what a block adds to its stream becomes a node where it is stored or reused, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from dicompile.passes import LocalStep, SlotRef, Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.open_spans import OpenSpans
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.passes.store_values import StoreValues
from dicompile.plan import SlotKind, What
from tests.passes.segments import FULL, Both, Cut, Mlp, chain, cut, reported, rewritten, run_segment

SKIP = LocalStep(weights=(0.0,))
STORED = LocalStep(what=What.UPDATE, writes=(SlotKind.VALUE,))
REUSED = LocalStep(weights=(0.0, 1.0), what=What.UPDATE)
FLOAT32 = 1e-6
"""The update is a difference of the streams: it is added again with an error of one rounding."""

BEFORE = """\
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
return value0 = %11"""
STORING = """\
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
%12: f32[2,16,8] = aten.sub.Tensor(%11, value0)
return value0 = %11"""
REUSING = """\
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
%12: f32[2,16,8] = aten.sub.Tensor(%11, value0)
%13: f32[2,16,8] = aten.add.Tensor(value0, %12)
return value0 = %13"""
REUSED_TEXT = """\
value0: f32[2,16,8] = input
value[2]: f32[2,16,8] = input
%2: f32[2,16,8] = aten.add.Tensor(value0, value[2])
return value0 = %2"""


@pytest.fixture(scope="module")
def block() -> Cut:
    """Attention and MLP, and the block that they are."""
    return cut(chain(Both()), with_span=True)


def test_an_update_is_the_stream_at_the_end_minus_the_stream_at_the_start() -> None:
    mlp = cut(chain(Mlp()), with_span=True)
    assert str(mlp.segment).endswith(BEFORE)
    for step, text in ((STORED, STORING), (REUSED, REUSING)):
        segment, (report,) = reported(mlp.segment, [SKIP, step], OpenSpans())
        assert str(segment).endswith(text)
        assert report.changed == ("span 1",)


def test_storing_the_update_of_a_block_changes_no_bit_of_its_output(block: Cut) -> None:
    segment = rewritten(block.segment, [FULL, FULL, STORED], OpenSpans(), StoreValues())
    results = run_segment(segment, block.arguments)
    assert torch.equal(results[Value(0)], block.output())
    update = results[SlotRef(2, SlotKind.VALUE)]
    assert torch.equal(update, block.output() - block.peek(block.segment.sites[0].stream))


def test_reusing_it_adds_it_to_the_current_stream_and_runs_nothing(block: Cut) -> None:
    segment = rewritten(block.segment, [SKIP, SKIP, REUSED], OpenSpans(), ReuseSites(), DropDead())
    assert str(segment).replace("  # blocks.0", "") == REUSED_TEXT
    stream, stored = block.arguments[Value(0)], torch.randn_like(block.output())
    results = run_segment(segment, {Value(0): stream, SlotRef(2, SlotKind.VALUE): stored})
    assert torch.equal(results[Value(0)], stream + stored)


def test_what_was_stored_gives_back_what_was_computed(block: Cut) -> None:
    stored = run_segment(rewritten(block.segment, [FULL, FULL, STORED], OpenSpans(), StoreValues()), block.arguments)[
        SlotRef(2, SlotKind.VALUE)
    ]
    segment = rewritten(block.segment, [SKIP, SKIP, REUSED], OpenSpans(), ReuseSites(), DropDead())
    results = run_segment(segment, {**block.arguments, SlotRef(2, SlotKind.VALUE): stored})
    torch.testing.assert_close(results[Value(0)], block.output(), rtol=FLOAT32, atol=FLOAT32)


def test_of_two_blocks_in_one_segment_the_second_adds_to_what_the_first_gave() -> None:
    two = cut(chain(Both(), Both()), count=2, with_span=True)
    segment = rewritten(two.segment, [SKIP] * 4 + [REUSED] * 2, OpenSpans(), ReuseSites(), DropDead())
    stream = two.arguments[Value(0)]
    first, second = torch.randn_like(stream), torch.randn_like(stream)
    stored = {SlotRef(4, SlotKind.VALUE): first, SlotRef(5, SlotKind.VALUE): second}
    results = run_segment(segment, {Value(0): stream, **stored})
    assert torch.equal(results[Value(0)], stream + first + second)


def test_a_reused_stream_needs_no_update(block: Cut) -> None:
    step = LocalStep(weights=(0.0, 1.0), what=What.STREAM)
    segment, (opened, *_) = reported(block.segment, [SKIP, SKIP, step], OpenSpans(), ReuseSites(), DropDead())
    assert opened.changed == ()
    assert len(segment.inputs) == 1
    stored = torch.randn_like(block.output())
    assert torch.equal(run_segment(segment, {SlotRef(2, SlotKind.VALUE): stored})[Value(0)], stored)


@pytest.mark.parametrize(
    "steps",
    [
        [FULL, FULL, FULL],
        [FULL, FULL, LocalStep(what=What.UPDATE)],  # computed, and nobody reads it later
        [FULL, LocalStep(what=What.UPDATE, writes=(SlotKind.VALUE,)), FULL],  # a branch has its update
    ],
)
def test_a_span_of_which_nothing_is_kept_is_left_alone(block: Cut, steps: list[LocalStep]) -> None:
    segment, (report,) = reported(block.segment, steps, OpenSpans())
    assert str(segment) == str(block.segment)
    assert report.changed == ()
