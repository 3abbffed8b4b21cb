"""What is around a denoiser: ControlNets that steer it, pipelines within the pipeline, half precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiTControlNetPipeline,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from torch import nn

import dicompile
from dicompile.errors import InvalidSetting, UnsupportedModel
from dicompile.wrapper import CachedModel
from tests.pipelines import pipes
from tests.pipelines.pipes import FLUX_PROMPTS, HEADS, TEXT, Sampler, assembled, kinds, lively, text

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

FORA = dicompile.FORA(interval=2)
STEPS = 6


class Seeded(Sampler):
    """The control image is encoded with noise from torch's own generator."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return super().__call__(*args, **kwargs)


def vae(channels: int, blocks: int = 2) -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        shift_factor=0.1,
    ).eval()  # fmt: skip


def image(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def flux_controlnet(layers: int = 1, *, nets: int = 1) -> Sampler:
    controlnets = [
        lively(FluxControlNetModel(
            **HEADS, patch_size=1, in_channels=16, num_layers=layers, num_single_layers=layers,
            joint_attention_dim=TEXT, pooled_projection_dim=40, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
        ))
        for _ in range(nets)
    ]  # fmt: skip
    pipe = assembled(
        FluxControlNetPipeline, transformer=pipes.flux_transformer(), vae=vae(4),
        controlnet=FluxMultiControlNetModel(controlnets) if nets > 1 else controlnets[0],
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    several = {
        "control_image": [image(i) for i in range(nets)], "control_mode": [None] * nets,
        "controlnet_conditioning_scale": [0.5] * nets,
    }  # fmt: skip
    options = dict(FLUX_PROMPTS[0]) | {"control_image": image(0), "height": 32, "width": 32}
    return Seeded(pipe, options | (several if nets > 1 else {}))


def sd3_controlnet(layers: int = 1, *, nets: int = 1) -> Sampler:
    settings = {
        **HEADS, "sample_size": 16, "patch_size": 2, "in_channels": 4, "caption_projection_dim": 32,
        "joint_attention_dim": TEXT, "pooled_projection_dim": 40, "out_channels": 4,
    }  # fmt: skip
    sampler = pipes.sd3()
    controlnets = [lively(SD3ControlNetModel(**settings, num_layers=layers)) for _ in range(nets)]
    pipe = assembled(
        StableDiffusion3ControlNetPipeline, transformer=sampler.pipe.transformer, vae=vae(4),
        controlnet=SD3MultiControlNetModel(controlnets) if nets > 1 else controlnets[0],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    prompts = [text(seed=seed, pooled_prompt_embeds=(1, 40)) for seed in (0, 1)]
    several = {"control_image": [image(i) for i in range(nets)], "controlnet_conditioning_scale": [0.5] * nets}
    options = pipes.both(*prompts) | {"control_image": image(0), "height": 32, "width": 32}
    return Seeded(pipe, options | (several if nets > 1 else {}))


def hunyuan_controlnet() -> Sampler:
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 16,
        "hidden_size": 32, "cross_attention_dim": TEXT, "cross_attention_dim_t5": 16, "pooled_projection_dim": TEXT,
        "text_len": 6, "text_len_t5": 8,
    }  # fmt: skip
    pipe = assembled(
        HunyuanDiTControlNetPipeline, transformer=lively(HunyuanDiT2DModel(**settings, num_layers=4)),
        controlnet=lively(HunyuanDiT2DControlNetModel(**settings, transformer_num_layers=4)),
        vae=vae(4, blocks=4),  # the pipeline counts on latents an eighth as wide
        scheduler=DDPMScheduler(), requires_safety_checker=False,
    )  # fmt: skip
    prompts = [
        text(seed=seed, prompt_embeds_2=(1, 8, 16))
        | {"prompt_attention_mask": pipes.mask(length), "prompt_attention_mask_2": pipes.mask(length, size=8)}
        for seed, length in ((0, 4), (1, 6))
    ]
    size = {"height": 128, "width": 128, "use_resolution_binning": False}
    return Seeded(pipe, pipes.both(*prompts) | size | {"control_image": image(0)})


CONTROLLED = {"flux": flux_controlnet, "sd3": sd3_controlnet}


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_is_left_alone_and_steers_every_step(name: str) -> None:
    sampler = CONTROLLED[name]()
    controlnet = sampler.pipe.controlnet
    wanted = sampler(STEPS)
    dicompile.optimize(sampler.pipe, mode="eager")
    assert torch.equal(sampler(STEPS), wanted)
    dicompile.optimize(dicompile.restore(sampler.pipe), FORA, mode="eager")
    assert sampler.pipe.controlnet is controlnet
    got = sampler(STEPS)
    assert dicompile.report(sampler.pipe).kinds == kinds(dicompile.plan_of(sampler.pipe))
    assert dicompile.report(sampler.pipe).cold_starts == []
    assert (got - wanted).norm() < 0.1 * wanted.norm()
    frames = len(sampler.pipe.transformer.frames)
    for scale in (0.3, 0.6):  # another strength is another value, not another graph
        sampler(STEPS, controlnet_conditioning_scale=scale)
    assert len(sampler.pipe.transformer.frames) == frames


@pytest.mark.parametrize("policy", ["fora", "duca"])
def test_what_a_controlnet_says_at_a_step_that_reuses_is_heard(policy: str) -> None:
    """Its residuals join the streams between the branches, and are no part of what is reused."""
    sampler = flux_controlnet()
    dicompile.optimize(sampler.pipe, policy, mode="eager")
    with_control, without = sampler(STEPS), sampler(STEPS, control_guidance_end=0.5)
    plan = dicompile.plan_of(sampler.pipe)
    assert plan.steps[-1].kind != "full" or plan.steps[-2].kind != "full"
    assert not torch.equal(with_control, without)


def test_a_controlnet_that_is_named_is_cached_and_told_about_apart() -> None:
    sampler = flux_controlnet()
    pipe = dicompile.optimize(sampler.pipe, FORA, mode="eager", components=["transformer", "controlnet"])
    sampler(STEPS)
    for model in (pipe, pipe.transformer, pipe.controlnet):
        assert dicompile.report(model).kinds == kinds(dicompile.plan_of(model))
    assert dicompile.structure_of(pipe.controlnet).inputs != dicompile.structure_of(pipe).inputs
    latent = next(item.name for item in dicompile.structure_of(pipe.controlnet).inputs if item.role.value == "latent")
    assert latent == "hidden_states"
    dicompile.restore(pipe)
    assert not isinstance(pipe.controlnet, CachedModel)


def test_a_component_that_is_not_there_is_refused() -> None:
    sampler = pipes.sd3()
    for names in (["transfromer"], [], "transformer"):
        with pytest.raises(UnsupportedModel, match="has no component"):
            dicompile.optimize(sampler.pipe, FORA, components=names)
    with pytest.raises(InvalidSetting, match="no argument 'noise' that could be its timestep"):
        dicompile.optimize(sampler.pipe, FORA, timestep="noise")


@pytest.mark.nightly
@pytest.mark.parametrize("policy", [FORA, "duca"])
@pytest.mark.parametrize("make", [flux_controlnet, sd3_controlnet])
def test_two_controlnets_steer_together_and_may_be_cached_as_one(make: Any, policy: Any) -> None:
    sampler = make(2, nets=2)
    wanted = sampler(STEPS)
    both = ["transformer", "controlnet"]
    dicompile.optimize(sampler.pipe, mode="eager", components=both)
    assert torch.equal(sampler(STEPS), wanted)
    for components in (None, both):
        pipe = dicompile.optimize(dicompile.restore(sampler.pipe), policy, mode="eager", components=components)
        got = sampler(STEPS)
        assert (got - wanted).norm() < 0.1 * wanted.norm()
        for model in (pipe, pipe.controlnet) if components else (pipe,):
            assert dicompile.report(model).kinds == kinds(dicompile.plan_of(model))
            assert dicompile.report(model).cold_starts == []
        assert torch.equal(sampler(STEPS), got)


@pytest.mark.parametrize("policy", [FORA, pytest.param("duca", marks=pytest.mark.nightly)])
def test_residuals_that_a_denoiser_takes_out_of_their_list_are_heard(policy: Any) -> None:
    """HunyuanDiT empties the list that its ControlNet returns."""
    sampler = hunyuan_controlnet()
    wanted = sampler(STEPS)
    dicompile.optimize(sampler.pipe, mode="eager")
    assert torch.equal(sampler(STEPS), wanted)
    assert not torch.equal(sampler(STEPS, controlnet_conditioning_scale=0.5), wanted)
    dicompile.optimize(dicompile.restore(sampler.pipe), policy, mode="eager")
    got = sampler(STEPS)
    assert dicompile.report(sampler.pipe).kinds == kinds(dicompile.plan_of(sampler.pipe))
    assert dicompile.report(sampler.pipe).cold_starts == []
    assert len(sampler.pipe.transformer.frames) == 1
    assert torch.equal(sampler(STEPS), got)


class Outer:
    """A pipeline that hands its denoiser on to another one, as VisualCloze does."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.transformer, self.scheduler = inner, inner.transformer, inner.scheduler

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def test_a_denoiser_that_a_pipeline_in_the_pipeline_holds_is_replaced_there_too() -> None:
    sampler = pipes.sd3()
    original, outer = sampler.pipe.transformer, Outer(sampler.pipe)
    dicompile.optimize(outer, FORA, mode="eager")
    assert sampler.pipe.transformer is outer.transformer
    sampler(STEPS)
    assert dicompile.report(outer).kinds == kinds(dicompile.plan_of(outer))
    dicompile.restore(outer)
    assert sampler.pipe.transformer is outer.transformer is original


@pytest.mark.parametrize("steps", [28, 50])
def test_a_pipeline_in_bfloat16_follows_its_plan(steps: int) -> None:
    """Neighbouring timesteps are one number there; the scheduler knows better."""
    sampler = pipes.flux()
    sampler.pipe.to(torch.bfloat16)
    options = {n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in sampler.options.items()}
    sampler = Sampler(sampler.pipe, copy.copy(options))
    dicompile.optimize(sampler.pipe, FORA, mode="eager")
    sampler(steps)
    assert dicompile.report(sampler.pipe).kinds == kinds(dicompile.plan_of(sampler.pipe))
    assert dicompile.report(sampler.pipe).cold_starts == []
