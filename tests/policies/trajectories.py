"""Latents of runs, made up."""

from __future__ import annotations

import torch
from torch import Tensor


def slowing(like: Tensor, steps: int, seed: int = 1) -> list[Tensor]:
    """Latents, of the shape of one, that move fast, then slowly."""
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(like.shape, generator=generator) for _ in range(2))
    return [end + (start - end) * (1 - step / steps) ** 3 for step in range(steps)]
