"""Modular pipelines of diffusers, whose guiders change the denoiser between two calls of a step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry, LayerSkipConfig, layer_skip
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from torch import Tensor

import dicompile
from tests.models import timesteps
from tests.pipelines.pipes import HEADS, TEXT, kinds, lively, text

STEPS = 6


def transformer() -> Any:
    return lively(WanTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, text_dim=TEXT, freq_dim=16, ffn_dim=64, num_layers=2,
        rope_max_seq_len=32,
    ))  # fmt: skip


def skipped() -> Any:
    return SkipLayerGuidance(
        skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(indices=[1], fqn="blocks"),
    )  # fmt: skip


def weakened() -> Any:
    return AutoGuidance(auto_guidance_config=LayerSkipConfig(indices=[1], fqn="blocks"))


GUIDERS: dict[str, tuple[Callable[[], Any], int]] = {
    "two branches": (ClassifierFreeGuidance, 2),
    "a block skipped in the third": (skipped, 3),
    "a block skipped in the second": (weakened, 2),
}


def pipeline(guider: Any, blocks: Any = WanCoreDenoiseStep, **components: Any) -> Any:
    torch.manual_seed(0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = blocks().init_pipeline()
    pipe.update_components(transformer=transformer(), scheduler=scheduler, guider=guider, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> Tensor:
    prompt, negative = (text(tokens=8, seed=seed)["prompt_embeds"] for seed in (0, 1))
    found: Tensor = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=STEPS, height=64, width=64,
        num_frames=5, generator=torch.Generator().manual_seed(1), output="latents",
    )  # fmt: skip
    return found


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.sampled
def test_a_pipeline_follows_its_plan_and_is_restored(name: str) -> None:
    make, branches = GUIDERS[name]
    pipe = pipeline(make())
    expected, given = latents(pipe), pipe.transformer
    dicompile.optimize(pipe, "none", backend="eager")
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    assert dicompile.restore(pipe) is pipe
    assert pipe.transformer is given
    dicompile.optimize(pipe, "fora", backend="eager")
    assert not torch.allclose(latents(pipe), expected, atol=1e-4)
    report = dicompile.report(pipe)
    if branches == 2:
        assert report.kinds == kinds(dicompile.plan_of(pipe), 2)
    else:  # it begins at the second step, and computes what nobody has stored for it
        assert (sum(report.kinds.values()), report.cold_starts) == (3 * STEPS - 1, [1])
    dicompile.restore(pipe)
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=0)


def test_two_denoisers_follow_each_other() -> None:
    pipe = pipeline(ClassifierFreeGuidance(), Wan22CoreDenoiseStep, transformer_2=transformer())
    pipe.update_components(guider_2=ClassifierFreeGuidance(), boundary_ratio=0.875)
    expected = latents(pipe)
    dicompile.optimize(pipe, "none", backend="eager")
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    dicompile.restore(pipe)
    dicompile.optimize(pipe, "fora", backend="eager")
    assert not torch.allclose(latents(pipe), expected, atol=1e-4)
    found = [dicompile.report(denoiser).kinds for denoiser in (pipe.transformer, pipe.transformer_2)]
    assert sum(sum(counts.values()) for counts in found) == 2 * STEPS
    assert all(counts["full"] and counts["reuse"] for counts in found)


def test_a_branch_with_hooks_of_its_own_remembers_what_it_computed() -> None:
    """It has all inputs of the first one. Beside a model for each, of which the third one always has the hooks."""
    model, guider, times = transformer(), skipped(), timesteps(STEPS)
    texts = [text(tokens=8, seed=seed)["prompt_embeds"] for seed in (0, 1, 0)]
    apart = [copy.deepcopy(model) for _ in texts]
    guider.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(times[1]))
    for _ in texts:
        guider.prepare_models(apart[2])  # the third time it puts the hooks there
    shared, *others = (dicompile.optimize(each, "fora", schedule=times, backend="eager") for each in (model, *apart))
    generator = torch.Generator().manual_seed(2)
    start, end = (torch.randn(1, 16, 2, 8, 8, generator=generator) for _ in range(2))
    differences = []
    for step, time in enumerate(times):
        found = []
        guider.set_state(step=max(step, 1), num_inference_steps=STEPS, timestep=torch.tensor(time))
        for prompt, other in zip(texts, others, strict=True):
            inputs = {"hidden_states": start + (end - start) * step / STEPS, "timestep": torch.tensor([time])}
            inputs |= {"encoder_hidden_states": prompt, "return_dict": False}
            guider.prepare_models(shared)
            found.append(shared(**inputs)[0])
            guider.cleanup_models(shared)
            torch.testing.assert_close(found[-1], other(**inputs)[0], rtol=1e-5, atol=1e-5)
        differences.append((found[0] - found[2]).abs().max())
    assert min(differences) > 1e-3
    assert dicompile.report(shared).kinds["reuse"] == 3 * dicompile.report(others[0]).kinds["reuse"] > 0


def test_hooks_that_come_anew_at_every_step_are_captured_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(skipped())
    dicompile.optimize(pipe, "fora", backend="eager")
    expected = latents(pipe)
    assert len(pipe.transformer.frames) == 2
    with caplog.at_level(logging.INFO, logger="dicompile"):
        torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=0)
    assert not [record for record in caplog.records if "captured" in record.message]


@pytest.mark.parametrize("dropout", [1.0, 0.0])
def test_hooks_with_other_settings_are_others(dropout: float) -> None:
    """Without dropout, the hook that skips a block runs it."""
    model, times = transformer(), timesteps(2)
    optimized = dicompile.optimize(model, "none", schedule=times, backend="eager")
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3)),
        "timestep": torch.tensor([times[0]]), "encoder_hidden_states": text(tokens=8)["prompt_embeds"],
        "return_dict": False,
    }  # fmt: skip
    for number, share in enumerate((1.0, dropout)):
        name, config = f"hook {number}", LayerSkipConfig(indices=[1], fqn="blocks", dropout=share)
        layer_skip._apply_layer_skip_hook(optimized, config, name)
        with dicompile.session(), torch.no_grad():
            found, expected = optimized(**inputs)[0], model(**inputs)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        HookRegistry.check_if_exists_or_initialize(optimized).remove_hook(name, recurse=True)
    assert len(optimized.frames) == (1 if dropout == 1.0 else 2)
