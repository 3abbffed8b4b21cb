"""A tiny spatial-temporal DiT in the style of Open-Sora 1.2 (STDiT3), written for the tests.

For every depth one spatial block, whose attention sees the tokens of one frame, then one temporal block, whose
attention sees the tokens of one place. Tokens are kept as [b, frames * places, channels].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Sample, redraw

WIDTH, HEADS, TEXT, FRAMES, EDGE = 32, 2, 24, 4, 8


def attend_by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, temporal: bool, matmul: bool = False) -> None:
        super().__init__()
        self.temporal = temporal
        self.attend = attend_by_matmul if matmul else F.scaled_dot_product_attention
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        batch, tokens, width = x.shape
        places = tokens // frames
        folded = x.view(batch, frames, places, width)
        if self.temporal:
            folded = folded.transpose(1, 2)
        folded = folded.reshape(-1, folded.shape[2], width)
        q, k, v = self.qkv(folded).view(*folded.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.attend(q, k, v)
        out = self.proj(out.transpose(1, 2).reshape(folded.shape))
        if self.temporal:
            return out.view(batch, places, frames, width).transpose(1, 2).reshape(x.shape)
        return out.view(x.shape)


class CrossAttention(nn.Module):
    def __init__(self, matmul: bool = False) -> None:
        super().__init__()
        self.attend = attend_by_matmul if matmul else F.scaled_dot_product_attention
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, ...]) -> Tensor:
        if isinstance(text, tuple):  # the words of every sample, without padding
            return torch.cat([self(row, words) for row, words in zip(x.split(1), text, strict=True)])
        q = self.q(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        k, v = self.kv(text).view(*text.shape[:2], 2, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, temporal: bool, matmul: bool = False) -> None:
        super().__init__()
        self.attn, self.cross = Attention(temporal, matmul), CrossAttention(matmul)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, WIDTH))

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, ...], t: Tensor, frames: int) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table[None] + t.view(-1, 6, WIDTH)).chunk(6, 1)
        x = x + gate1 * self.attn(F.layer_norm(x, (WIDTH,)) * (1 + scale1) + shift1, frames)
        x = x + self.cross(x, text)
        return x + gate2 * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + scale2) + shift2)


class SpatialTemporalDiT(nn.Module):
    def __init__(self, depth: int, *, matmul: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.text = nn.Linear(TEXT, WIDTH)
        self.spatial_blocks = nn.ModuleList(Block(temporal=False, matmul=matmul) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(temporal=True, matmul=matmul) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4 * 4)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, _, frames, height, width = latent.shape
        x = self.embed(latent).flatten(2).transpose(1, 2)
        frequencies = torch.exp(torch.arange(8, device=latent.device) * -0.5)
        angle = timestep[:, None].float() * frequencies
        t = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        y = self.text(text)
        if mask is not None:
            y = y[mask.bool()][None].split(mask.sum(dim=1).tolist(), dim=1)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = temporal(spatial(x, y, t, frames), y, t, frames)
        x = self.head(F.layer_norm(x, (WIDTH,))).view(batch, frames, height // 2, width // 2, 4, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(latent.shape)


def stdit(depth: int = 2) -> Sample:
    inputs = {
        "latent": torch.randn(2, 4, FRAMES, EDGE, EDGE),
        "timestep": torch.full((2,), 500),
        "text": torch.randn(2, 6, TEXT),
    }
    return Sample(redraw(SpatialTemporalDiT(depth)), inputs)
