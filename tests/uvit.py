"""A small U-ViT: time and class are tokens, long skips join by concatenation and a linear layer, no branch has a gate.

Bao et al., All are Worth Words: A ViT Backbone for Diffusion Models, arXiv 2209.12152. The second half of the file is
the same network with a cache written by hand, as the Learning-to-Cache code does it: a table of what to compute, and
one dictionary of values per guidance context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Sample, redraw

Branch = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP; blocks of the second half first join their long skip."""

    def __init__(self, width: int, heads: int, *, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def join(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return x if self.skip_linear is None else self.skip_linear(torch.cat([x, skip], dim=-1))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.join(x, skip)
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Predicts the noise; `depth` blocks around a middle one."""

    def __init__(self, depth: int = 4, width: int = 32, heads: int = 2, patch: int = 2, size: int = 8) -> None:
        super().__init__()
        self.width, self.patch, self.size = width, patch, size
        self.embed = nn.Conv2d(4, width, patch, patch)
        self.label = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.zeros(1, 2 + (size // patch) ** 2, width))
        self.in_blocks = nn.ModuleList(Block(width, heads, skip=False) for _ in range(depth // 2))
        self.mid_block = Block(width, heads, skip=False)
        self.out_blocks = nn.ModuleList(Block(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch * patch * 4)

    @property
    def blocks(self) -> list[Block]:
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def tokens(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angle = timesteps[:, None].float() * frequency[None]
        time = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)[:, None]
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([time, self.label(y)[:, None], patches], dim=1) + self.position

    def picture(self, h: Tensor) -> Tensor:
        b, edge = h.shape[0], self.size // self.patch
        h = self.head(self.norm(h))[:, 2:].reshape(b, edge, edge, self.patch, self.patch, 4)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(b, 4, self.size, self.size)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        h, skips = self.tokens(x, timesteps, y), []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        return self.picture(h)


def uvit(depth: int = 4) -> Sample:
    inputs = {"x": torch.randn(2, 4, 8, 8), "timesteps": torch.full((2,), 500.0), "y": torch.tensor([1, 10])}
    return Sample(redraw(UViT(depth)), inputs)


Mix = Callable[[int, Callable[[], Tensor]], Tensor]
"""Site number and fresh value, made only if called -> value."""


def forward_with(model: UViT, x: Tensor, timesteps: Tensor, y: Tensor, mix: Mix) -> Tensor:
    """The network with every branch value passed through `mix`."""
    h, skips = model.tokens(x, timesteps, y), []
    for number, block in enumerate(model.blocks):
        h = block.join(h, skips.pop() if block.skip_linear is not None else None)
        h = h + mix(2 * number, lambda block=block, h=h: block.attend(block.norm1(h)))
        h = h + mix(2 * number + 1, lambda block=block, h=h: block.mlp(block.norm2(h)))
        if number < len(model.in_blocks):
            skips.append(h)
    return model.picture(h)


class CachedUViT:
    """The hand-written cache of one guidance context: compute what the row says, reuse the rest."""

    def __init__(self, model: UViT) -> None:
        self.model, self.store = model, {}

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor, compute: Sequence[bool]) -> Tensor:
        def mix(site: int, fresh: Callable[[], Tensor]) -> Tensor:
            if compute[site]:
                self.store[site] = fresh()
            return self.store[site]

        return forward_with(self.model, x, timesteps, y, mix)
