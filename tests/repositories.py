"""Three denoisers written anew with the idioms of their own repositories, in which people find and fork them.

facebookresearch/DiT (attention and MLP of timm, guidance by halves), baofff/U-ViT (einops, attention by a global mode,
checkpoints behind a flag), hpcaitech/Open-Sora's STDiT3 (captions packed without padding, attention between packed
sequences, frames with a timestep of their own).
"""
# ruff: noqa: N803, N806, RET504 -- names and lines are those that people write there

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import einops
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

WIDTH, HEADS = 32, 2


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    half = dim // 2
    steps = torch.arange(start=0, end=half, dtype=torch.float32) / half
    freqs = torch.exp(-math.log(max_period) * steps).to(device=t.device)
    args = t[:, None].float() * freqs[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    if dim % 2:
        embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


class Mlp(nn.Module):
    """As timm has it."""

    def __init__(self, width: int, hidden: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), act_layer(), nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, width), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


# facebookresearch/DiT.


class TimmAttention(nn.Module):
    """As timm has it."""

    fused_attn: Final[bool]  # type: ignore[misc]

    def __init__(self, dim: int, num_heads: int, *, fused_attn: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused_attn
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        if force_drop_ids is None:
            drop_ids = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop_ids = force_drop_ids == 1
        return torch.where(drop_ids, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        use_dropout = self.dropout_prob > 0
        if (train and use_dropout) or (force_drop_ids is not None):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, fused_attn: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = TimmAttention(hidden_size, num_heads, fused_attn=fused_attn)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size, bias=True))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Registers its parameters in the order of `tests.models.PlainDiT`."""

    def __init__(self, depth: int = 2, *, fused_attn: bool = True) -> None:
        super().__init__()
        self.out_channels, self.patch_size = 4, 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, WIDTH), requires_grad=False)
        self.x_embedder = nn.Conv2d(4, WIDTH, kernel_size=2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = LabelEmbedder(10, WIDTH, dropout_prob=0.1)
        self.blocks = nn.ModuleList([DiTBlock(WIDTH, HEADS, fused_attn=fused_attn) for _ in range(depth)])
        self.final_layer = FinalLayer(WIDTH, 2, 4)

    def unpatchify(self, x: Tensor) -> Tensor:
        c, p = self.out_channels, self.patch_size
        h = w = int(x.shape[1] ** 0.5)
        assert h * w == x.shape[1]
        x = x.reshape(shape=(x.shape[0], h, w, p, p, c))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], c, h * p, h * p))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        t = self.t_embedder(timestep_embedding(t, WIDTH, max_period=math.exp(9.21)))
        y = self.y_embedder(y, self.training)
        c = t + y
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        combined = torch.cat([half, half], dim=0)
        model_out = self.forward(combined, t, y)
        eps, rest = model_out[:, :3], model_out[:, 3:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2, dim=0)
        half_eps = uncond_eps + cfg_scale * (cond_eps - uncond_eps)
        eps = torch.cat([half_eps, half_eps], dim=0)
        return torch.cat([eps, rest], dim=1)


class Guided(nn.Module):
    """What a sampler calls is a method; `dicompile.optimize` wants a module."""

    def __init__(self, model: DiT, cfg_scale: float) -> None:
        super().__init__()
        self.model, self.cfg_scale = model, cfg_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model.forward_with_cfg(x, t, y, self.cfg_scale)


# baofff/U-ViT.

ATTENTION_MODE = "flash"


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, attn_bias: Any = None) -> Tensor:
    """In the place of ``xformers.ops``: [b, n, h, d]; packed sequences see themselves only."""
    if attn_bias is None:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)
    samples = zip(*(part.split(list(lengths), dim=1) for part, lengths in attn_bias.pairs(q, k, v)), strict=True)
    return torch.cat([memory_efficient_attention(*sample, p=p) for sample in samples], dim=1)


class UViTAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        qkv = self.qkv(x)
        if ATTENTION_MODE == "flash":
            qkv = einops.rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads).float()
            q, k, v = qkv[0], qkv[1], qkv[2]
            x = F.scaled_dot_product_attention(q, k, v)
            x = einops.rearrange(x, "B H L D -> B L (H D)")
        elif ATTENTION_MODE == "xformers":
            qkv = einops.rearrange(qkv, "B L (K H D) -> K B L H D", K=3, H=self.num_heads)
            q, k, v = qkv[0], qkv[1], qkv[2]
            x = memory_efficient_attention(q, k, v)
            x = einops.rearrange(x, "B L H D -> B L (H D)", H=self.num_heads)
        elif ATTENTION_MODE == "math":
            with torch.amp.autocast(device_type="cuda", enabled=False):
                qkv = einops.rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads).float()
                q, k, v = qkv[0], qkv[1], qkv[2]
                attn = (q @ k.transpose(-2, -1)) * self.scale
                attn = self.attn_drop(attn.softmax(dim=-1))
                x = (attn @ v).transpose(1, 2).reshape(B, L, C)
        else:
            raise NotImplementedError
        return self.proj_drop(self.proj(x))


class UViTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, skip: bool, use_checkpoint: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = UViTAttention(dim, num_heads), Mlp(dim, 4 * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.use_checkpoint:
            return torch.utils.checkpoint.checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class UViT(nn.Module):
    def __init__(self, depth: int = 2, *, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.in_chans, self.patch_size, self.extras = 4, 2, 2
        self.patch_embed = nn.Conv2d(4, WIDTH, 2, 2)
        self.time_embed, self.label_emb = nn.Identity(), nn.Embedding(11, WIDTH)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + 16, WIDTH))

        def block(*, skip: bool) -> UViTBlock:
            return UViTBlock(WIDTH, HEADS, skip=skip, use_checkpoint=use_checkpoint)

        self.in_blocks = nn.ModuleList([block(skip=False) for _ in range(depth // 2)])
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList([block(skip=True) for _ in range(depth // 2)])
        self.norm, self.decoder_pred = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)
        self.final_layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        x = einops.rearrange(x, "B C H W -> B (H W) C")
        _, L, _ = x.shape
        time_token = self.time_embed(timestep_embedding(timesteps, WIDTH)).unsqueeze(dim=1)
        x = torch.cat((time_token, x), dim=1)
        if y is not None:
            x = torch.cat((self.label_emb(y).unsqueeze(dim=1), x), dim=1)
        x = x + self.pos_embed
        skips = []
        for blk in self.in_blocks:
            x = blk(x)
            skips.append(x)
        x = self.mid_block(x)
        for blk in self.out_blocks:
            x = blk(x, skips.pop())
        x = self.decoder_pred(self.norm(x))
        assert x.size(1) == self.extras + L
        x = x[:, self.extras :, :]
        p = int((x.shape[2] // self.in_chans) ** 0.5)
        x = einops.rearrange(x, "B (h w) (p1 p2 C) -> B C (h p1) (w p2)", h=int(L**0.5), p1=p, p2=p)
        return self.final_layer(x)


# hpcaitech/Open-Sora, STDiT3.

CAPTION = 24


class BlockDiagonalMask:
    """In the place of ``xformers.ops.fmha.BlockDiagonalMask``."""

    def __init__(self, q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
        self.q_seqlen, self.kv_seqlen = q_seqlen, kv_seqlen

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen)

    def pairs(self, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Sequence[int]]]:
        """Every tensor with the lengths of its sequences."""
        return [(q, self.q_seqlen), (k, self.kv_seqlen), (v, self.kv_seqlen)]


def auto_grad_checkpoint(module: nn.Module, *args: Any) -> Any:
    if getattr(module, "grad_checkpointing", False):
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view((B, N, 3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dtype = q.dtype
        q = q * self.scale
        attn = (q @ k.transpose(-2, -1)).to(torch.float32)
        attn = self.attn_drop(attn.softmax(dim=-1).to(dtype))
        x = (attn @ v).transpose(1, 2).reshape((B, N, C))
        return self.proj_drop(self.proj(x))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.q_linear, self.kv_linear = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model * 2)
        self.proj, self.proj_drop = nn.Linear(d_model, d_model), nn.Dropout(0.0)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int] | None = None) -> Tensor:
        B, N, C = x.shape
        q = self.q_linear(x).view(1, -1, self.num_heads, self.head_dim)
        kv = self.kv_linear(cond).view(1, -1, 2, self.num_heads, self.head_dim)
        k, v = kv.unbind(2)
        attn_bias = None
        if mask is not None:
            attn_bias = BlockDiagonalMask.from_seqlens([N] * B, mask)
        x = memory_efficient_attention(q, k, v, attn_bias=attn_bias)
        return self.proj_drop(self.proj(x.view(B, -1, C)))


class STDiT3Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def t_mask_select(self, x_mask: Tensor, x: Tensor, masked_x: Tensor, T: int, S: int) -> Tensor:
        x = rearrange(x, "B (T S) C -> B T S C", T=T, S=S)
        masked_x = rearrange(masked_x, "B (T S) C -> B T S C", T=T, S=S)
        x = torch.where(x_mask[:, :, None, None], x, masked_x)
        return rearrange(x, "B T S C -> B (T S) C")

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, mask: list[int] | None, x_mask: Tensor | None, t0: Tensor | None,
        T: int, S: int,
    ) -> Tensor:  # fmt: skip
        B = x.shape[0]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table[None] + t.reshape(B, 6, -1)
        ).chunk(6, dim=1)
        if x_mask is not None:
            shift_msa_zero, scale_msa_zero, gate_msa_zero, shift_mlp_zero, scale_mlp_zero, gate_mlp_zero = (
                self.scale_shift_table[None] + t0.reshape(B, 6, -1)
            ).chunk(6, dim=1)
        x_m = t2i_modulate(self.norm1(x), shift_msa, scale_msa)
        if x_mask is not None:
            x_m_zero = t2i_modulate(self.norm1(x), shift_msa_zero, scale_msa_zero)
            x_m = self.t_mask_select(x_mask, x_m, x_m_zero, T, S)
        if self.temporal:
            x_m = rearrange(x_m, "B (T S) C -> (B S) T C", T=T, S=S)
            x_m = self.attn(x_m)
            x_m = rearrange(x_m, "(B S) T C -> B (T S) C", T=T, S=S)
        else:
            x_m = rearrange(x_m, "B (T S) C -> (B T) S C", T=T, S=S)
            x_m = self.attn(x_m)
            x_m = rearrange(x_m, "(B T) S C -> B (T S) C", T=T, S=S)
        x_m_s = gate_msa * x_m
        if x_mask is not None:
            x_m_s = self.t_mask_select(x_mask, x_m_s, gate_msa_zero * x_m, T, S)
        x = x + self.drop_path(x_m_s)
        x = x + self.cross_attn(x, y, mask)
        x_m = t2i_modulate(self.norm2(x), shift_mlp, scale_mlp)
        if x_mask is not None:
            x_m_zero = t2i_modulate(self.norm2(x), shift_mlp_zero, scale_mlp_zero)
            x_m = self.t_mask_select(x_mask, x_m, x_m_zero, T, S)
        x_m = self.mlp(x_m)
        x_m_s = gate_mlp * x_m
        if x_mask is not None:
            x_m_s = self.t_mask_select(x_mask, x_m_s, gate_mlp_zero * x_m, T, S)
        return x + self.drop_path(x_m_s)


class T2IFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, num_patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, num_patch * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(t2i_modulate(self.norm_final(x), shift, scale))


class STDiT3(nn.Module):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.input_sq_size, self.patch_size = WIDTH, 8, (1, 2, 2)
        self.x_embedder = nn.Conv3d(4, WIDTH, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.pos_freq = nn.Linear(2, WIDTH, bias=False)
        self.t_embedder = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.fps_embedder = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.y_embedder = Mlp(CAPTION, WIDTH)
        self.y_embedder.fc2 = nn.Linear(WIDTH, WIDTH)
        self.spatial_blocks = nn.ModuleList([STDiT3Block(WIDTH, HEADS, temporal=False) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([STDiT3Block(WIDTH, HEADS, temporal=True) for _ in range(depth)])
        self.final_layer = T2IFinalLayer(WIDTH, 4, 4)

    def encode_text(self, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
        y = self.y_embedder(y)
        if mask is not None:
            if mask.shape[0] != y.shape[0]:
                mask = mask.repeat(y.shape[0] // mask.shape[0], 1)
            mask = mask.squeeze(1).squeeze(1)
            y = y.squeeze(1).masked_select(mask.unsqueeze(-1) != 0).view(1, -1, self.hidden_size)
            return y, mask.sum(dim=1).tolist()
        y_lens = [y.shape[2]] * y.shape[0]
        return y.squeeze(1).view(1, -1, self.hidden_size), y_lens

    def positions(self, H: int, W: int, scale: float, like: Tensor) -> Tensor:
        grid_h = torch.arange(H, device=like.device) / scale
        grid_w = torch.arange(W, device=like.device) / scale
        grid = torch.stack(torch.meshgrid(grid_w, grid_h, indexing="ij"), dim=-1)
        return torch.sin(self.pos_freq(grid.reshape(1, H * W, 2))).to(like.dtype)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, x_mask: Tensor | None = None,
        fps: Tensor | None = None, height: Tensor | None = None, width: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        dtype = self.x_embedder.weight.dtype
        B = x.size(0)
        x, timestep, y = x.to(dtype), timestep.to(dtype), y.to(dtype)
        _, _, Tx, Hx, Wx = x.size()
        T, H, W = Tx, Hx // 2, Wx // 2
        S = H * W
        resolution_sq = (height[0].item() * width[0].item()) ** 0.5
        pos_emb = self.positions(H, W, resolution_sq / self.input_sq_size, x)
        fps = self.fps_embedder(timestep_embedding(fps.unsqueeze(1).flatten(), 16))
        t = self.t_embedder(timestep_embedding(timestep, 16).to(dtype)) + fps
        t_mlp = self.t_block(t)
        t0_mlp = None
        if x_mask is not None:
            t0 = self.t_embedder(timestep_embedding(torch.zeros_like(timestep), 16).to(dtype)) + fps
            t0_mlp = self.t_block(t0)
        y, y_lens = self.encode_text(y, mask)
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        x = rearrange(x, "B (T S) C -> B T S C", T=T, S=S)
        x = x + pos_emb
        x = rearrange(x, "B T S C -> B (T S) C", T=T, S=S)
        for spatial_block, temporal_block in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = auto_grad_checkpoint(spatial_block, x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
            x = auto_grad_checkpoint(temporal_block, x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
        x = self.final_layer(x, t)
        x = rearrange(
            x, "B (N_t N_h N_w) (T_p H_p W_p C_out) -> B C_out (N_t T_p) (N_h H_p) (N_w W_p)",
            N_t=T, N_h=H, N_w=W, T_p=1, H_p=2, W_p=2, C_out=4,
        )  # fmt: skip
        x = x[:, :, :Tx, :Hx, :Wx]
        assert x.size(0) == B
        return x.to(torch.float32)
