"""drop-dead: what no output needs goes, inputs included; what an output needs stays."""

from __future__ import annotations

import torch

from dicompile.passes import SlotRef, Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.plan import SlotKind
from tests.passes.segments import FULL, REUSE, mlp_block, reported, rewritten, run_segment

AFTER_REUSE = """\
value0: f32[2,16,8] = input
value5: f32[8] = input
value[0]: f32[2,16,8] = input
%3: f32[2,16,8] = aten.mul.Tensor(value5, value[0])  # blocks.0
%4: f32[2,16,8] = aten.add.Tensor(value0, %3)  # blocks.0
return value0 = %4"""


def test_a_reused_branch_disappears_with_the_weights_that_only_it_reads() -> None:
    block = mlp_block()
    segment, reports = reported(block.segment, [REUSE], ReuseSites(), DropDead())
    assert str(segment) == AFTER_REUSE
    assert reports[-1].changed == ("8 nodes",)
    assert segment.inputs == [Value(0), Value(5), SlotRef(0, SlotKind.VALUE)]


def test_results_do_not_change_by_a_bit() -> None:
    block = mlp_block()
    values = {**block.arguments, SlotRef(0, SlotKind.VALUE): torch.randn_like(block.core())}
    with_dead = run_segment(rewritten(block.segment, [REUSE], ReuseSites()), values)
    without = run_segment(rewritten(block.segment, [REUSE], ReuseSites(), DropDead()), values)
    assert torch.equal(with_dead[Value(0)], without[Value(0)])


def test_a_segment_of_which_nothing_is_needed_becomes_empty() -> None:
    segment = rewritten(mlp_block().segment, [FULL], DropDead(), live=())
    assert str(segment) == ""
    assert segment.inputs == []


def test_a_segment_without_dead_nodes_is_left_alone() -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [FULL], DropDead())
    assert str(segment) == str(block.segment)
    assert report.changed == ()
