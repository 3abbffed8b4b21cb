"""What arguments and components are usually called: the one place where names mean anything.

A name only decides between what the graph leaves open, and users can always say what is what
(``optimize(model, policy, timestep="noise_level", latent="x")``).
"""

from __future__ import annotations

import re

_TIME = frozenset({"t", "ts", "time", "times", "timestep", "timesteps", "sigma", "sigmas", "tau"})
_LATENT = frozenset({"hidden_states", "x", "x_t", "xt", "latent", "latents", "sample", "samples", "noisy_latents", "z"})
_OTHER = frozenset({
    "id", "ids", "embed", "embeds", "emb", "mask", "masks", "cond", "conds", "condition", "conditions", "control",
    "controlnet", "guidance", "guider", "fps", "size", "sizes", "pos", "position", "positions", "coord", "coords",
    "ratio", "resolution", "scale", "shift", "encoder", "context", "caption", "text", "prompt", "pooled", "label",
    "labels", "index", "indices", "image", "ref", "reference", "block", "residual", "residuals", "proj", "projections",
})  # fmt: skip
"""Words in the names of what is neither a latent nor a timestep."""

_NO_DENOISER = re.compile(r"controlnet|control_?net|adapter|encoder|vae|safety|vocoder|upsampler|tokenizer|connector")
_STEERS = frozenset({"controlnet_cond", "control_cond", "conditioning_scale", "controlnet_conditioning_scale"})


def sounds_like_time(name: str) -> bool:
    """True for the names that models give to timesteps (`t`, `vision_timesteps`, `sigma`), not for `time_ids`."""
    words = _words(name)
    return bool(words & _TIME) and not words & _OTHER


def sounds_like_latent(name: str) -> bool:
    """True for the names that models give to what they denoise."""
    return name.partition(".")[0].lower() in _LATENT


def sounds_like_another(name: str) -> bool:
    """True for the names of conditioning: text, control images, sizes, guidance, masks."""
    return bool(_words(name) & _OTHER)


def sounds_like_denoiser(component: str, cls: str, arguments: frozenset[str]) -> bool:
    """True for a component of a pipeline that denoises, not for what steers one or encodes for it.

    Args:
        component: its name in the pipeline.
        cls: name of its class.
        arguments: names of the arguments of its forward.
    """
    is_helper = _NO_DENOISER.search(component.lower()) or _NO_DENOISER.search(cls.lower())
    return any(map(sounds_like_time, arguments)) and not is_helper and not arguments & _STEERS


def _last(name: str) -> str:
    parts = [part for part in name.lower().split(".") if not part.isdigit()]
    return parts[-1] if parts else ""


def _words(name: str) -> set[str]:
    return set(_last(name).split("_"))
