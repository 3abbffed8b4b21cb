"""narrow-slots: what is stored takes fewer bits, what a step computes itself is not rounded by a bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.passes import PASSES, Chosen, LocalStep, Noise, SlotRef, TokenCount, Value, Weights
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.narrow_slots import NarrowSlots
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.passes.store_values import StoreValues
from dicompile.plan import DTYPES, Context, Score, ScoreBase, SlotKind, What
from tests.passes.segments import (
    BATCH,
    HEADS,
    TOKENS,
    WIDTH,
    Channels,
    Parallel,
    chain,
    cut,
    mlp_block,
    reported,
    rewritten,
    run_segment,
)

VALUE, SCALE = SlotRef(0, SlotKind.VALUE), SlotRef(0, SlotKind.VALUE_SCALE)
ATTENTION, ATTENTION_SCALE = SlotRef(0, SlotKind.ATTENTION), SlotRef(0, SlotKind.ATTENTION_SCALE)
STORE = (StoreValues(), NarrowSlots(), DropDead())
READ = (ReuseSites(), NarrowSlots(), DropDead())
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11, "float8_e4m3fn": 2**-4}
"""Largest relative error of a rounded number: half a unit in the last place."""
SCALED = ["float16", "float8_e4m3fn"]
every_dtype = pytest.mark.parametrize("name", DTYPES)

WRITES = """\
%9: f32[2,16,8] = aten.linear.default(%8, value3, value4)  # blocks.0.down
%10: f32[2,16,8] = aten.mul.Tensor(value5, %9)  # blocks.0
%11: f32[2,16,8] = aten.add.Tensor(value0, %10)  # blocks.0
%12: bf16[2,16,8] = aten._to_copy.default(%9, dtype=torch.bfloat16)
return value0 = %11
return value[0] = %12"""
READS = """\
value0: f32[2,16,8] = input
value5: f32[8] = input
value[0]: f8e4m3fn[2,16,8] = input
value-scale[0]: f32[2,16,1] = input
%4: f32[2,16,8] = aten._to_copy.default(value[0], dtype=torch.float32)  # blocks.0
%5: f32[2,16,8] = aten.mul.Tensor(%4, value-scale[0])  # blocks.0
%6: f32[2,16,8] = aten.mul.Tensor(value5, %5)  # blocks.0
%7: f32[2,16,8] = aten.add.Tensor(value0, %6)  # blocks.0
return value0 = %7"""


def storing(name: str | None, **others: Any) -> LocalStep:
    return LocalStep(writes=(SlotKind.VALUE,), dtype=name and DTYPES[name], **others)


def reading(name: str | None, *weights: float) -> LocalStep:
    return LocalStep(weights or (0.0, 1.0), dtype=name and DTYPES[name])


def stored(name: str) -> dict[Any, Tensor]:
    """What a step that computes everything leaves behind."""
    return slots_of(run_segment(rewritten(mlp_block().segment, [storing(name)], *STORE), mlp_block().arguments))


def slots_of(results: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return {ref: value for ref, value in results.items() if isinstance(ref, SlotRef)}


def widened(results: dict[Any, Tensor], value: SlotRef = VALUE, scale: SlotRef = SCALE) -> Tensor:
    wide = results[value].float()
    return wide * results[scale] if scale in results else wide


def test_a_cast_is_put_behind_what_is_stored() -> None:
    segment, (_, report, _) = reported(mlp_block().segment, [storing("bfloat16")], *STORE)
    assert "\n".join(str(segment).splitlines()[9:]) == WRITES
    assert report.changed == ("value[0]: torch.float32 to torch.bfloat16",)


def test_what_is_read_is_cast_back_and_scaled() -> None:
    segment, (_, report, _) = reported(mlp_block().segment, [reading("float8_e4m3fn")], *READ)
    assert str(segment) == READS
    assert report.changed == ("value[0]: torch.float32 from torch.float8_e4m3fn",)


@every_dtype
def test_the_step_that_stores_is_not_rounded_by_a_bit(name: str) -> None:
    block = mlp_block()
    results = run_segment(rewritten(block.segment, [storing(name)], *STORE), block.arguments)
    assert torch.equal(results[Value(0)], block.output())
    assert results[VALUE].dtype is DTYPES[name]
    assert results[VALUE].is_contiguous()
    assert (SCALE in results) == (name in SCALED)


@every_dtype
def test_what_is_read_differs_by_the_rounding_of_the_dtype_and_by_no_more(name: str) -> None:
    block = mlp_block()
    kept = stored(name)
    results = run_segment(rewritten(block.segment, [reading(name)], *READ), {**block.arguments, **kept})
    gate, stream = block.arguments[Value(5)], block.arguments[Value(0)]
    torch.testing.assert_close(results[Value(0)], stream + gate * widened(kept))
    largest = block.core().abs().amax(-1, keepdim=True)
    error = (widened(kept) - block.core()).abs()
    assert (error <= ROUNDING[name] * torch.maximum(block.core().abs(), largest * 2**-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", SCALED)
def test_rows_of_any_magnitude_are_stored_alike(name: str) -> None:
    """Plain casts to these dtypes turn large rows into infinities and small ones into zeros; rows of zeros stay."""
    magnitudes = torch.logspace(-12, 12, TOKENS)[:, None].expand(-1, WIDTH).clone()
    magnitudes[3] = 0.0
    block = mlp_block()
    segment = rewritten(block.segment, [storing(name)], *STORE)
    down, bias = (block.segment.graph.find_nodes(op="placeholder")[i] for i in (3, 4))
    assert (down.name, bias.name) == ("value_3", "value_4")
    arguments = {**block.arguments, Value(3): torch.zeros(WIDTH, 2 * WIDTH), Value(4): magnitudes[None]}
    results = run_segment(segment, arguments)
    torch.testing.assert_close(widened(results)[0], magnitudes, rtol=1e-6, atol=0)
    plain = magnitudes.to(DTYPES[name]).float()
    assert not torch.allclose(plain, magnitudes, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_value_that_is_no_wider_is_stored_as_it_is(name: str) -> None:
    sample = chain(Channels())
    sample = sample._replace(model=sample.model.bfloat16(), inputs={"x": torch.randn(2, TOKENS, WIDTH).bfloat16()})
    block = cut(sample)
    for step, passes in ((storing, STORE), (reading, READ)):
        plain = rewritten(block.segment, [step(None)], *passes)
        narrow, reports = reported(block.segment, [step(name)], *passes)
        assert str(narrow) == str(plain)
        assert reports[1].changed == ()
    assert reports[1].skipped == ()
    (report,) = reported(block.segment, [storing(name)], *STORE)[1][1:2]
    assert report.skipped == (f"value[0]: torch.bfloat16 is no wider than {DTYPES[name]}",)


def test_a_step_without_a_dtype_is_left_alone() -> None:
    segment, (_, report, _) = reported(mlp_block().segment, [storing(None)], *STORE)
    assert report.changed == report.skipped == ()
    assert "_to_copy" not in str(segment)


@every_dtype
def test_a_forecast_widens_every_value_of_its_history(name: str) -> None:
    block = mlp_block()
    step = LocalStep((0.0, 1.0, 1.0), variable=True, dtype=DTYPES[name])
    newest = stored(name)
    values = {**newest, SlotRef(0, SlotKind.VALUE, 1): newest[VALUE].flip(1)}
    if SCALE in newest:
        values[SlotRef(0, SlotKind.VALUE_SCALE, 1)] = newest[SCALE].flip(1)
    values[Weights(0)] = torch.tensor([0.0, 3.0, -0.5])
    results = run_segment(rewritten(block.segment, [step], *READ), {**block.arguments, **values})
    core = 3.0 * widened(newest) - 0.5 * widened(newest).flip(1)
    expected = block.arguments[Value(0)] + block.arguments[Value(5)] * core
    torch.testing.assert_close(results[Value(0)], expected)


def refreshing(name: str, **others: Any) -> LocalStep:
    return LocalStep(
        (1.0, 1.0), refresh=Score(ScoreBase.RANDOM), writes=(SlotKind.VALUE,), dtype=DTYPES[name], **others
    )


@every_dtype
@pytest.mark.parametrize("count", [1, 5, TOKENS])
@pytest.mark.sampled
def test_refreshed_tokens_are_used_unrounded_and_the_others_keep_every_bit(name: str, count: int) -> None:
    block, kept = mlp_block(), stored(name)
    other = {**kept, VALUE: kept[VALUE].flip(1)}
    segment = rewritten(block.segment, [refreshing(name)], RefreshTokens(), NarrowSlots(), DropDead())
    noise = {TokenCount(0): count, Noise(0, share_guidance=False): torch.rand(BATCH, TOKENS)}
    results = run_segment(segment, {**block.arguments, **other, **noise})
    chosen = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter(1, results[Chosen(0)], True)
    torch.testing.assert_close(results[Value(0)][chosen], block.output()[chosen], rtol=1e-5, atol=1e-5)
    gate, stream = block.arguments[Value(5)], block.arguments[Value(0)]
    assert torch.equal(results[Value(0)][~chosen], (stream + gate * widened(other))[~chosen])
    for ref, old in other.items():
        assert results[ref].dtype is old.dtype
        bits = torch.uint8 if old.dtype.itemsize == 1 else old.dtype
        assert torch.equal(results[ref].view(bits)[~chosen], old.view(bits)[~chosen])
    error = (widened(results) - block.core()).abs()[chosen]
    assert (error <= 2 * ROUNDING[name] * block.core().abs().amax(-1, keepdim=True).expand_as(stream)[chosen]).all()


@every_dtype
def test_tokens_that_are_refreshed_again_and_again_do_not_wear_out_the_others(name: str) -> None:
    block, values = mlp_block(), stored(name)
    segment = rewritten(block.segment, [refreshing(name)], RefreshTokens(), NarrowSlots(), DropDead())
    noise = torch.zeros(BATCH, TOKENS)
    noise[:, 0] = 1.0
    for _ in range(20):
        given = {TokenCount(0): 1, Noise(0, share_guidance=False): noise}
        results = run_segment(segment, {**block.arguments, **values, **given})
        values = slots_of(results)
    assert torch.equal(widened(values)[:, 1:], widened(stored(name))[:, 1:])


@every_dtype
@pytest.mark.sampled
def test_stored_attention_is_narrowed_with_a_scale_per_head_and_token(name: str) -> None:
    block = cut(chain(Parallel()))
    storing_both = LocalStep(writes=(SlotKind.VALUE, SlotKind.ATTENTION), attention=0, dtype=DTYPES[name])
    kept = slots_of(run_segment(rewritten(block.segment, [storing_both], *STORE), block.arguments))
    assert kept[ATTENTION].dtype is DTYPES[name]
    if name in SCALED:
        assert kept[ATTENTION_SCALE].shape == (BATCH, HEADS, TOKENS, 1)
    attention = block.peek(block.segment.sites[0].attention[0])
    error = (widened(kept, ATTENTION, ATTENTION_SCALE) - attention).abs()
    assert (error <= ROUNDING[name] * attention.abs().amax(-1, keepdim=True)).all()
    step = refreshing(name, context=Context.STORED, attention=0)
    passes = (RefreshTokens(), NarrowSlots(), DropDead())
    noise = {TokenCount(0): 5, Noise(0, share_guidance=False): torch.rand(BATCH, TOKENS)}
    narrow = run_segment(rewritten(block.segment, [step], *passes), {**block.arguments, **kept, **noise})
    wide_step = LocalStep(
        (1.0, 1.0), refresh=Score(ScoreBase.RANDOM), writes=(SlotKind.VALUE,), attention=0, context=Context.STORED
    )
    wide = {VALUE: widened(kept), ATTENTION: widened(kept, ATTENTION, ATTENTION_SCALE)}
    expected = run_segment(rewritten(block.segment, [wide_step], *passes), {**block.arguments, **wide, **noise})
    assert torch.equal(narrow[Value(0)], expected[Value(0)])


@every_dtype
def test_an_update_is_narrowed_like_a_core(name: str) -> None:
    block = mlp_block()
    results = run_segment(rewritten(block.segment, [storing(name, what=What.UPDATE)], *STORE), block.arguments)
    error = (widened(results) - block.update()).abs()
    assert (error <= ROUNDING[name] * block.update().abs().amax(-1, keepdim=True)).all()


def test_a_score_that_compares_with_the_stored_value_sees_it_widened() -> None:
    block, kept = mlp_block(), stored("float8_e4m3fn")
    step = LocalStep((1.0, 1.0), refresh=Score(ScoreBase.SIMILARITY), dtype=torch.float8_e4m3fn)
    narrow = rewritten(block.segment, [step], RefreshTokens(), NarrowSlots(), DropDead())
    wide = rewritten(
        block.segment, [LocalStep((1.0, 1.0), refresh=Score(ScoreBase.SIMILARITY))], RefreshTokens(), DropDead()
    )
    got = run_segment(narrow, {**block.arguments, **kept, TokenCount(0): 4})
    expected = run_segment(wide, {**block.arguments, VALUE: widened(kept), TokenCount(0): 4})
    assert torch.equal(got[Chosen(0)], expected[Chosen(0)])


def test_the_pipeline_narrows_after_everything_is_stored_and_read() -> None:
    names = [item.name for item in PASSES]
    assert names.index("narrow-slots") > max(names.index(n) for n in ("refresh-tokens", "reuse-sites", "store-values"))
    assert names.index("narrow-slots") < names.index("keep-layout")
