"""What is around a denoiser: ControlNets that steer it, pipelines within the pipeline, half precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
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


def vae(channels: int) -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def image(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def flux_controlnet() -> Sampler:
    controlnet = FluxControlNetModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
        pooled_projection_dim=40, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    pipe = assembled(
        FluxControlNetPipeline, transformer=pipes.flux_transformer(), controlnet=lively(controlnet), vae=vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    options = dict(FLUX_PROMPTS[0]) | {"control_image": image(0), "height": 32, "width": 32}
    return Seeded(pipe, options)


def sd3_controlnet() -> Sampler:
    settings = {
        **HEADS, "sample_size": 16, "patch_size": 2, "in_channels": 4, "caption_projection_dim": 32,
        "joint_attention_dim": TEXT, "pooled_projection_dim": 40, "out_channels": 4,
    }  # fmt: skip
    sampler = pipes.sd3()
    pipe = assembled(
        StableDiffusion3ControlNetPipeline, transformer=sampler.pipe.transformer, vae=vae(4),
        controlnet=lively(SD3ControlNetModel(**settings, num_layers=1)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    prompts = [text(seed=seed, pooled_prompt_embeds=(1, 40)) for seed in (0, 1)]
    options = pipes.both(*prompts) | {"control_image": image(0), "height": 32, "width": 32}
    return Seeded(pipe, options)


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
