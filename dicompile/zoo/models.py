"""The models by name, and what each of them is conditioned on.

What a pipeline passes on is written down once per family; sizes are those that the authors recommend.
"""

from __future__ import annotations

from typing import Any

import torch

from dicompile.errors import DicompileError
from dicompile.text import near_names, plain_name
from dicompile.zoo.published import Config, Published, Size, positions


def _classes(_: Config, __: Size, batch: int) -> dict[str, Any]:
    return {"class_labels": torch.tensor([1, 1000])[torch.arange(batch) % 2]}


def _caption(config: Config, size: Size, batch: int) -> dict[str, Any]:
    nothing = {"resolution": None, "aspect_ratio": None}
    text = torch.randn(batch, size.text, config["caption_channels"])
    return {"encoder_hidden_states": text, "added_cond_kwargs": nothing}


def _masked_caption(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(batch, size.text, config["caption_channels"]),
        "encoder_attention_mask": torch.ones(batch, size.text, dtype=torch.long),
    }


def _text(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(batch, size.text, config["joint_attention_dim"])}


def _text_and_pooled(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {
        **_text(config, size, batch),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
    }


def _three_axes(size: Size) -> dict[str, Any]:
    """Places of text and picture, for models whose tokens are packed outside."""
    rows, columns = (length // 2 for length in size.latent)
    return {"txt_ids": torch.zeros(size.text, 3), "img_ids": positions(1, rows, columns)}


def _flux(config: Config, size: Size, batch: int) -> dict[str, Any]:
    guidance = torch.full((batch,), 3.5)
    return {**_text_and_pooled(config, size, batch), **_three_axes(size), "guidance": guidance}


def _flux2(config: Config, size: Size, batch: int) -> dict[str, Any]:
    rows, columns = (length // 2 for length in size.latent)
    return {
        **_text(config, size, batch),
        "txt_ids": positions(1, 1, 1, size.text).repeat(batch, 1, 1),
        "img_ids": positions(1, rows, columns, 1).repeat(batch, 1, 1),
        "guidance": torch.full((batch,), 4.0),
    }


def _chroma(config: Config, size: Size, batch: int) -> dict[str, Any]:
    tokens = size.text + size.latent[0] * size.latent[1] // 4
    return {**_text(config, size, batch), **_three_axes(size), "attention_mask": torch.ones(batch, tokens)}


def _qwen(config: Config, size: Size, batch: int) -> dict[str, Any]:
    rows, columns = (length // 2 for length in size.latent)
    return {**_text(config, size, batch), "img_shapes": [[(1, rows, columns)]] * batch}


def _z_image(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {"cap_feats": [torch.randn(size.text, config["cap_feat_dim"]) for _ in range(batch)]}


def _wan(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(batch, size.text, config["text_dim"])}


def _cogvideox(config: Config, size: Size, batch: int) -> dict[str, Any]:
    text = {"encoder_hidden_states": torch.randn(batch, size.text, config["text_embed_dim"])}
    if not config["use_rotary_positional_embeddings"]:
        return text
    tokens, width = size.latent[0] * (size.latent[1] // 2) * (size.latent[2] // 2), config["attention_head_dim"]
    return {**text, "image_rotary_emb": (torch.randn(tokens, width), torch.randn(tokens, width))}


def _hunyuan(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(batch, size.text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(batch, size.text, dtype=torch.long),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 6000.0),
    }


def _ltx(config: Config, size: Size, batch: int) -> dict[str, Any]:
    frames, height, width = size.latent
    shape = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (8 / 25, 32, 32)}
    return {**_masked_caption(config, size, batch), **shape}


_PICTURE = (128, 128)
_HD_FILM = (21, 90, 160)

MODELS: dict[str, Published] = {
    model.name: model
    for model in (
        Published("dit-xl-2", "BCHW", Size((32, 32)), _classes, batch=2),
        Published("pixart-alpha", "BCHW", Size((64, 64), 120), _caption, batch=2),
        Published("pixart-sigma", "BCHW", Size(_PICTURE, 300), _caption, batch=2),
        Published("sd3-medium", "BCHW", Size(_PICTURE, 333), _text_and_pooled, batch=2),
        Published("sd3.5-large", "BCHW", Size(_PICTURE, 333), _text_and_pooled, batch=2),
        Published("flux.1-dev", "packed", Size(_PICTURE, 512), _flux, time_scale=1e-3, distilled=True),
        Published("flux.2-dev", "packed", Size(_PICTURE, 512), _flux2, time_scale=1e-3, distilled=True),
        Published("chroma1-hd", "packed", Size(_PICTURE, 512), _chroma, time_scale=1e-3),
        Published("qwen-image", "packed", Size(_PICTURE, 512), _qwen, time_scale=1e-3),
        Published("sana-1.6b", "BCHW", Size((32, 32), 300), _masked_caption, batch=2, patch=1, pixels=32),
        Published(
            "z-image-turbo", "list", Size(_PICTURE, 256), _z_image, time_scale=1e-3, given=("x", "t"), is_lazy=True
        ),
        Published("cogvideox-2b", "BFCHW", Size((13, 60, 90), 226), _cogvideox, batch=2),
        Published("cogvideox-5b", "BFCHW", Size((13, 60, 90), 226), _cogvideox, batch=2),
        Published("wan2.1-1.3b", "BCFHW", Size((21, 60, 104), 512), _wan),
        Published("wan2.1-14b", "BCFHW", Size(_HD_FILM, 512), _wan),
        Published("wan2.2-a14b", "BCFHW", Size(_HD_FILM, 512), _wan),
        Published("hunyuanvideo", "BCFHW", Size((33, 90, 160), 256), _hunyuan, distilled=True),
        Published(
            "ltx-video", "packed", Size((21, 16, 22), 128), _ltx, batch=2, patch=1, pixels=32, frames=8
        ),
    )
}  # fmt: skip
"""Well-known models by name."""


def get_model(name: str, *, where: str = "MODEL", why: str = "") -> Published:
    """A model by its name, in either case and with "_" or " " for "-".

    Args:
        name: of the model.
        where: the message names as the place of the mistake.
        why: it gives as the reason.

    Raises:
        DicompileError: there is no such model.
    """
    plain = plain_name(name)
    if plain in MODELS:
        return MODELS[plain]
    near = near_names(name, MODELS)
    raise DicompileError(
        f"no well-known model is called {name!r}",
        where=where,
        why=why,
        fix=f"did you mean {near}?" if near else f"use one of: {', '.join(MODELS)}",
    )
