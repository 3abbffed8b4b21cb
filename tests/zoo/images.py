"""Tiny models of the classes that make pictures, and of HunyuanVideo, whose layout several of them share."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
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

    # Self attention and cross attention are summed before their common output projection: one add sees both.
    return Case("LuminaNextDiT2DModel", make, inputs, {"layers.*": ("joint", "mlp")}, ASCENDING)


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


CASES = (
    flux(), flux2(), flux3(condition=False), flux3(condition=True), sd3(dual=False), sd3(dual=True),
    pixart(sized=True), pixart(sized=False), dit(), qwen_image(edit=False), qwen_image(edit=True), qwen_image21(),
    sana(), lumina2(), lumina_next(), z_image(), hunyuan_dit(), hunyuan_image(glyphs=False),
    hunyuan_image(glyphs=True), hunyuan_video(replace=False), hunyuan_video(replace=True), aura_flow(),
)  # fmt: skip
