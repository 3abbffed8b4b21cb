"""Predictors for the plain DiT of the tests, untrained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dicompile.plan import Adapter, Policy, PredictorFacts
from dicompile.policies import Predictor
from tests.models import timesteps

STEPS, LAYERS, TOKENS, WIDTH = 6, 3, 64, 32


def facts(
    kind: str = "table", blocks: int = LAYERS, times: list[int] | None = None, adapted: int = 0
) -> PredictorFacts:
    return PredictorFacts(
        kind=kind,
        blocks=tuple(f"{i}.block" for i in range(blocks)),
        timesteps=tuple(map(float, times or timesteps(STEPS))),
        penalty=0.1,
        seed=0,
        iterations=1,
        adapted=adapted,
    )


LAST = ("blocks.2.qkv.weight", "blocks.2.proj.weight", "blocks.2.mlp.0.weight", "blocks.2.mlp.2.weight")
RANK = 2


def lora(scale: float = 0.3) -> dict[str, Adapter]:
    """LoRA weights for the last block of the plain DiT."""
    generator, shapes = torch.Generator().manual_seed(7), (3 * WIDTH, WIDTH, 4 * WIDTH, WIDTH)
    entries = (WIDTH, WIDTH, WIDTH, 4 * WIDTH)
    return {
        name: Adapter(torch.randn(RANK, c, generator=generator), scale * torch.randn(d, RANK, generator=generator))
        for name, d, c in zip(LAST, shapes, entries, strict=True)
    }


def adapted(adapters: Mapping[str, Adapter] | None = None) -> Predictor:
    """A predictor whose last block has LoRA weights."""
    importance = torch.rand(STEPS, LAYERS, TOKENS, generator=torch.Generator().manual_seed(3))
    importance[:, -1] = 1
    return Predictor(importance, facts(adapted=1), adapters=lora() if adapters is None else adapters)


def without_lora(policy: Policy) -> Policy:
    """The same tokens at the same steps, without LoRA weights."""
    return policy.model_copy(update={"adapters": 0, "predictor": Predictor(adapted().importance, facts())})
