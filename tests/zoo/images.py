"""Tiny models of the classes that make pictures, and of HunyuanVideo, whose layout several of them share."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    DreamLiteTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    NucleusMoEImageTransformer2DModel,
    OmniGenTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    PriorTransformer,
    PRXTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers import DualTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from torch import Tensor

from tests.zoo.case import Case

FRACTIONS = tuple(t / 1000 for t in range(900, 100, -100))
ASCENDING = tuple(1 - t for t in FRACTIONS)


def mask(tokens: int, *lengths: int) -> Tensor:
    """Attention mask of texts of several lengths, padded on the right."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def positions(*sizes: int) -> Tensor:
    """Coordinates of a grid, a row for each token."""
    return torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes))


def flux() -> Case:
    make = partial(
        FluxTransformer2DModel, patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=40, axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "guidance": torch.full((2,), 3.5),
            "pooled_projections": torch.randn(2, 40),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "txt_ids": torch.zeros(6, 3),
            "img_ids": positions(1, 4, 4),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("FluxTransformer2DModel", make, inputs, branches, FRACTIONS)


def flux2() -> Case:
    make = partial(
        Flux2Transformer2DModel, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "guidance": torch.full((2,), 3.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "txt_ids": positions(1, 1, 1, 6).repeat(2, 1, 1),
            "img_ids": positions(1, 4, 4, 1).repeat(2, 1, 1),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("Flux2Transformer2DModel", make, inputs, branches, FRACTIONS)


def flux3(condition: bool) -> Case:
    make = partial(
        Flux3Transformer2DModel, in_channels=4, cond_in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip

    def inputs():
        reference = {
            "image_cond_hidden_states": torch.randn(2, 4, 4),
            "image_cond_ids": positions(1, 2, 2, 1) + torch.tensor([10.0, 0.0, 0.0, 0.0]),
        }
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 0.5),
            "img_ids": positions(1, 4, 4, 1),
            "txt_ids": positions(1, 1, 1, 6),
            "return_dict": False,
        } | (reference if condition else {})

    branches = {
        "txt_mode_blocks.*": ("parallel",),
        "mode_blocks.image.*": ("parallel",),
        # Never run without a reference image.
        "mode_blocks.image_cond.*": ("parallel",) if condition else (),
        # The text's add comes first; nothing reads the last one.
        "single_transformer_blocks.1": ("parallel",),
        "single_transformer_blocks.*": ("parallel", "parallel"),
    }
    variant = "with a reference image" if condition else "from text"
    return Case(f"Flux3Transformer2DModel[{variant}]", make, inputs, branches, FRACTIONS)


def sd3(dual: bool) -> Case:
    make = partial(
        SD3Transformer2DModel, sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=40,
        out_channels=4, dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if dual else None,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 8, 24),
            "pooled_projections": torch.randn(2, 40),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        # The second attention reads the stream from before the first one's add.
        "transformer_blocks.0": ("joint", *(["self"] if dual else []), "mlp", "joint", "mlp"),
        "transformer_blocks.1": ("joint", "mlp", "joint", "mlp"),
        "transformer_blocks.2": ("joint", "mlp"),  # context_pre_only
    }
    return Case(f"SD3Transformer2DModel[{'3.5' if dual else '3'}]", make, inputs, branches)


def pixart(sized: bool) -> Case:
    make = partial(
        PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8,
        num_layers=3, cross_attention_dim=48, sample_size=16, patch_size=2, caption_channels=24,
        use_additional_conditions=sized,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 12, 24),
            "encoder_attention_mask": mask(12, 12, 7),
            "timestep": torch.full((2,), 500),
            "added_cond_kwargs": {
                "resolution": torch.full((2, 2), 128.0) if sized else None,
                "aspect_ratio": torch.ones(2, 1) if sized else None,
            },
            "return_dict": False,
        }

    branches = {"transformer_blocks.*": ("self", "cross", "mlp")}
    return Case(f"PixArtTransformer2DModel[{'alpha' if sized else 'sigma'}]", make, inputs, branches)


def dit() -> Case:
    make = partial(
        DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
        num_layers=3, sample_size=16, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": torch.full((2,), 500),
            "class_labels": torch.tensor([1, 10]),
            "return_dict": False,
        }

    return Case("DiTTransformer2DModel", make, inputs, {"transformer_blocks.*": ("self", "mlp")})


def qwen_image(edit: bool) -> Case:
    make = partial(
        QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        zero_cond_t=edit,
    )  # fmt: skip

    def inputs():
        shapes = [(1, 4, 4), (1, 2, 4)] if edit else [(1, 4, 4)]
        return {
            "hidden_states": torch.randn(2, 24 if edit else 16, 16),
            "timestep": torch.full((2,), 0.5),
            "guidance": None,
            "encoder_hidden_states_mask": mask(6, 6, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "img_shapes": [shapes, shapes],
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.2": ("joint", "mlp"),  # nothing reads the text after it
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
    }
    return Case(f"QwenImageTransformer2DModel[{'edit' if edit else 'text'}]", make, inputs, branches, FRACTIONS)


def qwen_image21() -> Case:
    make = partial(
        QwenImage21Transformer2DModel, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_hidden_states_mask": mask(6, 6, 4),
            "img_shapes": [[(1, 4, 4)]] * 2,
            "img_mask": torch.arange(10).ge(6).repeat(2, 1),  # a slot stands for four tokens
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {"transformer_blocks.*": ("self", "mlp")}  # text and image are one stream
    return Case("QwenImage21Transformer2DModel", make, inputs, branches, FRACTIONS)


def sana() -> Case:
    make = partial(
        SanaTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=24, sample_size=8,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 6, 4),
            "timestep": torch.full((2,), 500.0),
            "attention_kwargs": None,
            "return_dict": False,
        }

    # Linear attention by matrix products, and an MLP of convolutions.
    return Case("SanaTransformer2DModel", make, inputs, {"transformer_blocks.*": ("self", "cross", "mlp")})


def lumina2() -> Case:
    make = partial(
        Lumina2Transformer2DModel, sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 6, 4),
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "context_refiner.*": ("self", "mlp"),
        "noise_refiner.*": ("self", "mlp"),
        "layers.*": ("self", "mlp"),
    }
    return Case("Lumina2Transformer2DModel", make, inputs, branches, ASCENDING)


def lumina_next() -> Case:
    make = partial(
        LuminaNextDiT2DModel, sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, cross_attention_dim=24,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_mask": mask(6, 6, 4),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 8),
            "cross_attention_kwargs": {"base_sequence_length": 16},
            "return_dict": False,
        }

    # Self attention and cross attention are summed before their common output projection: one add for both. The text is
    # no stream.
    return Case("LuminaNextDiT2DModel", make, inputs, {"layers.*": ("self", "mlp")}, ASCENDING)


def z_image() -> Case:
    make = partial(
        ZImageTransformer2DModel, in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
        cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip

    def inputs():
        return {
            "x": [torch.randn(4, 1, 16, 8), torch.randn(4, 1, 16, 8)],
            "t": torch.full((2,), 0.5),
            "cap_feats": [torch.randn(6, 24), torch.randn(20, 24)],
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "noise_refiner.*": ("self", "mlp"),
        "context_refiner.*": ("self", "mlp"),
        "layers.*": ("self", "mlp"),
    }
    return Case("ZImageTransformer2DModel", make, inputs, branches, ASCENDING, timestep="t", latent="x")


def hunyuan_dit() -> Case:
    make = partial(
        HunyuanDiT2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=32, num_layers=6, cross_attention_dim=24, cross_attention_dim_t5=16, pooled_projection_dim=24,
        text_len=6, text_len_t5=8,
    )  # fmt: skip

    def inputs():
        angle = positions(4, 4).repeat_interleave(8, dim=1)
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "text_embedding_mask": mask(6, 6, 4),
            "encoder_hidden_states_t5": torch.randn(2, 8, 16),
            "text_embedding_mask_t5": mask(8, 8, 5),
            "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": (angle.cos(), angle.sin()),
            "return_dict": False,
        }

    # Blocks 4 and 5 first join the stream with that of blocks 1 and 0: a linear over both, no add.
    return Case("HunyuanDiT2DModel", make, inputs, {"blocks.*": ("self", "cross", "mlp")})


def hunyuan_image(glyphs: bool) -> Case:
    make = partial(
        HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_single_layers=2, num_refiner_layers=2, text_embed_dim=24,
        text_embed_2_dim=16 if glyphs else None, rope_axes_dim=(8, 8),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 4, 4),
            "timestep": torch.full((2,), 500.0),
            "timestep_r": None,
            "guidance": None,
            "attention_kwargs": None,
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 6, 4),
            "encoder_hidden_states_2": torch.randn(2, 5, 16) if glyphs else None,
            "encoder_attention_mask_2": mask(5, 3, 5) if glyphs else None,
            "return_dict": False,
        }

    branches = {
        "context_embedder.token_refiner.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case(f"HunyuanImageTransformer2DModel[{'ByT5' if glyphs else 'plain'}]", make, inputs, branches)


def hunyuan_video(replace: bool) -> Case:
    make = partial(
        HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_single_layers=2, num_refiner_layers=2, text_embed_dim=24, pooled_projection_dim=40,
        rope_axes_dim=(4, 6, 6), image_condition_type="token_replace" if replace else None,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_attention_mask": mask(6, 6, 4),
            "pooled_projections": torch.randn(2, 40),
            "guidance": torch.full((2,), 6000.0),
            "attention_kwargs": None,
            "return_dict": False,
        }

    # With token replacement the first frame and the others are added to apart, in slices of one stream; the
    # parallel block gates them apart but adds once.
    images = ("joint", "joint", "joint", "mlp", "mlp", "mlp")
    branches = {
        "context_embedder.token_refiner.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.*": images if replace else ("joint", "joint", "mlp", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    variant = "token replacement" if replace else "text"
    return Case(f"HunyuanVideoTransformer3DModel[{variant}]", make, inputs, branches)


def aura_flow() -> Case:
    make = partial(
        AuraFlowTransformer2DModel, sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 0.5),
            "attention_kwargs": None,
            "return_dict": False,
        }

    # x + mlp(norm(x + attention(x))): the inner sum is no stream, only the MLP reads it, so that the one add onto the
    # stream carries attention and MLP.
    branches = {
        "joint_transformer_blocks.*": ("parallel", "parallel"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("AuraFlowTransformer2DModel", make, inputs, branches, FRACTIONS)


def chroma() -> Case:
    def make():
        with warnings.catch_warnings():
            # diffusers 0.42.1 has Chroma take FluxPosEmbed from its old place.
            warnings.simplefilter("ignore", FutureWarning)
            return ChromaTransformer2DModel(
                in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=24, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
                approximator_hidden_dim=32, approximator_layers=2,
            )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "txt_ids": torch.zeros(6, 3),
            "img_ids": positions(1, 4, 4),
            "attention_mask": mask(22, 22, 20).float(),  # the pipeline's is no truth value either, but added
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        # The table of modulations: tokens are its rows, and it sees the timestep only. Adds outside the layers.
        "distilled_guidance_layer.layers.*": ("mlp",),
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("ChromaTransformer2DModel", make, inputs, branches, FRACTIONS)


def cogview3plus() -> Case:
    make = partial(
        CogView3PlusTransformer2DModel, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        out_channels=4, text_embed_dim=24, time_embed_dim=32, condition_dim=8, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500),
            "original_size": torch.full((2, 2), 64.0),
            "target_size": torch.full((2, 2), 64.0),
            "crop_coords": torch.zeros(2, 2),
            "return_dict": False,
        }

    branches = {
        # Nothing reads the text after the last block's MLP, which is one over the concatenated streams: halves of its
        # result are added to each.
        "transformer_blocks.2": ("joint", "joint", "mlp"),
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),
    }
    return Case("CogView3PlusTransformer2DModel", make, inputs, branches)


def cogview4() -> Case:
    make = partial(
        CogView4Transformer2DModel, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=32, condition_dim=8, sample_size=8,
        rope_axes_dim=(8, 8),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500.0),
            "original_size": torch.full((2, 2), 64.0),
            "target_size": torch.full((2, 2), 64.0),
            "crop_coords": torch.zeros(2, 2),
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.2": ("joint", "mlp"),  # nothing reads the text after it
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),  # one MLP, called once for each stream
    }
    return Case("CogView4Transformer2DModel", make, inputs, branches)


def glm_image() -> Case:
    make = partial(
        GlmImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=32, condition_dim=8,
        prior_vq_quantizer_codebook_size=50,
    )  # fmt: skip
    caches = GlmImageKVCache(num_layers=3)  # idle unless there is a picture to edit

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "prior_token_id": torch.randint(50, (2, 16)),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "timestep": torch.full((2,), 500.0),
            "target_size": torch.full((2, 2), 64.0),
            "crop_coords": torch.zeros(2, 2),
            "attention_kwargs": None,
            "return_dict": False,
            "kv_caches": caches,
        }

    branches = {
        "transformer_blocks.2": ("joint", "mlp"),  # nothing reads the text after it
        "transformer_blocks.*": ("joint", "joint", "mlp", "mlp"),  # one MLP, called once for each stream
    }
    return Case("GlmImageTransformer2DModel", make, inputs, branches)


def hidream() -> Case:
    make = partial(
        HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=40,
        axes_dims_rope=(8, 4, 4), max_resolution=(8, 8), llama_layers=[0, 1, 2, 2],
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timesteps": torch.full((2,), 500.0),
            "encoder_hidden_states_t5": torch.randn(2, 5, 24),
            "encoder_hidden_states_llama3": torch.randn(3, 2, 6, 20),
            "pooled_embeds": torch.randn(2, 40),
            "attention_kwargs": None,
            "return_dict": False,
        }

    # MLPs of the picture are mixtures of experts. Every block gets text tokens of its own at the end of the text
    # stream, of the only stream in the second list, and drops them again.
    branches = {
        "double_stream_blocks.*": ("joint", "joint", "mlp", "mlp"),
        "single_stream_blocks.*": ("self", "mlp"),
    }
    # Which expert gets which tokens is counted in Python.
    why = "bincount() in double_stream_blocks.0.block.ff_i"
    return Case("HiDreamImageTransformer2DModel", make, inputs, branches, timestep="timesteps", impossible=why)


def omnigen() -> Case:
    make = partial(
        OmniGenTransformer2DModel, in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, num_layers=3, pad_token_id=0, vocab_size=50, pos_embed_max_size=8,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}, time_step_dim=32,
    )  # fmt: skip

    def inputs():
        ordered = torch.ones(23, 23).tril()
        ordered[7:, 7:] = 1
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 0.5),
            "input_ids": torch.randint(1, 50, (2, 6)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": ordered.repeat(2, 1, 1),
            "position_ids": torch.arange(23).repeat(2, 1),
            "return_dict": False,
        }

    branches = {"layers.*": ("self", "mlp")}  # text, time and image are one stream
    return Case("OmniGenTransformer2DModel", make, inputs, branches, ASCENDING)


def bria() -> Case:
    make = partial(
        BriaTransformer2DModel, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "attention_kwargs": None,
            "return_dict": False,
            "txt_ids": torch.zeros(6, 3),
            "img_ids": positions(1, 4, 4),
        }

    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("BriaTransformer2DModel", make, inputs, branches)


def bria_fibo() -> Case:
    make = partial(
        BriaFiboTransformer2DModel, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6], text_encoder_dim=20,
    )  # fmt: skip

    def inputs():
        seen = torch.cat([mask(6, 6, 4), torch.ones(2, 16)], dim=1).bool()
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "text_encoder_layers": [torch.randn(2, 6, 20) for _ in range(4)],
            "joint_attention_kwargs": {"attention_mask": seen[:, None, None, :]},
            "return_dict": False,
            "txt_ids": torch.zeros(6, 3),
            "img_ids": positions(1, 4, 4),
        }

    # Before each block a layer of the text encoder overwrites half of the text's channels.
    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("BriaFiboTransformer2DModel", make, inputs, branches)


def bria_fibo2() -> Case:
    make = partial(
        BriaFibo2Transformer2DModel, in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2,
        cap_feat_dim=24, injection_layer_ids=(1,), perceiver_num_layers=2, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 6, 6),
        axes_lens=(16, 8, 8),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 2, 6, 24),
            "encoder_attention_mask": mask(6, 6, 4).bool(),
            "context_latents": None,
            "return_dict": False,
        }

    branches = {
        "perceiver.layers.*": ("cross", "self", "mlp"),
        "noise_refiner.*": ("self", "mlp"),
        "layers.1": ("self", "cross", "mlp"),
        "layers.*": ("self", "mlp"),
    }
    return Case("BriaFibo2Transformer2DModel", make, inputs, branches, FRACTIONS)


def ernie_image() -> Case:
    make = partial(
        ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=64,
        in_channels=4, out_channels=4, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 4, 4),
            "timestep": torch.full((2,), 500.0),
            "text_bth": torch.randn(2, 6, 24),
            "text_lens": torch.tensor([6, 4]),
            "return_dict": False,
        }

    # The stream runs with tokens before samples, and all blocks share one modulation.
    return Case("ErnieImageTransformer2DModel", make, inputs, {"layers.*": ("self", "mlp")})


def ideogram4() -> Case:
    make = partial(
        Ideogram4Transformer2DModel, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=64, adaln_dim=16, llm_features_dim=24, mrope_section=(4, 2, 2),
    )  # fmt: skip

    def inputs():
        text = torch.arange(6)[:, None].expand(6, 3)
        roles = torch.tensor([3] * 6 + [2] * 16).repeat(2, 1)
        segments = torch.ones_like(roles)
        roles[1, :2], segments[1, :2] = 0, -1  # padding on the left
        return {
            "hidden_states": torch.cat([torch.zeros(2, 6, 4), torch.randn(2, 16, 4)], dim=1),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 22, 24),
            "position_ids": torch.cat([text, positions(1, 4, 4).long() + 6]).repeat(2, 1, 1),
            "segment_ids": segments,
            "indicator": roles,
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {"layers.*": ("self", "mlp")}  # text and image are one stream
    return Case("Ideogram4Transformer2DModel", make, inputs, branches, ASCENDING)


def joy_image() -> Case:
    make = partial(
        JoyImageEditTransformer3DModel, in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24,
        num_layers=3, rope_dim_list=[4, 6, 6],
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 2, 4, 1, 8, 8),  # a reference picture, then the one to make
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "return_dict": False,
        }

    branches = {
        "double_blocks.2": ("joint", "mlp"),  # nothing reads the text after it
        "double_blocks.*": ("joint", "joint", "mlp", "mlp"),
    }
    return Case("JoyImageEditTransformer3DModel", make, inputs, branches)


def joy_image_plus() -> Case:
    make = partial(
        JoyImageEditPlusTransformer3DModel, in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24,
        num_layers=3, rope_dim_list=[4, 6, 6],
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 24, 4, 1, 2, 2),  # patches of pictures of several sizes
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_hidden_states_mask": mask(6, 6, 4),
            "shape_list": [[(1, 4, 4), (1, 2, 4)], [(1, 4, 4), (1, 2, 2)]],
            "return_dict": False,
        }

    branches = {
        "double_blocks.2": ("joint", "mlp"),  # nothing reads the text after it
        "double_blocks.*": ("joint", "joint", "mlp", "mlp"),
    }
    return Case("JoyImageEditPlusTransformer3DModel", make, inputs, branches)


def krea2() -> Case:
    make = partial(
        Krea2Transformer2DModel, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=24, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 6, 3, 24),
            "timestep": torch.full((2,), 0.5),
            "position_ids": torch.cat([torch.zeros(6, 3), positions(1, 4, 4)]),
            "encoder_attention_mask": mask(6, 6, 4).bool(),
            "attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "text_fusion.layerwise_blocks.*": ("self", "mlp"),  # attention over the layers of the text encoder
        "text_fusion.refiner_blocks.*": ("self", "mlp"),
        "transformer_blocks.*": ("self", "mlp"),
    }
    return Case("Krea2Transformer2DModel", make, inputs, branches, FRACTIONS)


def longcat_image() -> Case:
    make = partial(
        LongCatImageTransformer2DModel, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "guidance": None,
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "txt_ids": positions(1, 1, 6),
            "img_ids": positions(1, 4, 4) + torch.tensor([1.0, 6.0, 6.0]),
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("LongCatImageTransformer2DModel", make, inputs, branches, FRACTIONS)


def nucleus() -> Case:
    make = partial(
        NucleusMoEImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), mlp_ratio=6.0,
        num_experts=4, moe_intermediate_dim=32, capacity_factors=2.0,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 16),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "encoder_hidden_states_mask": mask(6, 6, 4),
            "img_shapes": [(1, 4, 4)] * 2,
            "attention_kwargs": None,
            "return_dict": False,
        }

    # Keys are the image's and the text's; the text is no stream, every block reads it anew. Block 3 alone is a mixture
    # of experts.
    branches = {"transformer_blocks.*": ("self", "mlp")}
    return Case("NucleusMoEImageTransformer2DModel", make, inputs, branches, FRACTIONS)


def ovis_image() -> Case:
    make = partial(
        OvisImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "txt_ids": positions(1, 1, 6),
            "img_ids": positions(1, 4, 4),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {
        "transformer_blocks.*": ("joint", "mlp", "joint", "mlp"),
        "single_transformer_blocks.*": ("parallel",),
    }
    return Case("OvisImageTransformer2DModel", make, inputs, branches, FRACTIONS)


def prx() -> Case:
    make = partial(
        PRXTransformer2DModel, in_channels=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8]
    )

    def inputs():
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.full((2,), 0.5),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "attention_mask": mask(6, 6, 4).bool(),
            "return_dict": False,
        }

    branches = {"blocks.*": ("self", "mlp")}  # keys are the image's and the text's; the text is no stream
    return Case("PRXTransformer2DModel", make, inputs, branches, FRACTIONS)


# Inside a UNet: from here to DualTransformer2DModel the whole module is one branch of the UNet's stream, added at its
# end. That add belongs to no block and is not listed.


def dream_lite(attention: bool) -> Case:
    def make():
        model = DreamLiteTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=3, norm_num_groups=8,
            cross_attention_dim=24, use_linear_projection=True, use_self_attention=attention, qk_norm="rms_norm",
            num_kv_heads=1,
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(DreamLiteAttnProcessor2_0())  # as the UNet does
        return model

    def inputs():
        return {
            "hidden_states": torch.randn(2, 32, 4, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "timestep": torch.full((2,), 500),  # of no effect: the UNet's other blocks take it
            "encoder_attention_mask": mask(6, 6, 4),
            "return_dict": False,
        }

    # Without self attention the first norm replaces the stream instead of starting a branch.
    branches = {"transformer_blocks.*": ("self", "cross", "mlp") if attention else ("cross", "mlp")}
    variant = "" if attention else "[no self attention]"
    return Case(f"DreamLiteTransformer2DModel{variant}", make, inputs, branches)


def transformer_2d(cross: bool) -> Case:
    make = partial(
        Transformer2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=3,
        norm_num_groups=8, cross_attention_dim=24 if cross else None, num_embeds_ada_norm=None if cross else 1000,
        norm_type="layer_norm" if cross else "ada_norm",
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 32, 4, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24) if cross else None,
            # Of no effect on layer norms; adaptive ones of this class take one for the whole batch.
            "timestep": torch.full((2,), 500) if cross else torch.tensor(500),
            "cross_attention_kwargs": None,
            "return_dict": False,
        }

    branches = {"transformer_blocks.*": ("self", "cross", "mlp") if cross else ("self", "mlp")}
    return Case(f"Transformer2DModel[{'cross' if cross else 'self'}]", make, inputs, branches)


def dual_transformer_2d() -> Case:
    def make():
        model = DualTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, norm_num_groups=8,
            cross_attention_dim=24,
        )  # fmt: skip
        model.condition_lengths = [6, 4]  # as the pipeline of Versatile Diffusion sets it
        return model

    def inputs():
        return {
            "hidden_states": torch.randn(2, 32, 4, 4),
            "encoder_hidden_states": torch.randn(2, 10, 24),
            "timestep": torch.full((2,), 500),  # of no effect
            "return_dict": False,
        }

    # The result blends two transformers of the same input: x + 0.5 * (f(x) - x) + 0.5 * (g(x) - x).
    branches = {"transformers.*.transformer_blocks.*": ("self", "cross", "mlp")}
    return Case("DualTransformer2DModel", make, inputs, branches)


def prior() -> Case:
    make = partial(
        PriorTransformer, num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=24,
        num_embeddings=6, additional_embeddings=4,
    )  # fmt: skip

    def inputs():
        return {
            "hidden_states": torch.randn(2, 24),
            "timestep": torch.tensor(500),
            "proj_embedding": torch.randn(2, 24),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "attention_mask": mask(6, 6, 4).bool(),
            "return_dict": False,
        }

    # The stream is text, image and time embeddings; the output is its last token.
    return Case("PriorTransformer", make, inputs, {"transformer_blocks.*": ("self", "mlp")})


CASES = (
    flux(), flux2(), flux3(condition=False), flux3(condition=True), sd3(dual=False), sd3(dual=True),
    pixart(sized=True), pixart(sized=False), dit(), qwen_image(edit=False), qwen_image(edit=True), qwen_image21(),
    sana(), lumina2(), lumina_next(), z_image(), hunyuan_dit(), hunyuan_image(glyphs=False),
    hunyuan_image(glyphs=True), hunyuan_video(replace=False), hunyuan_video(replace=True), aura_flow(),
    chroma(), cogview3plus(), cogview4(), glm_image(), hidream(), omnigen(), bria(), bria_fibo(), bria_fibo2(),
    ernie_image(), ideogram4(), joy_image(), joy_image_plus(), krea2(), longcat_image(), nucleus(), ovis_image(),
    prx(), dream_lite(attention=True), dream_lite(attention=False), transformer_2d(cross=True),
    transformer_2d(cross=False), dual_transformer_2d(), prior(),
)  # fmt: skip
