"""Tiny transformers of films, music and molecules, and our own stand-ins for other code bases."""

from __future__ import annotations

import torch
from diffusers import (
    AceStepTransformer1DModel,
    AllegroTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    LatteTransformer3DModel,
    LongCatAudioDiTTransformer,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MochiTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from torch import Tensor

from tests.zoo.case import Case

UNIT = tuple(round(0.9 - 0.1 * i, 1) for i in range(8))
THREE = ("self", "cross", "mlp")


def time(value: float = 500.0, batch: int = 2) -> Tensor:
    return torch.full((batch,), value)


def mask(*lengths: int, size: int) -> Tensor:
    """One row per sample: ones for its tokens, zeros for padding."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()


def rope(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, width // 2).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


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

    # one MLP over picture and text, its result split between two adds; nothing reads the text after the last attention
    return Case("CogVideoXTransformer3DModel", make, inputs, {
        "transformer_blocks.2": ("joint", "mlp"),
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


def ltx2() -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": torch.randn(2, 32, 8),
            "audio_hidden_states": torch.randn(2, 10, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "audio_encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": time(),
            "sigma": time(),
            "encoder_attention_mask": mask(6, 4, size=6),
            "audio_encoder_attention_mask": mask(6, 4, size=6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "fps": 25.0,
            "audio_num_frames": 10,
            "return_dict": False,
        }

    def make() -> LTX2VideoTransformer3DModel:
        return LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=2, caption_channels=24,
        )  # fmt: skip

    # film and sound in turn: own tokens, text, then each the other; both come out
    return Case("LTX2VideoTransformer3DModel", make, inputs, {
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
    # keys are of the face and of its own queries; nothing reads the text after the last attention but the last norm,
    # row by row, of which only the rows of the picture are kept
    return Case("ConsisIDTransformer3DModel", make, inputs, {
        "local_facial_extractor.layers.*": ("joint", "mlp"),
        "transformer_blocks.3": ("joint", "mlp"),
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

    # a part of a U-Net that is told no timestep: its context stands in. A temporal block starts from the spatial
    # stream plus the places of the frames, and its result is blended with the spatial stream. Around the blocks the
    # model adds its input again.
    return Case("TransformerSpatioTemporalModel", make, inputs, {
        "transformer_blocks.*": THREE,
        "temporal_transformer_blocks.*": ("mlp", "self", "cross", "mlp"),
    }, timesteps=UNIT, timestep="encoder_hidden_states")  # fmt: skip


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
    return Case("StableAudioDiTModel", make, inputs, {"transformer_blocks.*": THREE}, timesteps=UNIT)


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
                {"transformer_blocks.*": THREE}, timesteps=UNIT)  # fmt: skip


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


CASES = (
    wan_t2v(), wan_i2v(), cogvideox(), ltx(), ltx2(), mochi(), hunyuan_video15(False), hunyuan_video15(True),
    hunyuan_framepack(1), hunyuan_framepack(2), allegro(), latte(), any_flow(), chrono_edit(), cosmos1(), cosmos2(),
    wan_vace(), wan_animate(), skyreels_t2v(), skyreels_forcing(), sana_video(), minimax_h3(), consis_id(), temporal(),
    spatio_temporal(), ace_step(), stable_audio(), stable_audio3(False), stable_audio3(True), longcat_audio(),
)  # fmt: skip
