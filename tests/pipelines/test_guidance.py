"""Perturbed attention guidance: a third sample of the batch, whose image tokens see themselves only in some blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    StableDiffusion3PAGPipeline,
)

import dicompile
from tests.pipelines import pipes
from tests.pipelines.pipes import HEADS, TEXT, TOKENS, Sampler, assembled, both, kinds, lively, mask, text

# diffusers gives torch tensors to numpy.array, and torch 2.13 does not know numpy 2's keyword `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STEPS = 4


def perturbed(sampler: Sampler, pipeline: Any, layer: str) -> Sampler:
    """The same components in a pipeline that perturbs one layer."""
    parts = {"transformer": sampler.pipe.transformer, "scheduler": sampler.scheduler}
    return Sampler(assembled(pipeline, **parts, pag_applied_layers=[layer]), sampler.options | {"pag_scale": 3.0})


def hunyuan_dit() -> Sampler:
    transformer = HunyuanDiT2DModel(
        **HEADS, in_channels=4, patch_size=2, activation_fn="gelu-approximate", sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT, pooled_projection_dim=16,
        text_len=TOKENS, text_len_t5=TOKENS,
    )  # fmt: skip
    pipe = assembled(
        HunyuanDiTPAGPipeline, transformer=lively(transformer), scheduler=DDPMScheduler(),
        requires_safety_checker=False, pag_applied_layers=["blocks.1"],
    )  # fmt: skip
    prompts = [
        text(seed=seed, prompt_embeds_2=(1, TOKENS, TEXT))
        | {"prompt_attention_mask": mask(4 + seed), "prompt_attention_mask_2": mask(5 + seed)}
        for seed in (0, 1)
    ]
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False}
    return Sampler(pipe, both(*prompts) | sizes | {"pag_scale": 3.0})


PERTURBED: dict[str, Callable[[], Sampler]] = {
    "sd3": lambda: perturbed(pipes.sd3(), StableDiffusion3PAGPipeline, "transformer_blocks.0"),
    "hunyuan dit": hunyuan_dit,
    "pixart": lambda: perturbed(pipes.pixart(), PixArtSigmaPAGPipeline, "blocks.0"),
    "sana": lambda: perturbed(pipes.sana(), SanaPAGPipeline, "blocks.0"),
}


@pytest.mark.parametrize("name", PERTURBED)
@pytest.mark.sampled
def test_perturbed_attention_compiles_and_caches(name: str) -> None:
    untouched, compiled, cached = (PERTURBED[name]() for _ in range(3))
    dicompile.optimize(compiled.pipe, "none", mode="eager")
    dicompile.optimize(cached.pipe, dicompile.FORA(interval=2), mode="eager")
    wanted = untouched(STEPS)
    torch.testing.assert_close(compiled(STEPS), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.equal(cached(STEPS), wanted)
    report = dicompile.report(cached.pipe)
    assert report.kinds == kinds(dicompile.plan_of(cached.pipe))
    assert report.kinds["reuse"] and not report.cold_starts
