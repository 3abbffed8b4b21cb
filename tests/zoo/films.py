"""Tiny transformers of films, music and molecules, and our own stand-ins for other code bases."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from diffusers import (
    AceStepTransformer1DModel,
    AllegroTransformer3DModel,
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    Cosmos3OmniTransformer,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LatteTransformer3DModel,
    LongCatAudioDiTTransformer,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MiniMaxMusic3RVQDepthDecoder,
    MiniMaxMusic3Transformer1DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    RFD4ProteinaTransformer,
    SanaVideoTransformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.models import PlainDiT, plain_dit
from tests.stdit import SpatialTemporalDiT, stdit
from tests.uvit import UViT, uvit
from tests.zoo.case import Case

UNIT = tuple(round(0.9 - 0.1 * i, 1) for i in range(8))
THREE = ("self", "cross", "mlp")
AROUND = {"preprocess_conv": ("mlp",), "postprocess_conv": ("mlp",)}


def time(value: float = 500.0, batch: int = 2) -> Tensor:
    return torch.full((batch,), value)


def mask(*lengths: int, size: int) -> Tensor:
    """One row per sample: ones for its tokens, zeros for padding."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()


def rope(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, width // 2).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def eager_block_mask(*arguments: Any, _compile: bool, **options: Any) -> BlockMask:
    return create_block_mask(*arguments, **options)


WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
    "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def wan_inputs(channels: int = 4, text: int = 8) -> dict:
    return {
        "hidden_states": torch.randn(2, channels, 3, 8, 8),
        "timestep": time(),
        "encoder_hidden_states": torch.randn(2, text, 24),
        "return_dict": False,
    }


def wan_t2v() -> Case:
    return Case("WanTransformer3DModel [t2v]", lambda: WanTransformer3DModel(**WAN), wan_inputs, {"blocks.*": THREE})


def wan_token_times() -> Case:
    # Wan 2.2 of 5 billion: every token has its own time, so that the first frame may be given
    return Case("WanTransformer3DModel [time per token]", lambda: WanTransformer3DModel(**WAN),
                lambda: wan_inputs() | {"timestep": torch.full((2, 48), 500.0)}, {"blocks.*": THREE})  # fmt: skip


def wan_i2v() -> Case:
    def inputs() -> dict:
        # the length of the text is written into the attention: what is before the last 512 tokens is the image
        return wan_inputs(text=512) | {"encoder_hidden_states_image": torch.randn(2, 5, 24)}

    def make() -> WanTransformer3DModel:
        return WanTransformer3DModel(**WAN, image_dim=24, added_kv_proj_dim=32)

    # one cross add sums the attention to the text and the attention to the image
    return Case("WanTransformer3DModel [i2v]", make, inputs, {"blocks.*": THREE})


def chrono_edit() -> Case:
    def inputs() -> dict:
        inputs = wan_inputs(text=512) | {"encoder_hidden_states_image": torch.randn(2, 5, 24)}
        return inputs | {"hidden_states": torch.randn(2, 4, 2, 8, 8)}

    def make() -> ChronoEditTransformer3DModel:
        config = WAN | {"attention_head_dim": 24}
        return ChronoEditTransformer3DModel(**config, image_dim=24, added_kv_proj_dim=48)

    return Case("ChronoEditTransformer3DModel", make, inputs, {"blocks.*": THREE})


def any_flow() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 3, 4, 8, 8),
            "timestep": torch.full((2, 3), 500.0),
            "r_timestep": torch.full((2, 3), 50.0),
            "encoder_hidden_states": torch.randn(2, 8, 24),
            "return_dict": False,
        }

    return Case("AnyFlowTransformer3DModel", lambda: AnyFlowTransformer3DModel(**WAN), inputs, {"blocks.*": THREE})


def cogvideox() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 3, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500),
            "image_rotary_emb": rope(48, 16),
            "return_dict": False,
        }

    def make() -> CogVideoXTransformer3DModel:
        return CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=24, num_layers=3, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
            use_rotary_positional_embeddings=True,
        )  # fmt: skip

    # one MLP over picture and text, its result split between two adds; nothing reads the text after the last one
    return Case("CogVideoXTransformer3DModel", make, inputs, {
        "transformer_blocks.2": ("joint", "joint", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
    })  # fmt: skip


def ltx() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 32, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": time(),
            "encoder_attention_mask": mask(6, 4, size=6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "rope_interpolation_scale": (8 / 25, 32, 32),
            "return_dict": False,
        }

    def make() -> LTXVideoTransformer3DModel:
        return LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=24,
        )  # fmt: skip

    return Case("LTXVideoTransformer3DModel", make, inputs, {"transformer_blocks.*": THREE})


def ltx2(version: str) -> Case:
    newer = version == "2.3"

    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 32, 8),
            "audio_hidden_states": torch.randn(2, 10, 8),
            "encoder_hidden_states": torch.randn(2, 6, 32 if newer else 24),
            "audio_encoder_hidden_states": torch.randn(2, 6, 16 if newer else 24),
            "timestep": time(),
            "sigma": time(),
            "encoder_attention_mask": mask(6, 4, size=6),
            "audio_encoder_attention_mask": mask(6, 4, size=6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "fps": 25.0,
            "audio_num_frames": 10,
            "use_cross_timestep": newer,
            "return_dict": False,
        }

    def make() -> LTX2VideoTransformer3DModel:
        return LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=2, caption_channels=24, gated_attn=newer,
            cross_attn_mod=newer, audio_gated_attn=newer, audio_cross_attn_mod=newer, perturbed_attn=newer,
            use_prompt_embeddings=not newer, rope_type="split" if newer else "interleaved",
        )  # fmt: skip

    # film and sound in turn: own tokens, text, then each the other; both come out
    return Case(f"LTX2VideoTransformer3DModel [{version}]", make, inputs, {
        "transformer_blocks.*": ("self", "self", "cross", "cross", "cross", "cross", "mlp", "mlp"),
    })  # fmt: skip


def mochi() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": time(),
            "encoder_attention_mask": mask(6, 4, size=6).bool(),
            "return_dict": False,
        }

    def make() -> MochiTransformer3DModel:
        return MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=24, time_embed_dim=16, max_sequence_length=6,
        )  # fmt: skip

    # the last block drops the text
    return Case("MochiTransformer3DModel", make, inputs, {
        "transformer_blocks.2": ("joint", "mlp"),
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
    }, timesteps=tuple(float(t) for t in range(100, 900, 100)))  # fmt: skip


def hunyuan_video15(image: bool) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 9, 2, 4, 4),
            "timestep": time(),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 4, size=6),
            "encoder_hidden_states_2": torch.randn(2, 4, 20),
            "encoder_attention_mask_2": mask(4, 2, size=4),
            "image_embeds": torch.randn(2, 3, 12) if image else torch.zeros(2, 3, 12),
            "return_dict": False,
        }

    def make() -> HunyuanVideo15Transformer3DModel:
        return HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
            num_refiner_layers=2, text_embed_dim=24, text_embed_2_dim=20, image_embed_dim=12, rope_axes_dim=(4, 6, 6),
            task_type="i2v" if image else "t2v",
        )  # fmt: skip

    # nothing reads the text after the last attention
    return Case(f"HunyuanVideo15Transformer3DModel [{'i2v' if image else 't2v'}]", make, inputs, {
        "context_embedder.token_refiner.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.2": ("joint", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
    })  # fmt: skip


def hunyuan_framepack(batch: int) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 8),
            "timestep": time(batch=batch),
            "encoder_hidden_states": torch.randn(batch, 6, 24),
            "encoder_attention_mask": mask(4, 6, size=6)[:batch],
            "pooled_projections": torch.randn(batch, 20),
            "image_embeds": torch.randn(batch, 3, 12),
            "indices_latents": torch.arange(10, 13),
            "guidance": time(6000.0, batch),
            "latents_clean": torch.randn(batch, 4, 2, 8, 8),
            "indices_latents_clean": torch.tensor([0, 9]),
            "latents_history_2x": torch.randn(batch, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(7, 9),
            "latents_history_4x": torch.randn(batch, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(3, 7),
            "return_dict": False,
        }

    def make() -> HunyuanVideoFramepackTransformer3DModel:
        return HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=2, text_embed_dim=24, pooled_projection_dim=20,
            rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True,
        )  # fmt: skip

    # the pipeline calls with one sample, and the text is then cut to the length that its mask holds
    return Case(f"HunyuanVideoFramepackTransformer3DModel [batch {batch}]", make, inputs, {
        "context_embedder.token_refiner.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    })  # fmt: skip


def latte() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 3, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500),
            "enable_temporal_attentions": True,
            "return_dict": False,
        }

    def make() -> LatteTransformer3DModel:
        return LatteTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=32, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=24,
            video_length=3,
        )  # fmt: skip

    return Case("LatteTransformer3DModel", make, inputs, {
        "transformer_blocks.*": THREE,
        "temporal_transformer_blocks.*": ("self", "mlp"),
    })  # fmt: skip


def allegro() -> Case:
    def inputs() -> dict:
        *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 3, (2.2, 2.0, 2.0))
        return {
            "hidden_states": torch.randn(2, 4, 3, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 4, size=6),
            "timestep": torch.full((2,), 500),
            "image_rotary_emb": (tuple(frequencies), torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None]),
            "return_dict": False,
        }

    def make() -> AllegroTransformer3DModel:
        return AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=3, caption_channels=24,
        )  # fmt: skip

    return Case("AllegroTransformer3DModel", make, inputs, {"transformer_blocks.*": THREE})


COSMOS = {
    "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2,
    "adaln_lora_dim": 8, "max_size": (4, 8, 8), "concat_padding_mask": False,
}  # fmt: skip
# without torchvision diffusers cannot resize the padding mask, an input channel of zeros


def cosmos1() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "timestep": time(0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "fps": 30,
            "padding_mask": torch.zeros(1, 1, 64, 64),
            "return_dict": False,
        }

    def make() -> CosmosTransformer3DModel:
        return CosmosTransformer3DModel(**COSMOS, in_channels=4, text_embed_dim=24)

    # every block adds the learned positions to the stream again, which is no branch; time is a quarter of log sigma
    return Case("CosmosTransformer3DModel [1.0]", make, inputs, {"transformer_blocks.*": THREE},
                timesteps=(1.0, 0.7, 0.4, 0.1, -0.2, -0.5, -0.8, -1.1, -1.4))  # fmt: skip


def cosmos2() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "timestep": torch.full((2, 1, 2, 1, 1), 0.5),
            "encoder_hidden_states": (torch.randn(2, 6, 24), torch.randn(2, 5, 12)),
            "condition_mask": torch.cat([torch.ones(2, 1, 1, 8, 8), torch.zeros(2, 1, 1, 8, 8)], dim=2),
            "padding_mask": torch.zeros(1, 1, 64, 64),
            "return_dict": False,
        }

    def make() -> CosmosTransformer3DModel:
        return CosmosTransformer3DModel(
            **COSMOS, in_channels=5, text_embed_dim=20, extra_pos_embed_type=None, use_crossattn_projection=True,
            crossattn_proj_in_channels=24, encoder_hidden_states_channels=20, img_context_dim_in=12,
            img_context_num_tokens=5, img_context_dim_out=32,
        )  # fmt: skip

    # one cross add sums the attention to the text and the attention to the image
    return Case("CosmosTransformer3DModel [2.5]", make, inputs, {"transformer_blocks.*": THREE}, timesteps=UNIT)


def wan_vace() -> Case:
    def inputs() -> dict:
        control = {"control_hidden_states": torch.randn(2, 8, 3, 8, 8), "control_hidden_states_scale": torch.ones(2)}
        return wan_inputs() | control

    def make() -> WanVACETransformer3DModel:
        return WanVACETransformer3DModel(**WAN | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=8)

    # after the blocks 0 and 2 the model itself adds a projection of the control stream to the stream
    return Case("WanVACETransformer3DModel", make, inputs, {"vace_blocks.*": THREE, "blocks.*": THREE})


def wan_animate() -> Case:
    def inputs() -> dict:
        return wan_inputs(channels=12, text=512) | {
            "encoder_hidden_states_image": torch.randn(2, 5, 24),
            "pose_hidden_states": torch.randn(2, 4, 2, 8, 8),
            "face_pixel_values": torch.randn(2, 3, 8, 16, 16),
            "motion_encode_batch_size": 8,
        }

    def make() -> WanAnimateTransformer3DModel:
        return WanAnimateTransformer3DModel(
            **WAN | {"in_channels": 12, "num_layers": 4}, latent_channels=4, image_dim=24, added_kv_proj_dim=32,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=16,
            motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )  # fmt: skip

    # the model itself adds the face adapters after every second block; the encoder of faces knows nothing of noise or
    # time, and the skips of its blocks are convolutions
    return Case("WanAnimateTransformer3DModel", make, inputs, {"blocks.*": THREE, "face_adapter.*": ("cross",)})


def skyreels_t2v() -> Case:
    return Case(
        "SkyReelsV2Transformer3DModel [t2v]", lambda: SkyReelsV2Transformer3DModel(**WAN), wan_inputs,
        {"blocks.*": THREE},
    )  # fmt: skip


def skyreels_forcing() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(1, 4, 4, 8, 8),
            "timestep": torch.full((1, 4), 500.0),
            "encoder_hidden_states": torch.randn(1, 8, 24),
            "enable_diffusion_forcing": True,
            "fps": [1],
            "return_dict": False,
        }

    def make() -> SkyReelsV2Transformer3DModel:
        return SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True, num_frame_per_block=2)

    # a time for every frame; the embedding of the frame rate is added in the right shape to one sample only
    return Case("SkyReelsV2Transformer3DModel [diffusion forcing]", make, inputs, {"blocks.*": THREE})


def sana_video() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 4, size=6),
            "timestep": time(),
            "return_dict": False,
        }

    def make() -> SanaVideoTransformer3DModel:
        return SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
            mlp_ratio=2.0, sample_size=8, rope_max_seq_len=32,
        )  # fmt: skip

    # linear attention; the MLP of convolutions has a residual convolution over time inside, which is no stream
    return Case("SanaVideoTransformer3DModel", make, inputs, {"transformer_blocks.*": THREE})


def minimax_h3() -> Case:
    def inputs() -> dict:
        rows = torch.arange(30)
        return {
            "hidden_states": torch.randn(1, 16, 16),
            "audio_hidden_states": torch.randn(1, 8, 8),
            "encoder_hidden_states": torch.randn(1, 6, 24),
            "timestep": time(0.5),
            "timestep_indices": (rows >= 22).long(),
            "token_tags": (rows >= 6).long() + (rows >= 22).long(),
            "position_ids": torch.stack([rows, rows % 4, rows // 4], dim=1),
            "text_indices": rows[:6],
            "video_indices": rows[6:22],
            "audio_indices": rows[22:],
            "return_dict": False,
        }

    def make() -> MiniMaxH3Transformer3DModel:
        return MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=2,
            ffn_dim=64, in_channels=4, audio_in_channels=8, text_dim=24, freq_dim=16, time_embed_hidden_dim=32,
            time_embed_dim=16, rope_freq_dim=2,
        )  # fmt: skip

    # text, film and sound are rows of one stream, scattered into it with index_copy; time 1 is the finished film
    return Case("MiniMaxH3Transformer3DModel", make, inputs, {
        "token_refiner.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.*": ("self", "mlp"),
    }, timesteps=UNIT[::-1])  # fmt: skip


def consis_id() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 3, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500),
            "image_rotary_emb": rope(48, 24),
            "id_cond": torch.randn(2, 12),
            "id_vit_hidden": [torch.randn(2, 5, 16) for _ in range(2)],
            "return_dict": False,
        }

    def make() -> ConsisIDTransformer3DModel:
        return ConsisIDTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=24, num_layers=4, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
            use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=16,
            cross_attn_num_heads=2, LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2,
            LFE_num_id_token=2, LFE_num_querie=4, LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=2,
        )  # fmt: skip

    # the model itself adds the perceivers, after every second block; the extractor knows nothing of noise or time, its
    # keys are of the face and of its own queries, but the face is no stream; of the text after the last block only
    # rows are made that are cut off in the end
    return Case("ConsisIDTransformer3DModel", make, inputs, {
        "local_facial_extractor.layers.*": ("self", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
        "perceiver_cross_attention.*": ("cross",),
    })  # fmt: skip


def temporal() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(6, 32, 4, 4),
            "timestep": torch.full((2,), 500),
            "num_frames": 3,
            "return_dict": False,
        }

    def make() -> TransformerTemporalModel:
        return TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, norm_num_groups=8,
            cross_attention_dim=24,
        )  # fmt: skip

    # a part of a U-Net; without adaptive norms it drops the timestep. Both attentions are of its own tokens. Around the
    # blocks the model adds its input again.
    return Case("TransformerTemporalModel", make, inputs, {"transformer_blocks.*": ("self", "self", "mlp")})


def spatio_temporal() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(6, 32, 4, 4),
            "encoder_hidden_states": torch.randn(6, 1, 24),
            "image_only_indicator": torch.zeros(2, 3),
            "return_dict": False,
        }

    def make() -> TransformerSpatioTemporalModel:
        return TransformerSpatioTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, cross_attention_dim=24
        )

    # a part of a U-Net that is told no timestep: every call is a step. A temporal block starts from the spatial
    # stream plus the places of the frames, and its result is blended with the spatial stream. Around the blocks the
    # model adds its input again.
    return Case("TransformerSpatioTemporalModel", make, inputs, {
        "transformer_blocks.*": THREE,
        "temporal_transformer_blocks.*": ("mlp", "self", "cross", "mlp"),
    }, timesteps=UNIT, timestep="hidden_states")  # fmt: skip


def ace_step() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 24, 4),
            "timestep": time(0.5),
            "timestep_r": time(0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "context_latents": torch.randn(2, 24, 8),
            "return_dict": False,
        }

    def make() -> AceStepTransformer1DModel:
        return AceStepTransformer1DModel(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=24,
        )  # fmt: skip

    return Case("AceStepTransformer1DModel", make, inputs, {"layers.*": THREE}, timesteps=UNIT)


def stable_audio() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 24),
            "timestep": time(0.5, batch=1),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "global_hidden_states": torch.randn(2, 1, 20),
            "rotary_embedding": get_1d_rotary_pos_embed(8, 25, use_real=True, repeat_interleave_real=False),
            "return_dict": False,
        }

    def make() -> StableAudioDiTModel:
        return StableAudioDiTModel(
            sample_size=24, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=16,
            global_states_input_dim=20, cross_attention_input_dim=24,
        )  # fmt: skip

    # time is a token, nothing is modulated; around the blocks the model adds convolutions of its input and its output
    return Case("StableAudioDiTModel", make, inputs, {"transformer_blocks.*": THREE} | AROUND, timesteps=UNIT)


def stable_audio3(inpaint: bool) -> Case:
    def inputs() -> dict:
        inputs = {
            "hidden_states": torch.randn(2, 4, 24),
            "timestep": time(0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "global_hidden_states": torch.randn(2, 20),
            "encoder_attention_mask": mask(6, 4, size=6),
            "return_dict": False,
        }
        return inputs | ({"local_add_cond": torch.randn(2, 5, 24)} if inpaint else {})

    def make() -> StableAudio3DiTModel:
        return StableAudio3DiTModel(
            io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=24, global_cond_dim=20,
            local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2.0, num_memory_tokens=4,
        )  # fmt: skip

    # every attention is a difference of two; around the blocks the model adds convolutions of its input and its
    # output; to inpaint, each block adds an MLP of the condition, not of the stream, to the tokens after the memory
    return Case(f"StableAudio3DiTModel [{'inpaint' if inpaint else 'text'}]", make, inputs,
                {"transformer_blocks.*": THREE} | AROUND, timesteps=UNIT)  # fmt: skip


def longcat_audio() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 24, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 4, size=6).bool(),
            "timestep": time(0.5),
            "attention_mask": mask(24, 20, size=24).bool(),
            "latent_cond": torch.randn(2, 24, 4),
            "return_dict": False,
        }

    def make() -> LongCatAudioDiTTransformer:
        return LongCatAudioDiTTransformer(
            dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=24, latent_dim=4, ff_mult=2.0
        )  # fmt: skip

    # the convolutions of the text know nothing of noise or time; a long skip adds the first stream to the last
    return Case("LongCatAudioDiTTransformer", make, inputs, {
        "text_conv_layer.*": ("mlp",),
        "blocks.*": THREE,
    }, timesteps=UNIT[::-1])  # fmt: skip


def easy_animate() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 3, 8, 8),
            "timestep": time(),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "return_dict": False,
        }

    def make() -> EasyAnimateTransformer3DModel:
        return EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
            sample_height=8, num_layers=3, mmdit_layers=2, time_embed_dim=16, text_embed_dim=24,
            add_norm_text_encoder=True,
        )  # fmt: skip

    # the last block has one MLP for both streams, but nothing reads the text after the last attention
    return Case("EasyAnimateTransformer3DModel", make, inputs, {
        "transformer_blocks.2": ("joint", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
    })  # fmt: skip


def helios() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 3, 8, 8),
            "timestep": time(),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "indices_hidden_states": torch.arange(8, 11).expand(2, -1),
            "indices_latents_history_short": torch.tensor([[0, 7]]).expand(2, -1),
            "indices_latents_history_mid": torch.arange(5, 7).expand(2, -1),
            "indices_latents_history_long": torch.arange(1, 5).expand(2, -1),
            "latents_history_short": torch.randn(2, 4, 2, 8, 8),
            "latents_history_mid": torch.randn(2, 4, 2, 8, 8),
            "latents_history_long": torch.randn(2, 4, 4, 8, 8),
            "return_dict": False,
        }

    def make() -> HeliosTransformer3DModel:
        return HeliosTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
            ffn_dim=64, num_layers=2, rope_dim=(4, 6, 6),
        )  # fmt: skip

    # the cross add is on the part of the stream that is not history, cut out and put back
    return Case("HeliosTransformer3DModel", make, inputs, {"blocks.*": THREE})


def kandinsky5() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 2, 8, 8, 9),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": time(),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
            "scale_factor": (1.0, 2.0, 2.0),
            "sparse_params": None,
            "return_dict": False,
        }

    def make() -> Kandinsky5Transformer3DModel:
        return Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=64,
            num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True,
        )  # fmt: skip

    return Case("Kandinsky5Transformer3DModel", make, inputs, {
        "text_transformer_blocks.*": ("self", "mlp"),
        "visual_transformer_blocks.*": THREE,
    })  # fmt: skip


def kandinsky6(audio: bool) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 2, 8, 8, 9),
            "audio_hidden_states": torch.randn(2, 10, 5) if audio else None,
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": time(),
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
            "return_dict": False,
        }

    def make() -> Kandinsky6Transformer3DModel:
        return Kandinsky6Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, model_dim=32, ff_dim=64,
            num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=5, out_audio_dim=5,
            model_dim_a=24, ff_dim_a=48, axes_dims_a=(4, 4, 4),
        )  # fmt: skip

    # film, then sound: own tokens; sound, then film: text; film, then sound: each other; without sound nobody reads the
    # text made for it
    fused = ("self", "self", "cross", "cross", "cross", "cross", "mlp", "mlp")
    return Case(f"Kandinsky6Transformer3DModel [{'audio' if audio else 'silent'}]", make, inputs, {
        "video_text_transformer_blocks.*": ("self", "mlp"),
        "audio_text_transformer_blocks.*": ("self", "mlp") if audio else (),
        "visual_transformer_blocks.*": fused if audio else THREE,
    })  # fmt: skip


def kandinsky6_sr() -> Case:
    def inputs() -> dict:
        return {"hidden_states": torch.randn(2, 3, 8, 8, 9), "timestep": time(), "return_dict": False}

    def make() -> Kandinsky6SRTransformer3DModel:
        return Kandinsky6SRTransformer3DModel(
            in_visual_dim=4, out_visual_dim=8, time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=2,
            axes_dims=(4, 6, 6), nabla_window=(1, 1, 1),
        )  # fmt: skip

    # flex_attention with a mask of blocks that depends on the queries
    return Case("Kandinsky6SRTransformer3DModel", make, inputs, {"visual_transformer_blocks.*": ("self", "mlp")})


def motif_video() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 9, 2, 8, 8),
            "timestep": time(),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 4, size=6),
            "image_embeds": torch.randn(2, 3, 12),
            "return_dict": False,
        }

    def make() -> MotifVideoTransformer3DModel:
        return MotifVideoTransformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=4, num_decoder_layers=2, text_embed_dim=24, image_embed_dim=12, rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
        )  # fmt: skip

    # the queries of the cross attention are the result of the joint one, so that its branch holds both; the last two
    # blocks start from the noisy tokens again, with the stream so far in the place of the text
    return Case("MotifVideoTransformer3DModel", make, inputs, {
        "transformer_blocks.*": ("joint", "joint", "joint", "mlp", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    })  # fmt: skip


def cosmos3() -> Case:
    def inputs() -> dict:
        return {
            "input_ids": torch.arange(6),
            "text_indexes": torch.arange(6),
            "position_ids": torch.arange(38).expand(3, -1),
            "und_len": 6,
            "sequence_length": 38,
            "vision_tokens": [torch.randn(1, 4, 2, 8, 8)],
            "vision_token_shapes": [(2, 4, 4)],
            "vision_sequence_indexes": torch.arange(6, 38),
            "vision_mse_loss_indexes": torch.arange(6, 38),
            "vision_timesteps": time(batch=32),
            "vision_noisy_frame_indexes": [torch.arange(2)],
            "return_dict": False,
        }

    def make() -> Cosmos3OmniTransformer:
        return Cosmos3OmniTransformer(
            head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32, rope_axes_dim=[4, 2, 2],
        )  # fmt: skip

    # text, then film. The text sees itself only and no time. Its last results are joined to the film's and so are made,
    # though no prediction comes from their rows.
    return Case("Cosmos3OmniTransformer", make, inputs, {
        "layers.*": ("self", "joint", "mlp", "mlp"),
    }, timestep="vision_timesteps", latent="vision_tokens")  # fmt: skip


def sana_wm_refiner() -> Case:
    def inputs() -> dict:
        cache = SanaWMRefinerKVCache(2)
        for layer in cache.layer_caches:
            layer.store_sink(torch.randn(2, 16, 32), torch.randn(2, 16, 32))
            layer.store_history(torch.randn(2, 16, 32), torch.randn(2, 16, 32))
        cache.sink_pe = rope(16, 32)
        return {
            "hidden_states": torch.randn(2, 32, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2, 32), 500.0),
            "video_rotary_emb": rope(32, 32),
            "encoder_attention_mask": mask(6, 4, size=6),
            "kv_cache": cache,
            "kv_cache_mode": "inject",
            "return_dict": False,
        }

    def make() -> SanaWMLTX2RefinerTransformer3DModel:
        return SanaWMLTX2RefinerTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=2, caption_channels=24,
        )  # fmt: skip

    # the keys of its own tokens follow cached ones of earlier chunks; the layers for sound are never called
    return Case("SanaWMLTX2RefinerTransformer3DModel", make, inputs, {"transformer_blocks.*": THREE})


def minimax_music3() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 4, 24),
            "timestep": time(0.5),
            "encoder_hidden_states": torch.randn(2, 24, 8),
            "return_dict": False,
        }

    def make() -> MiniMaxMusic3Transformer1DModel:
        return MiniMaxMusic3Transformer1DModel(
            in_channels=4, condition_dim=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=16,
        )  # fmt: skip

    # time is a token, nothing is modulated; around the blocks the model adds convolutions of its input and its output
    return Case("MiniMaxMusic3Transformer1DModel", make, inputs, {"transformer_blocks.*": ("self", "mlp")} | AROUND,
                timesteps=UNIT[::-1])  # fmt: skip


def minimax_depth_decoder() -> Case:
    def make() -> MiniMaxMusic3RVQDepthDecoder:
        return MiniMaxMusic3RVQDepthDecoder(
            hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=64, audio_vocab_size=16,
            num_codebooks=4, max_position_embeddings=8,
        )  # fmt: skip

    # predicts codes, knows no time: its only input stands in; the heads are called from outside
    return Case("MiniMaxMusic3RVQDepthDecoder", make, lambda: {"inputs_embeds": torch.randn(2, 8, 32)},
                {"layers.*": ("self", "mlp")}, timesteps=UNIT, timestep="inputs_embeds",
                latent="inputs_embeds")  # fmt: skip


def t5_film() -> Case:
    def inputs() -> dict:
        tokens = [(torch.randn(2, 6, 32), mask(6, 4, size=6)), (torch.randn(2, 8, 32), mask(8, 8, size=8))]
        return {
            "encodings_and_masks": tokens,
            "decoder_input_tokens": torch.randn(2, 16, 12),
            "decoder_noise_time": time(0.5),
        }

    def make() -> T5FilmDecoder:
        return T5FilmDecoder(input_dims=12, targets_length=16, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64)

    # the adds are in the three layers of a block, which have no gates
    return Case("T5FilmDecoder", make, inputs, {"decoders.*": THREE}, timesteps=UNIT,
                timestep="decoder_noise_time", latent="decoder_input_tokens")  # fmt: skip


def rfd4_proteina() -> Case:
    def inputs() -> dict:
        residues = torch.arange(16).expand(2, -1)
        return {
            "bb_ca": torch.randn(2, 16, 3),
            "local_latents": torch.randn(2, 16, 4),
            "bb_ca_time": time(0.5),
            "local_latents_time": time(0.5),
            "padding_mask": mask(16, 12, size=16).bool(),
            "token_type": residues % 4,
            "conditioning": {
                "is_in_context_conditioning": residues == 0,
                "supports_local_latent": residues % 4 < 3,
                "molecule_iid": residues // 8,
                "token_bond_path_length": (residues[:, :, None] - residues[:, None]).abs(),
            },
            "return_dict": False,
        }

    def make() -> RFD4ProteinaTransformer:
        return RFD4ProteinaTransformer(
            nlayers=4, token_dim=32, nheads=2, dim_cond=16, pair_repr_dim=12, latent_dim=4, token_type_emb_dim=4,
            cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=6, tri_mult_c=8, num_sequence_classes=10,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair", "token_bond_path_length"),
        )  # fmt: skip

    # pairs of residues bias the attention and are a stream of their own: products along the two sides of triangles, in
    # which pairs see each other, and an MLP, after every second block; the outer product of the residues that is added
    # first does not read that stream. Time 1 is the finished protein.
    return Case("RFD4ProteinaTransformer", make, inputs, {
        "transformer_layers.*": ("self", "mlp"),
        "pair_update_layers.*": ("self", "self", "mlp"),
    }, timesteps=UNIT[::-1], timestep="bb_ca_time", latent="bb_ca")  # fmt: skip


def sana_wm() -> Case:
    def inputs() -> dict:
        pose = torch.eye(4).repeat(2, 3, 1, 1)
        pose[..., :3, 3] = torch.randn(2, 3, 3)
        lens = torch.tensor([6.0, 6.0, 2.0, 2.0]).expand(2, 3, -1)
        return {
            "hidden_states": torch.randn(2, 4, 3, 4, 4),
            "timestep": torch.full((2, 1, 3), 500.0),
            "encoder_hidden_states": torch.randn(2, 1, 6, 24),
            "mask": mask(6, 4, size=6),
            "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
            "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
            "chunk_plucker": torch.randn(2, 6, 3, 4, 4),
            "return_dict": False,
        }

    def make() -> SanaWMTransformer3DModel:
        return SanaWMTransformer3DModel(
            in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
            chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=3, image_size=128, caption_channels=24,
            mlp_ratio=2.0,
        )  # fmt: skip

    # every second block has softmax attention (in bfloat16), the others a gated delta rule, by a scan over frames; both
    # sum the attention of the tokens and that of their camera rays. After it, all but the last block add a projection
    # of the rays, not of the stream. The MLP is of convolutions.
    return Case("SanaWMTransformer3DModel", make, inputs, {"blocks.*": THREE})


def wan_animate2() -> Case:
    def inputs() -> dict:
        cache = WanAnimate2KVCache(2)
        for layer in cache.layer_caches:
            layer.store(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
        return {
            "hidden_states": [torch.randn(4, 3, 8, 8)],
            "timestep": time(batch=1),
            "encoder_hidden_states": [torch.randn(6, 24)],
            "condition_latents": [torch.randn(8, 3, 8, 8)],
            "kv_cache": cache,
            "kv_cache_mode": "cached",
            "seq_len": 48,
            "encoder_hidden_states_image": torch.randn(1, 5, 1280),
            "reference_grid_sizes": torch.tensor([[2, 4, 4]]),
            "origin_len": 5,
            "origin_area": [64, 64],
            "return_dict": False,
        }

    def make() -> WanAnimate2Transformer3DModel:
        model = WanAnimate2Transformer3DModel(
            text_len=8, in_dim=12, dim=32, ffn_dim=64, freq_dim=16, text_dim=24, out_dim=4, num_heads=2, num_layers=2
        )
        # the model compiles the making of its mask at the first call, and keeps it
        with mock.patch.object(transformer_wan_animate_2, "create_block_mask", eager_block_mask):
            model.block_masks[2, 16] = model.create_mask(2, 16, torch.device("cpu"))
        return model

    # flex_attention to its own tokens and to cached ones of the reference
    return Case("WanAnimate2Transformer3DModel", make, inputs, {"blocks.*": THREE})


def any_flow_far() -> Case:
    def inputs() -> dict:
        cached = {"num_cached_chunks": 3, "is_cache_step": False}
        caches = {
            layer: {"full_cache": torch.randn(2, 2, 2, 96, 16), "compressed_cache": torch.randn(2, 2, 2, 16, 16)}
            for layer in range(2)
        }
        return {
            "hidden_states": torch.randn(2, 2, 4, 8, 8),
            "timestep": torch.full((2, 2), 500.0),
            "r_timestep": torch.full((2, 2), 50.0),
            "encoder_hidden_states": torch.randn(2, 8, 24),
            "chunk_partition": [1, 2, 2, 2],
            "kv_cache": caches,
            "kv_cache_flag": cached,
            "return_dict": False,
        }

    def make() -> AnyFlowFARTransformer3DModel:
        return AnyFlowFARTransformer3DModel(**WAN, full_chunk_limit=3, chunk_partition=(1, 2, 2, 2))

    # flex_attention to its own tokens and to cached ones of earlier chunks, the oldest of them compressed
    return Case("AnyFlowFARTransformer3DModel", make, inputs, {"blocks.*": THREE},
                impossible="writes to a list, dictionary or object among its arguments")  # fmt: skip


def own_stdit(matmul: bool) -> Case:
    def inputs() -> dict:
        return stdit().inputs | ({"mask": mask(6, 4, size=6)} if matmul else {})

    # without SDPA, and with the text packed by its mask, as the code of Open-Sora has it
    return Case(f"STDiT3 [{'matmul, text mask' if matmul else 'SDPA'}]", lambda: SpatialTemporalDiT(2, matmul=matmul),
                inputs, {"spatial_blocks.*": THREE, "temporal_blocks.*": THREE}, latent="latent")  # fmt: skip


def own_uvit() -> Case:
    return Case("UViT", UViT, lambda: uvit().inputs, {
        "in_blocks.*": ("self", "mlp"),
        "mid_block": ("self", "mlp"),
        "out_blocks.*": ("self", "mlp"),
    }, timestep="timesteps", latent="x")  # fmt: skip


def own_dit() -> Case:
    return Case("PlainDiT", PlainDiT, lambda: plain_dit().inputs, {"blocks.*": ("self", "mlp")},
                timestep="t", latent="x")  # fmt: skip


CASES = (
    wan_t2v(), wan_i2v(), wan_token_times(), cogvideox(), ltx(), ltx2("2.0"), ltx2("2.3"), mochi(),
    hunyuan_video15(image=False), hunyuan_video15(image=True), hunyuan_framepack(1), hunyuan_framepack(2), allegro(),
    latte(), any_flow(), chrono_edit(), cosmos1(), cosmos2(),
    wan_vace(), wan_animate(), skyreels_t2v(), skyreels_forcing(), sana_video(), minimax_h3(), consis_id(), temporal(),
    spatio_temporal(), ace_step(), stable_audio(), stable_audio3(inpaint=False),
    stable_audio3(inpaint=True), longcat_audio(),
    easy_animate(), helios(), kandinsky5(), kandinsky6(audio=True), kandinsky6(audio=False), kandinsky6_sr(),
    motif_video(), cosmos3(), sana_wm_refiner(), minimax_music3(), minimax_depth_decoder(), t5_film(), rfd4_proteina(),
    sana_wm(), wan_animate2(), any_flow_far(),
    own_stdit(matmul=False), own_stdit(matmul=True), own_uvit(), own_dit(),
)  # fmt: skip
