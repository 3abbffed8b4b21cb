"""Small diffusion transformers as they are drawn: streams, joins, gates, and attention of many kinds.

Every residual branch goes through `Net.site`. `Net` itself computes it; `tests.fuzz.reference` does what a plan says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import redraw

WIDTH, HEADS, CHANNELS = 16, 2, 4
Attend = Callable[[Tensor, Tensor | None], Tensor]
"""Output of attention for rows of a stream, [b, k, d]; indices of the rows, or None for all of them."""
Project = Callable[[Tensor | None, Tensor, Tensor | None], Tensor]
"""Core of a branch, of the attention's output and the same rows of the stream."""


@dataclass(frozen=True)
class BlockKind:
    """One block.

    Attributes:
        kind: "self": self-attention, MLP; "cross": with cross-attention between; "joint": text and picture attend
            together, each with an MLP of its own; "parallel": attention and MLP beside each other; "axial": attention
            within frames, then along time, MLP; "mlp": nothing else.
        is_gated: whether updates have gates that depend on the timestep.
        part: attention runs on all but the last sample, which passes its values on (perturbed attention).
        registers: keys and values that the model adds in front of the tokens' own.
    """

    kind: Literal["self", "cross", "joint", "parallel", "axial", "mlp"] = "self"
    is_gated: bool = True
    part: bool = False
    registers: int = 0


@dataclass(frozen=True)
class NetKind:
    """One model.

    Attributes:
        blocks: its blocks; joint ones first.
        batch: samples.
        frames: of a film; 0 for a picture.
        sides: rows and columns of tokens.
        text: tokens of the text.
        reference: tokens of a reference picture, which are part of the picture's stream.
        joins: text and picture are one stream behind the joint blocks.
        is_turned: the stream comes out of a convolution and is ordered channels first in memory.
        has_positions: queries and keys are multiplied by a table with a row per token.
    """

    blocks: tuple[BlockKind, ...] = (BlockKind(), BlockKind())
    batch: int = 2
    frames: int = 0
    sides: tuple[int, int] = (4, 4)
    text: int = 3
    reference: int = 0
    joins: bool = False
    is_turned: bool = True
    has_positions: bool = False

    @property
    def tokens(self) -> int:
        """Of the latent."""
        return max(self.frames, 1) * math.prod(self.sides)

    def latent(self, step: int) -> Tensor:
        """A latent that goes on a little at every step."""
        shape = (self.batch, CHANNELS, *((self.frames,) if self.frames else ()), *self.sides)
        start, way = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        return start + 0.05 * step * way

    def conditioning(self) -> dict[str, Tensor]:
        """The other inputs."""
        generator = torch.Generator().manual_seed(3)
        inputs = {"text": torch.randn(self.batch, self.text, WIDTH, generator=generator)}
        if self.reference:
            inputs["reference"] = torch.randn(self.batch, self.reference, CHANNELS, generator=generator)
        return inputs


def attention_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    """Parameters of a block."""

    def __init__(self, kind: BlockKind, rows: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.qkv_text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.query, self.keys = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out, self.out_text, self.out_cross = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.qkv_time, self.out_time = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.up_text, self.down_text = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.beside, self.out_both = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.registers = nn.Parameter(torch.zeros(2, 1, HEADS, kind.registers, WIDTH // HEADS))
        self.positions = nn.Parameter(torch.zeros(rows, WIDTH))

    def forward(self, net: Net, picture: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams behind the block."""
        shift, scale, gate = self.modulation(c)[:, None].chunk(3, dim=-1)
        gate = gate if self.kind.is_gated else torch.ones(())

        def normed(x: Tensor) -> Tensor:
            return self.norm(x) * (1 + scale) + shift

        def mlp(_: Tensor | None, x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            return self.down(F.gelu(self.up(normed(x))))

        if self.kind.kind == "joint":
            return self.joint(net, picture, text, normed, gate, mlp)
        if self.kind.kind == "parallel":
            picture = net.site("picture", picture, gate, self.attend(net, normed), self.both(normed))
            return picture, text
        if self.kind.kind == "axial":
            picture = self.axial(net, picture, normed, gate)
        elif self.kind.kind != "mlp":
            picture = net.site("picture", picture, gate, self.attend(net, normed), lambda a, *_: self.out(a))
        if self.kind.kind == "cross":
            picture = net.site("picture", picture, gate, self.cross(net, text), lambda a, *_: self.out_cross(a))
        return net.site("picture", picture, gate, None, mlp), text

    def attend(self, net: Net, normed: Callable[[Tensor], Tensor]) -> Attend:
        """Self-attention; over part of the batch, with registers, with positions, as the block has it."""

        def attend(x: Tensor, rows: Tensor | None) -> Tensor:
            query, key, value = self.qkv(normed(x)).chunk(3, dim=-1)
            if net.kind.has_positions:
                table = self.positions if rows is None else self.positions[rows]
                query, key = query * (1 + table), key * (1 + table)
            if not self.kind.part:
                return self.attended(net, query, key, value)
            attended = self.attended(net, query[:-1], key[:-1], value[:-1])
            return torch.cat([attended, value[-1:]])

        return attend

    def attended(self, net: Net, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = map(attention_heads, (query, key, value))
        if self.kind.registers:
            k, v = (
                torch.cat([r.expand(len(x), -1, -1, -1), x], 2) for r, x in zip(self.registers, (k, v), strict=True)
            )
        return net.attention(q, k, v).transpose(1, 2).flatten(2)

    def both(self, normed: Callable[[Tensor], Tensor]) -> Project:
        """Attention and MLP, projected as one."""

        def project(attended: Tensor | None, x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            assert attended is not None
            return self.out_both(torch.cat([attended, F.gelu(self.beside(normed(x)))], dim=-1))

        return project

    def cross(self, net: Net, text: Tensor) -> Attend:
        """Attention to the text."""

        def attend(x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            key, value = self.keys(text).chunk(2, dim=-1)
            q, k, v = map(attention_heads, (self.query(x), key, value))
            return net.attention(q, k, v).transpose(1, 2).flatten(2)

        return attend

    def joint(
        self, net: Net, picture: Tensor, text: Tensor, normed: Callable[[Tensor], Tensor], gate: Tensor, mlp: Project
    ) -> tuple[Tensor, Tensor]:
        """Attention of both streams together."""
        parts = [self.qkv_text(normed(text)).chunk(3, dim=-1), self.qkv(normed(picture)).chunk(3, dim=-1)]
        query, key, value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        attended = self.attended(net, query, key, value)
        of_text, of_picture = attended[:, : text.shape[1]], attended[:, text.shape[1] :]
        text = net.site("text", text, gate, lambda *_: of_text, lambda a, *_: self.out_text(a))
        picture = net.site("picture", picture, gate, lambda *_: of_picture, lambda a, *_: self.out(a))

        def mlp_of_text(_: Tensor | None, x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            return self.down_text(F.gelu(self.up_text(normed(x))))

        text = net.site("text", text, gate, None, mlp_of_text)
        return net.site("picture", picture, gate, None, mlp), text

    def axial(self, net: Net, picture: Tensor, normed: Callable[[Tensor], Tensor], gate: Tensor) -> Tensor:
        """Attention within every frame, then of every place along time."""
        frames = net.kind.frames

        def within(x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            folded = normed(x).unflatten(1, (frames, -1)).flatten(0, 1)
            return self.attended(net, *self.qkv(folded).chunk(3, dim=-1)).unflatten(0, (-1, frames)).flatten(1, 2)

        def along(x: Tensor, rows: Tensor | None) -> Tensor:
            del rows
            folded = normed(x).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
            attended = self.attended(net, *self.qkv_time(folded).chunk(3, dim=-1))
            return attended.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)

        picture = net.site("picture", picture, gate, within, lambda a, *_: self.out(a))
        return net.site("picture", picture, gate, along, lambda a, *_: self.out_time(a))


class Net(nn.Module):
    """A model of some kind."""

    def __init__(self, kind: NetKind) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.patch = nn.Conv3d(CHANNELS, WIDTH, 1) if kind.frames else nn.Conv2d(CHANNELS, WIDTH, 1)
        self.time = nn.Linear(WIDTH, WIDTH)
        rows = kind.tokens + kind.reference
        joined = [kind.joins and block.kind != "joint" for block in kind.blocks]
        self.blocks = nn.ModuleList(
            Block(block, rows + kind.text * joins) for block, joins in zip(kind.blocks, joined, strict=True)
        )
        self.head = nn.Linear(WIDTH, CHANNELS)

    @classmethod
    def of(cls, kind: NetKind) -> Net:
        """A model with random weights, the same for equal kinds."""
        model = cls(kind)
        redraw(model)
        return model

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, reference: Tensor | None = None) -> Tensor:
        picture = self.patch(latent).flatten(2).transpose(1, 2)
        if not self.kind.is_turned:
            picture = self.embed(latent.flatten(2).transpose(1, 2))
        if reference is not None:
            picture = torch.cat([picture, self.embed(reference)], dim=1)
        frequency = torch.exp(-torch.arange(WIDTH // 2, dtype=torch.float32))
        angle = timestep[:, None].float() * frequency
        c = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], dim=-1)))
        is_one = False
        for block in self.blocks:
            if self.kind.joins and not is_one and block.kind.kind != "joint":
                picture, is_one = torch.cat([text, picture], dim=1), True
            picture, text = block(self, picture, text, c)
        if is_one:
            picture = picture[:, self.kind.text :]
        picture = picture[:, : self.kind.tokens]
        output = self.head(picture if is_one else picture + text.mean(1, keepdim=True))
        return output.transpose(1, 2).reshape(latent.shape)

    def site(self, stream: str, x: Tensor, gate: Tensor, attend: Attend | None, project: Project) -> Tensor:
        """A residual branch."""
        del stream
        return x + gate * project(attend(x, None) if attend else None, x, None)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention, [b, h, n, d]."""
        return F.scaled_dot_product_attention(query, key, value)
