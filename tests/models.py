"""Tiny random models of every archetype that the tests run: diffusers classes, and a plain DiT of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers  # imports a class when it is named: processes that compile our own DiT do not wait for the others
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dicompile
from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Arguments, Capture, ambient, known_capture
from dicompile.config import Settings
from dicompile.runtime import current_session
from dicompile.wrapper import record_of


class Sample(NamedTuple):
    """A model with inputs for it."""

    model: nn.Module
    inputs: dict[str, Any]


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value: freshly made gates and heads are zero, which would hide every block."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.1
        fan_in = max(parameter.shape[-1], 16)
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.25
    return model.eval()


def dit(layers: int = 3) -> Sample:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=layers, sample_size=16,
        patch_size=2, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(4, 4, 16, 16),
        "timestep": torch.full((4,), 500),
        "class_labels": torch.tensor([1, 2, 10, 10]),
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


def pixart(layers: int = 3) -> Sample:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=layers,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=24, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 12, 24),
        "timestep": torch.full((2,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


def sd3(layers: int = 3) -> Sample:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
        caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=40, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 8, 24),
        "pooled_projections": torch.randn(2, 40),
        "timestep": torch.full((2,), 500),
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


def flux(layers: int = 2) -> Sample:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=40, axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "pooled_projections": torch.randn(1, 40),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.randn(16, 3),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), 3.5),
        "return_dict": False,
    }
    return Sample(redraw(model), inputs)


class PlainBlock(nn.Module):
    """A block in the style of the original DiT repository: fused qkv, explicit modulate, no diffusers code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)

    def attend(self, x: Tensor) -> Tensor:
        return self.proj(self.attended(x))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attend(self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1))
        return x + gate2.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1))


class PlainDiT(nn.Module):
    """Class-conditional DiT written the way the original repository writes it."""

    def __init__(self, layers: int = 3, width: int = 32, heads: int = 2, patch: int = 2, size: int = 16) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.embed = nn.Conv2d(4, width, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch * patch * 4)

    def tokens(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2) + self.position

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        frequency = torch.exp(-torch.arange(self.width // 2, dtype=torch.float32) / (self.width // 2) * 9.21)
        angle = t[:, None].float() * frequency.to(t.device)[None]
        return self.time(torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)) + self.label(y)

    def picture(self, h: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=1)
        h = self.head(self.norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        h = h.reshape(h.shape[0], height // self.patch, width // self.patch, self.patch, self.patch, 4)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(h.shape[0], 4, height, width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.tokens(x), self.condition(t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.picture(h, c, *x.shape[2:])


def plain_dit(layers: int = 3) -> Sample:
    inputs = {"x": torch.randn(4, 4, 16, 16), "t": torch.full((4,), 500), "y": torch.tensor([1, 2, 10, 10])}
    return Sample(redraw(PlainDiT(layers)), inputs)


MODELS: dict[str, Callable[..., Sample]] = {
    "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "plain_dit": plain_dit,
}  # fmt: skip


def call(model: nn.Module, inputs: dict[str, Any], timestep: float, seed: int) -> Tensor:
    """Output of one denoising call with a latent drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = dict(inputs)
    latent = next(name for name in ("hidden_states", "x") if name in inputs)
    time = next(name for name in ("timestep", "t") if name in inputs)
    inputs[latent] = torch.randn(inputs[latent].shape, generator=generator)
    divided = timestep / 1000 if inputs[time].is_floating_point() else timestep
    inputs[time] = torch.full_like(inputs[time], divided)
    with torch.no_grad():
        output = model(**inputs)
    return output[0] if isinstance(output, tuple) else output


def run(model: nn.Module, inputs: dict[str, Any], timesteps: list[int], seed: int = 0) -> list[Tensor]:
    """Outputs of a whole run; latents depend on step and seed only, so that runs can be compared step by step."""
    return [call(model, inputs, t, seed * 1000 + i) for i, t in enumerate(timesteps)]


def timesteps(steps: int) -> list[int]:
    """Descending timesteps from 999."""
    return [round(999 - i * 999 / steps) for i in range(steps)]


def capture(sample: Sample) -> Capture:
    """Functional graph of a model for its inputs, which models that are alike share."""
    arguments, store = Arguments.of((), sample.inputs), Settings.from_environment().store
    with torch.no_grad():
        return known_capture(sample.model, arguments, (arguments.key, ambient()), store)[0].capture


def structure(sample: Sample) -> ModelStructure:
    """Structure of a model for its inputs."""
    return analyse(capture(sample))


def optimized(sample: Sample, policy: Any, steps: int, mode: str = "eager", **options: Any) -> Any:
    """The sample's model optimized for a run of `timesteps(steps)`."""
    return dicompile.optimize(sample.model, policy, schedule=timesteps(steps), mode=mode, **options)


def state_of(model: nn.Module) -> Any:
    """What the current session remembers of an optimized model."""
    return current_session().state_of(record_of(model).calls.owner)


def frames_of(model: nn.Module) -> list[Any]:
    """Everything compiled for an optimized model, what ran last at the end."""
    return record_of(model).frames
