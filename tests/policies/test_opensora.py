"""ToCa and DuCa on a spatial-temporal DiT, against the specification written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dicompile
from dicompile.plan import Policy, TimestepSchedule, make_plan
from tests.lower.captured import captured
from tests.models import timesteps
from tests.stdit import HEADS, Attention, Block, SpatialTemporalDiT, stdit

STEPS, INTERVAL, RATIO, AGE_WEIGHT = 10, 3, 0.2, 0.25


def value_norms(attention: Attention, x: Tensor, frames: int) -> Tensor:
    """Norm of every token's value per head; [b, h, tokens]. Values do not depend on how tokens are folded."""
    values = attention.qkv(x)[..., 2 * x.shape[-1] :]
    return values.view(*x.shape[:2], HEADS, -1).norm(dim=-1).transpose(1, 2)


def entropies(block: Block, x: Tensor, text: Tensor) -> Tensor:
    """Entropy of every token's cross-attention row, averaged over guidance halves up to a constant; [b, tokens]."""
    q = block.cross.q(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
    k = block.cross.kv(text)[..., : x.shape[-1]].view(*text.shape[:2], HEADS, -1).transpose(1, 2)
    rows = 0.5 * (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    own = -(rows * (rows + 1e-7).log()).sum(-1)
    return (own[:1] + own[1:]).repeat(2, 1)


class ByHand:
    """The model with the caches of the specification, section 1.3: one of everything per block."""

    def __init__(self, model: SpatialTemporalDiT, score: str, aggressive: bool) -> None:
        self.model, self.score, self.aggressive = model, score, aggressive
        self.stored: dict[Any, Tensor] = {}

    def __call__(self, step: int, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.step = step
        for number, block in enumerate(self.blocks):
            block.forward = lambda x, y, t, f, b=block, n=number: self.block(b, n, x, y, t, f)
        try:
            return self.model(latent, timestep, text)
        finally:
            for block in self.blocks:
                del block.forward

    @property
    def blocks(self) -> list[Block]:
        pairs = zip(self.model.spatial_blocks, self.model.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def block(self, block: Block, number: int, x: Tensor, text: Tensor, t: Tensor, frames: int) -> Tensor:
        s, kept = self.step, self.stored
        full = s <= 2 or s % INTERVAL == 0
        if self.aggressive and not full and s % INTERVAL == 2:
            return kept["last"] if number == len(self.blocks) - 1 else x
        modulation = block.scale_shift_table[None] + t.view(-1, 6, x.shape[-1])
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        if full:
            normed = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
            kept["attn", number] = block.attn(normed, frames)
            kept["norm", number] = (1 - value_norms(block.attn, normed, frames)).sum(1)
        x = x + gate1 * kept["attn", number]
        if s <= 2 or s % (2 * INTERVAL) == 0:
            kept["cross", number], kept["entropy", number] = block.cross(x, text), entropies(block, x, text)
        x = x + kept["cross", number]
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        if full:
            kept["mlp", number], kept["age", number] = block.mlp(normed), torch.zeros(x.shape[:2])
        else:
            raw = kept["norm", number] if self.score == "value-norm" else 1 + kept["entropy", number]
            ranked = raw / raw.norm(dim=-1, keepdim=True) + AGE_WEIGHT * kept["age", number] / INTERVAL
            chosen = ranked.argsort(dim=1, descending=True, stable=True)[:, : int(RATIO * 1.495 * x.shape[1])]
            index = chosen[..., None].expand(-1, -1, x.shape[-1])
            fresh = block.mlp(normed.gather(1, index))
            kept["mlp", number] = kept["mlp", number].scatter(1, index, fresh)
            kept["age", number] = (kept["age", number] + 1).scatter(1, chosen, torch.zeros(chosen.shape))
        x = x + gate2 * kept["mlp", number]
        kept["last"] = x
        return x


@pytest.mark.parametrize(
    ("policy", "score", "aggressive"),
    [
        (dicompile.ToCaOpenSora(interval=INTERVAL, ratio=RATIO), "entropy", False),
        (dicompile.ToCaOpenSora(interval=INTERVAL, ratio=RATIO, score="value-norm", share_guidance=False),
         "value-norm", False),
        (dicompile.DuCaOpenSora(interval=INTERVAL, ratio=RATIO), "value-norm", True),
    ],
    ids=["toca-entropy", "toca-value-norm", "duca"],
)  # fmt: skip
@pytest.mark.sampled
def test_published_rules_on_spatial_and_temporal_blocks(policy: Policy, score: str, aggressive: bool) -> None:
    torch.manual_seed(0)
    sample = stdit()
    schedule = timesteps(STEPS)
    fast = dicompile.optimize(sample.model, policy, schedule=schedule, mode="eager")
    by_hand = ByHand(sample.model, score, aggressive)
    for step, time in enumerate(schedule):
        latent = torch.randn(sample.inputs["latent"].shape, generator=torch.Generator().manual_seed(step))
        timestep = torch.full((2,), time)
        with torch.no_grad():
            expected = by_hand(step, latent, timestep, sample.inputs["text"])
        found = fast(latent=latent, timestep=timestep, text=sample.inputs["text"])
        assert torch.allclose(found, expected, atol=1e-5), f"step {step}: {(found - expected).abs().max():.1e}"


def test_cross_attention_has_half_the_pace() -> None:
    plan = make_plan(captured(stdit).structure, dicompile.ToCaOpenSora(), TimestepSchedule(30))
    symbols = [[site.action.symbol for site in step.sites[:3]] for step in plan.steps]
    assert [sum(row[i] == "F" for row in symbols) for i in range(3)] == [12, 7, 12]
    assert all(row[2] == "t" for row in symbols if row[0] == ".")


def test_a_third_of_the_steps_of_duca_runs_no_block() -> None:
    found = captured(stdit).structure
    plan = make_plan(found, dicompile.DuCaOpenSora(), TimestepSchedule(30))
    kinds = [step.kind for step in plan.steps]
    assert kinds.count("skip") == 9
    assert kinds.count("partial") == 9
    skipped = next(step for step in plan.steps if step.kind == "skip")
    assert skipped.flops < found.flops / 50
