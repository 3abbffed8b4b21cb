"""TeaCache by the embedding of the timestep, beside its rule on the modules of Wan and CogVideoX themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

import dicompile
from dicompile.errors import InvalidPolicy
from dicompile.policies.teacache import FITS
from tests.models import Sample, optimized, redraw, timesteps

STEPS = 14
TIMES = timesteps(STEPS)


def wan() -> Sample:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


def cogvideox() -> Sample:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, num_layers=3,
        sample_width=8, sample_height=8, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=6, text_embed_dim=24,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


@dataclass
class Reference:
    """The rule on a model's own modules: hooks read what it watches, and what the blocks add."""

    sample: Sample
    watched: Callable[[nn.Module], tuple[nn.Module, Callable[[Any], Tensor]]]
    blocks: str
    threshold: float
    rescale: tuple[float, ...]
    warmup: int
    last: int
    before: Tensor | None = None
    total: float = 0.0
    computed: list[bool] = field(default_factory=list)
    added: tuple[Tensor, ...] = ()

    def call(self, inputs: dict[str, Any]) -> Tensor:
        model, step = self.sample.model, len(self.computed)
        blocks = getattr(model, self.blocks)
        now = self.look(model, inputs)
        computes = step < self.warmup or step >= STEPS - self.last
        if not computes:
            assert self.before is not None
            drift = float((now - self.before).abs().mean() / self.before.abs().mean())
            self.total += float(np.poly1d(self.rescale)(drift))
            computes = self.total >= self.threshold
        self.before = now
        self.computed.append(computes)
        if not computes:
            setattr(model, self.blocks, nn.ModuleList([Added(self.added)]))
            try:
                return model(**inputs)[0]
            finally:
                setattr(model, self.blocks, blocks)
        self.total = 0.0
        entered: list[Tensor] = []
        first = blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: entered.extend([*args, *kwargs.values()][:2]), with_kwargs=True
        )
        left: list[Any] = []
        last = blocks[-1].register_forward_hook(lambda *found: left.append(found[-1]))
        try:
            output = model(**inputs)[0]
        finally:
            first.remove()
            last.remove()
        ends = left[0] if isinstance(left[0], tuple) else (left[0],)
        self.added = tuple(end - start for start, end in zip(entered, ends, strict=False))
        return output

    def look(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        module, value = self.watched(model)
        found: list[Tensor] = []
        handle = module.register_forward_hook(lambda *seen: found.append(value(seen[-1])))
        try:
            model(**inputs)
        finally:
            handle.remove()
        return found[0]


class Added(nn.Module):
    """In the place of all blocks."""

    def __init__(self, added: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.added = added

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        streams = [*args, *kwargs.values()]
        sums = tuple(stream + value for stream, value in zip(streams, self.added, strict=False))
        return sums if len(sums) > 1 else sums[0]


CASES = {
    "Wan": (wan, lambda model: (model.condition_embedder, lambda out: out[0]), "blocks", "wan2.1-t2v-14b"),
    "Wan with ret steps": (
        wan, lambda model: (model.condition_embedder, lambda out: out[1]), "blocks", "wan2.1-t2v-1.3b-ret",
    ),
    "CogVideoX": (
        cogvideox, lambda model: (model.time_embedding, lambda out: out), "transformer_blocks", "cogvideox-2b",
    ),
}  # fmt: skip
RESCALE, THRESHOLD = (0.5, 0.1, 0.2), 1.4
"""Of the tiny models here, on which the published fits tell nothing."""


@pytest.mark.parametrize("hoist", ["off", "all"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_it_decides_and_computes_as_the_rule_on_the_models_own_modules(name: str, hoist: str) -> None:
    torch.manual_seed(0)
    build, watched, blocks, fit = CASES[name]
    sample = build()
    _, _, warmup, last = FITS[fit]
    rule = Reference(sample, watched, blocks, THRESHOLD, RESCALE, warmup, last)
    published = dicompile.TeaCache(fit, THRESHOLD)
    assert published.gate is not None
    gate = published.gate.model_copy(update={"rescale": RESCALE})
    policy = published.model_copy(update={"cadence": published.cadence.model_copy(update={"gate": gate})})
    model = optimized(sample, policy, STEPS, hoist=hoist)
    shape = sample.inputs["hidden_states"].shape
    start, end = (torch.randn(shape) for _ in range(2))
    for step, time in enumerate(TIMES):
        latent = start + (end - start) * step / STEPS
        inputs = sample.inputs | {
            "hidden_states": latent, "timestep": torch.full_like(sample.inputs["timestep"], time)
        }  # fmt: skip
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs)[0], rule.call(inputs), rtol=1e-4, atol=1e-5)
    decisions = dicompile.report(model).decisions
    assert [*[False] * warmup, *(d.recalls for d in decisions), *[False] * last] == [not ran for ran in rule.computed]
    assert 0 < sum(d.recalls for d in decisions) < len(decisions), "the test would say nothing"


def test_coefficients_alone_are_for_the_modulated_input() -> None:
    gate = dicompile.TeaCache((1.0, 0.0)).gate
    assert gate is not None
    assert (gate.probe, gate.rescale, gate.last) == ("modulated", (1.0, 0.0), 1)


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidPolicy, match="no polynomial of 'sd3' is known") as caught:
        dicompile.TeaCache("sd3")
    assert "cogvideox-5b, cogvideox1.5-5b" in str(caught.value)
