"""Stock diffusers pipelines with tiny random components; text comes as embeddings, so that no encoder is needed."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from dicompile import FORA, optimize
from tests.models import redraw

HEADS: Mapping[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT, TOKENS = 24, 6


@dataclass
class Sampler:
    """A pipeline and how to call it.

    Attributes:
        pipe: the pipeline.
        options: what its call gets besides a number of steps and a generator.
        calls: calls of the denoiser at one step.
    """

    pipe: Any
    options: dict[str, Any]
    calls: int = 1

    def __call__(self, steps: int = 6, seed: int = 1, **options: Any) -> Tensor:
        """Latents after a run from the noise of `seed`."""
        chosen = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
        }
        result: Tensor = self.pipe(**chosen | self.options | options, return_dict=False)[0]
        assert torch.isfinite(result).all()
        return result

    @property
    def denoisers(self) -> list[Any]:
        """Everything in the pipeline that `optimize` replaces, in order."""
        names = [name for name in ("transformer", "transformer_2") if getattr(self.pipe, name, None) is not None]
        return [getattr(self.pipe, name) for name in names]

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return self.pipe.scheduler


def lively(model: nn.Module) -> nn.Module:
    """Weights under which every block matters; those of norms lie around one, so that no block fades."""
    model = redraw(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
            weight.data += 1
    return model


def assembled(pipeline: Any, **components: Any) -> Any:
    """A pipeline of these components; the others are left out."""
    parameters = inspect.signature(pipeline.__init__).parameters.values()
    missing = {p.name: None for p in parameters if p.name != "self" and p.default is p.empty}
    pipe = pipeline(**missing | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(*, tokens: int = TOKENS, seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Embeddings of a prompt; more of them by name and shape."""
    generator = torch.Generator().manual_seed(seed)
    wanted = {"prompt_embeds": (1, tokens, TEXT), **shapes}
    return {name: torch.randn(shape, generator=generator) for name, shape in wanted.items()}


def both(positive: Mapping[str, Any], negative: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a prompt, and of the one that guidance goes away from."""
    return {**positive, **{f"negative_{name}": value for name, value in negative.items()}}


def mask(*lengths: int, size: int = TOKENS) -> Tensor:
    """One row per sample: ones for its tokens, zeros for padding."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()


def dit() -> Sampler:
    transformer = DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=1, sample_size=16, patch_size=2, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    pipe = assembled(DiTPipeline, transformer=lively(transformer), vae=vae.eval(), scheduler=DDIMScheduler())
    return Sampler(pipe, {"class_labels": [1, 2], "output_type": "pt"})


def pixart() -> Sampler:
    transformer = PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=32, sample_size=16, patch_size=2,
        caption_channels=TEXT, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler()
    prompt = text() | {"prompt_attention_mask": mask(4)}
    negative = text(seed=1) | {"prompt_attention_mask": mask(6)}
    options = both(prompt, negative) | {"negative_prompt": None, "use_resolution_binning": False}
    return Sampler(assembled(PixArtAlphaPipeline, transformer=lively(transformer), scheduler=scheduler), options)


def sd3() -> Sampler:
    transformer = SD3Transformer2DModel(
        **HEADS, sample_size=16, patch_size=2, in_channels=4, num_layers=2, caption_projection_dim=32,
        joint_attention_dim=TEXT, pooled_projection_dim=40, out_channels=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    prompts = [text(seed=seed, pooled_prompt_embeds=(1, 40)) for seed in (0, 1)]
    return Sampler(
        assembled(StableDiffusion3Pipeline, transformer=lively(transformer), scheduler=scheduler), both(*prompts)
    )


def flux_transformer() -> nn.Module:
    return lively(FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
        pooled_projection_dim=40, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ))  # fmt: skip


FLUX_PROMPTS = [text(seed=seed, pooled_prompt_embeds=(1, 40)) for seed in (0, 1)]


def flux(*, guided: bool = False) -> Sampler:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = assembled(FluxPipeline, transformer=flux_transformer(), scheduler=scheduler)
    options = both(*FLUX_PROMPTS) | {"true_cfg_scale": 3.0} if guided else dict(FLUX_PROMPTS[0])
    return Sampler(pipe, options | {"height": 64, "width": 64}, calls=2 if guided else 1)


@functools.cache
def flux_under_fora() -> Sampler:
    """FLUX that reuses at every other step, captured once for all tests that leave it as it was."""
    sampler = flux()
    optimize(sampler.pipe, FORA(interval=2), mode="eager")
    return sampler


def flux_img2img(*, guided: bool = False) -> Sampler:
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = assembled(FluxImg2ImgPipeline, transformer=flux_transformer(), scheduler=scheduler, vae=vae.eval())
    options = both(*FLUX_PROMPTS) | {"true_cfg_scale": 3.0} if guided else dict(FLUX_PROMPTS[0])
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Sampler(
        pipe, options | {"image": image, "height": 32, "width": 32, "strength": 0.7}, calls=2 if guided else 1
    )


def cogvideox() -> Sampler:
    transformer = CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=TEXT, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=9, max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipe = assembled(CogVideoXPipeline, transformer=lively(transformer), scheduler=CogVideoXDDIMScheduler())
    options = both(text(), text(seed=1)) | {"height": 64, "width": 64, "num_frames": 9}
    return Sampler(pipe, options)


def wan_transformer() -> nn.Module:
    return lively(WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=16, ffn_dim=64, num_layers=1,
        rope_max_seq_len=32,
    ))  # fmt: skip


def wan(**settings: Any) -> Sampler:
    """Wan 2.1; with ``transformer_2`` and ``boundary_ratio``, or ``expand_timesteps``, Wan 2.2."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = assembled(WanPipeline, transformer=wan_transformer(), scheduler=scheduler, **settings)
    options = both(text(tokens=8), text(tokens=8, seed=1)) | {"height": 64, "width": 64, "num_frames": 5}
    return Sampler(pipe, options, calls=2)


def wan22() -> Sampler:
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.875)


def hunyuan_video() -> Sampler:
    transformer = HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=TEXT, pooled_projection_dim=40, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = assembled(HunyuanVideoPipeline, transformer=lively(transformer), scheduler=scheduler)
    prompt = text(pooled_prompt_embeds=(1, 40)) | {"prompt_attention_mask": mask(4)}
    return Sampler(pipe, prompt | {"height": 64, "width": 64, "num_frames": 5})


def ltx() -> Sampler:
    transformer = LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=1, caption_channels=TEXT
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = assembled(LTXPipeline, transformer=lively(transformer), scheduler=scheduler)
    options = both(
        text() | {"prompt_attention_mask": mask(6)}, text(seed=1) | {"prompt_attention_mask": mask(4)}
    )  # fmt: skip
    return Sampler(pipe, options | {"height": 128, "width": 128, "num_frames": 9})


def qwen_image() -> Sampler:
    transformer = QwenImageTransformer2DModel(
        **HEADS, patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = assembled(QwenImagePipeline, transformer=lively(transformer), scheduler=scheduler)
    prompts = [text(seed=seed) | {"prompt_embeds_mask": mask(length)} for seed, length in ((0, 4), (1, 6))]
    return Sampler(pipe, both(*prompts) | {"height": 64, "width": 64, "true_cfg_scale": 4.0}, calls=2)


def sana() -> Sampler:
    transformer = SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=TEXT, sample_size=8,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = assembled(SanaPipeline, transformer=lively(transformer), scheduler=scheduler)
    prompts = [text(seed=seed) | {"prompt_attention_mask": mask(length)} for seed, length in ((0, 4), (1, 6))]
    options = both(*prompts) | {"negative_prompt": None, "use_resolution_binning": False}
    return Sampler(pipe, options | {"height": 256, "width": 256})


def lumina2() -> Sampler:
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16), cap_feat_dim=TEXT,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = assembled(Lumina2Pipeline, transformer=lively(transformer), scheduler=scheduler)
    prompts = [text(seed=seed) | {"prompt_attention_mask": mask(length)} for seed, length in ((0, 4), (1, 6))]
    return Sampler(pipe, both(*prompts) | {"height": 64, "width": 64}, calls=2)


PIPELINES: Mapping[str, Callable[[], Sampler]] = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "flux true CFG": partial(flux, guided=True),
    "flux img2img true CFG": partial(flux_img2img, guided=True),
    "cogvideox": cogvideox,
    "wan": wan,
    "wan 2.2": wan22,
    "hunyuan video": hunyuan_video,
    "ltx": ltx,
    "qwen image": qwen_image,
    "sana": sana,
    "lumina2": lumina2,
}


def kinds(plan: Any, times: int = 1) -> Counter[str]:
    """Calls by kind of step that a plan announces, if every step makes so many."""
    return Counter({kind: times * count for kind, count in Counter(step.kind for step in plan.steps).items()})
