"""Low frequencies of a value over its tokens, or of a picture, as products with the few waves that they are made of.

A transform, a mask and the transform back are a projection onto the waves below the cutoff. There are few of those, so
that two small products do, without complex numbers: ``B (B^T x)``, where the columns of B are orthonormal.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dicompile.plan import LowBand


def low_part(value: Tensor, low: LowBand, picture: tuple[int, int], grid: tuple[int, ...] | None = None) -> Tensor:
    """What low frequencies contribute to a value; zero for tokens that belong to no picture.

    Args:
        value: [b, n, d], or [..., h, w] for "fft2", which has no tokens.
        low: which frequencies.
        picture: first token of the picture, and their number.
        grid: rows and columns of the picture's tokens, for "dct" where `low` does not say.

    Returns:
        float32, of the shape of `value`.
    """
    if low.basis == "fft2":
        return _in_circle(value.float(), int(min(value.shape[-2:]) * low.cutoff * (1 + 1e-6)))
    first, count = picture
    rows = value[:, first : first + count].float()
    if low.basis == "fft":
        found = _along_tokens(rows, low.cutoff)
    else:
        found = _over_grid(rows, low.cutoff, low.grid or grid or ())
    if count == value.shape[1]:
        return found
    return torch.nn.functional.pad(found, (0, 0, first, value.shape[1] - first - count))


def _along_tokens(rows: Tensor, cutoff: float) -> Tensor:
    count = rows.shape[1]
    frequencies = np.abs(np.fft.fftfreq(count)).astype(np.float32)
    kept = int((frequencies <= np.float32(cutoff) * frequencies.max()).sum())  # the mean, and pairs
    waves = _fourier(count, (kept - 1) // 2, has_highest=kept == count and count % 2 == 0, device=rows.device)
    return torch.matmul(waves, torch.matmul(waves.T, rows))


def _fourier(count: int, pairs: int, *, has_highest: bool, device: torch.device) -> Tensor:
    """The mean and the lowest pairs of waves over some tokens; columns are orthonormal."""
    token = torch.arange(count, device=device)
    wave = torch.arange(1, pairs + 1, device=device)
    angle = (token[:, None] * wave % count).float() * (2 * math.pi / count)
    scale = math.sqrt(2 / count)
    mean = torch.full((count, 1), math.sqrt(1 / count), device=device)
    columns = [mean, torch.cos(angle) * scale, torch.sin(angle) * scale]
    if has_highest:
        columns.append((1.0 - 2.0 * (token[:, None] % 2).float()) * math.sqrt(1 / count))
    return torch.cat(columns, dim=1)


def _in_circle(picture: Tensor, radius: int) -> Tensor:
    """The waves over the last two axes with ``i**2 + j**2 <= radius**2``; of each axis the lowest, and no highest."""
    down, across = (_fourier(size, radius, has_highest=False, device=picture.device) for size in picture.shape[-2:])
    wave = torch.arange(radius + 1, device=picture.device)
    order = torch.cat([wave, wave[1:]]).square()
    return _projected(picture, down, across, order[:, None] + order <= radius**2)


def _over_grid(rows: Tensor, cutoff: float, grid: tuple[int, ...]) -> Tensor:
    height, width = grid
    batch, _, channels = rows.shape
    limit = cutoff * math.hypot(height - 1, width - 1)
    down, across = (min(size, int(limit * (1 + 1e-6)) + 1) for size in grid)  # waves, the constant one included
    columns, lines = _cosines(height, down, rows.device), _cosines(width, across, rows.device)
    picture = rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    i, j = (torch.arange(size, device=rows.device, dtype=torch.float32) for size in (down, across))
    is_low = (i[:, None].square() + j.square()).sqrt() <= limit * (1 + 1e-6)
    found = _projected(picture, columns, lines, is_low)
    return found.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def _projected(picture: Tensor, down: Tensor, across: Tensor, is_low: Tensor) -> Tensor:
    """What products of some waves over the last two axes, the columns of `down` and `across`, contribute."""
    found = torch.matmul(torch.matmul(down.T, picture), across)
    return torch.matmul(torch.matmul(down, found * is_low.float()), across.T)


def _cosines(count: int, waves: int, device: torch.device) -> Tensor:
    """The lowest waves of the orthonormal cosine transform, type II, as columns."""
    token, wave = torch.arange(count, device=device), torch.arange(waves, device=device)
    angle = ((2 * token[:, None] + 1) * wave % (4 * count)).float() * (math.pi / (2 * count))
    scale = torch.where(wave == 0, math.sqrt(1 / count), math.sqrt(2 / count))
    return torch.cos(angle) * scale
