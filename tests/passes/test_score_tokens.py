"""score-tokens: attention delivers one number per token, and is not touched itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from dicompile.ops.collectives import sum_over_ranks
from dicompile.passes import SlotRef, Value
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.plan import ScoreBase, SlotKind
from tests import models
from tests.models import Sample
from tests.passes.segments import (
    BATCH,
    FULL,
    HEADS,
    SCORE,
    TOKENS,
    WIDTH,
    Attention,
    Cut,
    Folded,
    chain,
    cross_attention_block,
    cut,
    produce,
    reported,
    rewritten,
    run_segment,
    self_attention_block,
)

FLOAT32 = 1e-5
"""Scores are computed in float32 and here in float64."""

NORM = """\
%18: f32[2,2,16,4] = aten.scaled_dot_product_attention.default(%11, %14, %17)  # blocks.0
%19: f32[2,2,16,4] = aten.to.dtype(%17, torch.float32)  # blocks.0
%20: f32[2,2,16] = aten.linalg_vector_norm.default(%19, 2, [-1])  # blocks.0
%21: f32[2,2,16] = aten.rsub.Scalar(%20, 1)  # blocks.0
%22: f32[2,16] = aten.sum.dim_IntList(%21, [1])  # blocks.0"""


def operands(block: Cut) -> list[Tensor]:
    """Query, key and value of the block's attention: [b, h, n, d] each."""
    return [block.peek(operand).double() for operand in block.segment.sites[0].attention[0].args[:3]]


def attention_map(query: Tensor, key: Tensor, scale: float = (WIDTH // HEADS) ** -0.5) -> Tensor:
    return (query @ key.transpose(-2, -1) * scale).softmax(-1).mean(1)


def test_the_score_leaves_the_segment_beside_attention() -> None:
    segment, (report,) = reported(self_attention_block().segment, [produce(ScoreBase.VALUE_NORM)], ScoreTokens())
    assert NORM in str(segment)
    assert str(segment).endswith("return score[0] = %22")
    assert report.changed == ("site 0: value-norm",)


class Summed(Attention):
    """Attention of which every rank has some heads."""

    def project(self, attended: Tensor) -> Tensor:
        return sum_over_ranks(super().project(attended), distributed.group.WORLD.group_name)  # type: ignore[union-attr]


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM, ScoreBase.KEY_NORM])
def test_a_score_of_some_heads_is_the_mean_over_ranks(base: ScoreBase, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        block = cut(chain(Summed()))
        segment = rewritten(block.segment, [produce(base)], ScoreTokens())
        lines = str(segment).splitlines()
        summed, waited, mean = lines[lines.index(next(line for line in lines if "all_reduce" in line)) :][:3]
        own = summed.partition("default(")[2].partition(",")[0]
        assert f": f32[2,16] = _c10d_functional.all_reduce.default({own}, sum, 0)" in summed
        assert "_c10d_functional.wait_tensor.default" in waited
        assert "aten.div.Tensor" in mean
        assert lines[-1] == f"return score[0] = {mean.partition(':')[0]}"
        assert torch.equal(run_segment(segment, block.arguments)[Value(0)], block.output())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM, ScoreBase.ENTROPY])
def test_the_output_does_not_change_by_a_bit(base: ScoreBase) -> None:
    block = self_attention_block()
    results = run_segment(rewritten(block.segment, [produce(base)], ScoreTokens()), block.arguments)
    assert torch.equal(results[Value(0)], block.output())


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM])
def test_self_attention_scores_every_token_by(base: ScoreBase) -> None:
    block = self_attention_block()
    query, key, value = operands(block)
    expected = attention_map(query, key).sum(1) if base is ScoreBase.ATTENTION else (1 - value.norm(dim=-1)).sum(1)
    result = run_segment(rewritten(block.segment, [produce(base)], ScoreTokens()), block.arguments)[SCORE]
    assert result.shape == (BATCH, TOKENS)
    torch.testing.assert_close(result.double(), expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_scores_every_token_by_the_entropy_of_its_row(shared: bool) -> None:
    block = cross_attention_block()
    segment = rewritten(block.segment, [produce(ScoreBase.ENTROPY, shared=shared)], ScoreTokens())
    result = run_segment(segment, block.arguments)[SCORE]
    query, key, _ = operands(block)
    rows = attention_map(query, key) * (0.5 if shared else 1.0)
    torch.testing.assert_close(result.double(), -(rows * (rows + 1e-7).log()).sum(-1), rtol=FLOAT32, atol=FLOAT32)


class Masked(Attention):
    """Attention that does not see the last four words, with a scale of its own."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(c)), self.split(self.value(c))
        mask = (torch.arange(c.shape[1]) < c.shape[1] - 4).view(1, 1, 1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=2.0)
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_masked_words_and_the_scale_of_attention_count_as_they_do_in_attention() -> None:
    block = cut(chain(Masked(), c=torch.randn(BATCH, 7, WIDTH)))
    segment = rewritten(block.segment, [produce(ScoreBase.ENTROPY)], ScoreTokens())
    query, key, _ = operands(block)
    rows = attention_map(query, key[..., :3, :], scale=2.0)
    torch.testing.assert_close(
        run_segment(segment, block.arguments)[SCORE].double(),
        -(rows * (rows + 1e-7).log()).sum(-1),
        rtol=FLOAT32,
        atol=FLOAT32,
    )


class Headless(Attention):
    """Attention with one head, and no axis for it; it sees only some tokens."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]).expand(len(x), x.shape[1], -1) % 3 > 0
        return x + self.proj(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), attn_mask=mask))


@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM, ScoreBase.KEY_NORM])
def test_a_single_head_needs_no_axis(base: ScoreBase) -> None:
    block = cut(chain(Headless()))
    result = run_segment(rewritten(block.segment, [produce(base)], ScoreTokens()), block.arguments)[SCORE]
    query, key, value = operands(block)
    seen = torch.arange(TOKENS) % 3 > 0
    received = torch.zeros(BATCH, TOKENS, dtype=torch.float64)
    received[:, seen] = (query @ key[:, seen].mT * WIDTH**-0.5).softmax(-1).sum(1)
    expected = {
        ScoreBase.ATTENTION: received,
        ScoreBase.VALUE_NORM: 1 - value.norm(dim=-1),
        ScoreBase.KEY_NORM: key.norm(dim=-1),
    }[base]
    torch.testing.assert_close(result.double(), expected, rtol=FLOAT32, atol=FLOAT32)


class Causal(Attention):
    """Attention whose tokens see none behind them."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def test_a_causal_attention_is_scored_as_such() -> None:
    block = cut(chain(Causal()))
    segment = rewritten(block.segment, [produce(ScoreBase.ATTENTION)], ScoreTokens())
    query, key, _ = operands(block)
    logits = (query @ key.mT * (WIDTH // HEADS) ** -0.5).masked_fill(
        ~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf
    )
    torch.testing.assert_close(
        run_segment(segment, block.arguments)[SCORE].double(),
        logits.softmax(-1).mean(1).sum(1),
        rtol=FLOAT32,
        atol=FLOAT32,
    )


def test_no_attention_map_leaves_the_segment() -> None:
    for base in (ScoreBase.ATTENTION, ScoreBase.VALUE_NORM, ScoreBase.ENTROPY):
        segment = rewritten(self_attention_block().segment, [produce(base)], ScoreTokens())
        assert [tuple(node.meta["val"].shape) for node in segment.results] == [
            (BATCH, TOKENS, WIDTH), (BATCH, TOKENS),
        ]  # fmt: skip
        assert not [
            node for node in segment.graph.nodes if [*getattr(node.meta.get("val"), "shape", ())][-2:] == [TOKENS] * 2
        ]


def test_attention_that_nobody_is_ranked_by_is_left_alone() -> None:
    block = self_attention_block()
    segment, (report,) = reported(block.segment, [FULL], ScoreTokens())
    assert str(segment) == str(block.segment)
    assert report.changed == ()


# Joint attention ------------------------------------------------------------------------------------------------------


def joint(name: str) -> tuple[Sample, Cut]:
    """A model of joint attention, and its first block."""
    sample = getattr(models, name)(2)
    return sample, cut(sample)


@pytest.mark.parametrize(("name", "image", "text"), [("flux", (6, 22), (0, 6)), ("sd3", (0, 64), (64, 72))])
@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM, ScoreBase.LARGE_VALUE_NORM])
@pytest.mark.sampled
def test_each_stream_gets_the_score_of_its_own_tokens(
    name: str, image: tuple[int, int], text: tuple[int, int], base: ScoreBase
) -> None:
    block = joint(name)[1]
    query, key, value = operands(block)
    whole = {
        ScoreBase.ATTENTION: attention_map(query, key, query.shape[-1] ** -0.5).sum(1),
        ScoreBase.VALUE_NORM: (1 - value.norm(dim=-1)).sum(1),
        ScoreBase.LARGE_VALUE_NORM: value.norm(dim=-1).mean(1),
    }[base]
    steps = [produce(base), FULL, produce(base), FULL]
    segment = rewritten(block.segment, steps, ScoreTokens(), live=range(len(block.segment.outputs)))
    assert str(segment).count("attention_received") == (base is ScoreBase.ATTENTION)  # one for both streams
    results = run_segment(segment, block.arguments)
    for position, (first, end) in ((0, image), (2, text)):
        found = results[SlotRef(position, SlotKind.SCORE)].double()
        torch.testing.assert_close(found, whole[:, first:end], rtol=FLOAT32, atol=FLOAT32)


def test_key_norms_are_those_before_normalisation_and_rotation() -> None:
    sample, block = joint("flux")
    keys: dict[str, Tensor] = {}
    attention = sample.model.transformer_blocks[0].attn
    for name in ("to_k", "add_k_proj"):
        getattr(attention, name).register_forward_hook(lambda *call, name=name: keys.setdefault(name, call[-1]))
    with torch.no_grad():
        sample.model(**sample.inputs)
    steps = [produce(ScoreBase.KEY_NORM), FULL, produce(ScoreBase.KEY_NORM), FULL]
    results = run_segment(rewritten(block.segment, steps, ScoreTokens(), live=()), block.arguments)
    for position, name in ((0, "to_k"), (2, "add_k_proj")):
        expected = keys[name].unflatten(-1, (2, -1)).norm(dim=-1).mean(-1)
        torch.testing.assert_close(results[SlotRef(position, SlotKind.SCORE)], expected, rtol=1e-4, atol=1e-5)


def test_keys_that_are_not_normalised_are_taken_as_they_are() -> None:
    block = self_attention_block()
    result = run_segment(rewritten(block.segment, [produce(ScoreBase.KEY_NORM)], ScoreTokens()), block.arguments)[SCORE]
    torch.testing.assert_close(result.double(), operands(block)[1].norm(dim=-1).mean(1), rtol=FLOAT32, atol=FLOAT32)


# Attention along one axis ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along_frames", [False, True])
@pytest.mark.parametrize("base", [ScoreBase.ATTENTION, ScoreBase.VALUE_NORM])
def test_tokens_that_attention_folds_into_the_batch_are_unfolded(along_frames: bool, base: ScoreBase) -> None:
    sample = chain(Folded(along_frames))
    block = cut(sample)
    query, key, value = operands(block)
    folded = attention_map(query, key).sum(1) if base is ScoreBase.ATTENTION else (1 - value.norm(dim=-1)).sum(1)
    expected = sample.model.blocks[0].unfold(folded[..., None])[..., 0]
    segment = rewritten(block.segment, [produce(base)], ScoreTokens())
    results = run_segment(segment, block.arguments)
    torch.testing.assert_close(results[SCORE].double(), expected, rtol=FLOAT32, atol=FLOAT32)
    assert torch.equal(results[Value(0)], block.output())
