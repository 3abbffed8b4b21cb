"""Stock pipelines that are given more than a text: pictures, films, masks, residuals; and films of a single frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    QwenImageEditPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    VisualClozePipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor, nn

from tests.pipelines import pipes
from tests.pipelines.pipes import FLUX_PROMPTS, HEADS, TEXT, Sampler, assembled, both, lively, mask, text

WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 64, "num_layers": 1,
       "rope_max_seq_len": 32}  # fmt: skip
FILM = {"height": 64, "width": 64, "num_frames": 5}
SHIFTED = partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True)
FLOW = partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def picture(size: int = 64, seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


class Seeded(Sampler):
    """What it is given is encoded with noise from torch's own generator."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(0)
        return super().__call__(*args, **kwargs)


def vae(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def wan_vae() -> nn.Module:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def prompts(tokens: int = 8) -> dict[str, Any]:
    return both(text(tokens=tokens), text(tokens=tokens, seed=1))


def vace() -> Sampler:
    """A film of which some frames are given, and a reference picture."""
    transformer = WanVACETransformer3DModel(**WAN | {"num_layers": 2}, vace_layers=[0], vace_in_channels=2 * 4 + 64)
    pipe = assembled(WanVACEPipeline, transformer=lively(transformer), vae=wan_vae(), scheduler=FLOW())
    film = [picture(seed=i) for i in range(5)]
    masks = [Image.new("L", (64, 64), 255 * (i > 0)) for i in range(5)]
    return Seeded(pipe, prompts() | FILM | {"video": film, "mask": masks, "reference_images": [picture()]}, calls=2)


def wan_image() -> Sampler:
    """Wan 2.1: the picture is told as channels, and as tokens of an image encoder."""
    transformer = WanTransformer3DModel(**WAN | {"in_channels": 12}, image_dim=24, added_kv_proj_dim=32)
    pipe = assembled(WanImageToVideoPipeline, transformer=lively(transformer), vae=wan_vae(), scheduler=FLOW())
    pipe.encode_image = lambda *_: torch.full((1, 5, 24), 0.2)
    return Sampler(pipe, prompts(tokens=512) | FILM | {"image": picture()}, calls=2)


def wan_first_frame() -> Sampler:
    """Wan 2.2 of 5 billion parameters: tokens of the picture have another time than those of the noise."""
    pipe = assembled(
        WanImageToVideoPipeline, transformer=pipes.wan_transformer(), vae=wan_vae(), scheduler=FLOW(),
        expand_timesteps=True,
    )  # fmt: skip
    return Sampler(pipe, prompts() | FILM | {"image": picture()}, calls=2)


def flux_kontext() -> Sampler:
    pipe = assembled(FluxKontextPipeline, transformer=pipes.flux_transformer(), vae=vae(), scheduler=SHIFTED())
    size = {"height": 32, "width": 32, "max_area": 32**2, "_auto_resize": False}
    return Sampler(pipe, dict(FLUX_PROMPTS[0]) | size | {"image": picture(32)})


def flux2_klein() -> Sampler:
    """Text and image tokens of one length, and many more of the reference."""
    transformer = Flux2Transformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT, guidance_embeds=False,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()  # fmt: skip
    pipe = assembled(Flux2KleinPipeline, transformer=lively(transformer), vae=encoder, scheduler=SHIFTED())
    return Sampler(pipe, prompts() | {"height": 32, "width": 32, "image": [picture()]}, calls=2)


class SmallEdit(QwenImageEditPipeline):
    """Encodes the picture as small as it is, instead of at a megapixel."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (32, 32, None)):
            return super().__call__(*args, **kwargs)


def qwen_image_edit() -> Sampler:
    sampler = pipes.qwen_image()
    torch.manual_seed(0)
    encoder = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = assembled(SmallEdit, transformer=sampler.pipe.transformer, vae=encoder, scheduler=SHIFTED())
    return Sampler(pipe, sampler.options | {"height": 32, "width": 32, "image": picture(32)}, calls=2)


def visual_cloze() -> Sampler:
    """Two pipelines within one: the second goes over what the first made, from the middle of the schedule."""
    transformer = FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=48, out_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=TEXT, pooled_projection_dim=40, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    pipe = assembled(
        VisualClozePipeline, transformer=lively(transformer), vae=vae(), scheduler=SHIFTED(), resolution=32
    )
    prompt = FLUX_PROMPTS[0]
    for part in (pipe.generation_pipe, pipe.upsampling_pipe):
        part.encode_prompt = lambda *_, **__: (*prompt.values(), torch.zeros(prompt["prompt_embeds"].shape[1], 3))
        part.set_progress_bar_config(disable=True)
    pictures = [[picture(32), picture(32, seed=1)], [picture(32, seed=2), None]]
    size = {"upsampling_height": 32, "upsampling_width": 32, "upsampling_strength": 0.6}
    return Seeded(
        pipe, size | {"task_prompt": "", "content_prompt": "", "image": pictures, "output_type": "pt"}
    )  # fmt: skip


class Words:
    """A tokenizer: every word is a token."""

    eos_token_id = 3

    def convert_tokens_to_ids(self, _: str) -> int:
        return 2

    def apply_chat_template(self, said: list[dict[str, str]], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[4 + len(word) for word in said[-1]["content"].split()])


def cosmos3(**settings: Any) -> Sampler:
    """Text tokens are part of the sequence, and guidance has fewer of them; the timestep has a name of its own."""
    transformer = Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, num_attention_heads=2,
        num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32, rope_axes_dim=[4, 2, 2],
    )  # fmt: skip
    pipe = assembled(
        Cosmos3OmniPipeline, transformer=lively(transformer), text_tokenizer=Words(), vae=wan_vae(), scheduler=FLOW(),
        enable_safety_checker=False,
    )  # fmt: skip
    options = {"prompt": "a cat walks home", "negative_prompt": "a dog", "add_duration_template": False}
    return Sampler(pipe, options | {"add_resolution_template": False} | FILM | settings, calls=2)


def framepack() -> Sampler:
    """A film in sections, each of which sees those before it, as views of a history that grows."""
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=TEXT, pooled_projection_dim=40, rope_axes_dim=(4, 6, 6), has_image_proj=True,
        image_proj_dim=12, has_clean_x_embedder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    ).eval()  # fmt: skip
    pipe = assembled(
        HunyuanVideoFramepackPipeline, transformer=lively(transformer), vae=encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.encode_image = lambda *_, **__: torch.full((1, 3, 12), 0.2)
    prompt = text(pooled_prompt_embeds=(1, 40)) | {"prompt_attention_mask": mask(4)}
    film = FILM | {"num_frames": 17, "latent_window_size": 3, "output_type": "pt"}
    return Seeded(pipe, prompt | film | {"image": picture()})


def skyreels_forcing() -> Sampler:
    """Every frame has a time of its own, though they are equal here; the second window sees the end of the first."""
    transformer = SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True)
    pipe = assembled(
        SkyReelsV2DiffusionForcingPipeline, transformer=lively(transformer), vae=wan_vae(), scheduler=FLOW()
    )
    film = FILM | {"num_frames": 21, "base_num_frames": 13, "overlap_history": 5, "fps": 16}
    return Sampler(pipe, prompts() | film | {"prompt": None}, calls=2)


def latte(frames: int) -> Sampler:
    transformer = LatteTransformer3DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=32, attention_bias=True,
        sample_size=8, patch_size=2, activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT, video_length=3,
    )  # fmt: skip
    pipe = assembled(LattePipeline, transformer=lively(transformer), scheduler=DDIMScheduler(), vae=vae())
    options = {"negative_prompt": None, "height": 16, "width": 16, "video_length": frames, "clean_caption": False}
    return Sampler(pipe, prompts() | options)


def one_frame(make: Callable[[], Sampler]) -> Sampler:
    """A film that is a picture: axes of one element."""
    sampler = make()
    sampler.options["num_frames"] = 1
    return sampler


CONDITIONED: Mapping[str, Callable[[], Sampler]] = {
    "vace": vace,
    "wan image": wan_image,
    "wan first frame": wan_first_frame,
    "flux kontext": flux_kontext,
    "flux 2 klein": flux2_klein,
    "qwen image edit": qwen_image_edit,
    "visual cloze": visual_cloze,
    "cosmos 3": cosmos3,
    "cosmos 3 one frame": partial(cosmos3, num_frames=1),
    "framepack": framepack,
    "skyreels forcing": skyreels_forcing,
    "latte": partial(latte, 3),
    "latte one frame": partial(latte, 1),
    "wan one frame": partial(one_frame, pipes.wan),
    "cogvideox one frame": partial(one_frame, pipes.cogvideox),
    "hunyuan video one frame": partial(one_frame, pipes.hunyuan_video),
    "ltx one frame": partial(one_frame, pipes.ltx),
}
