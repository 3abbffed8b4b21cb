"""Random projections under which inner products stay what they were: what is remembered of a value that is recorded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 4093
"""Numbers in a sketch; a prime, so that no channel or token of a value falls into few of them."""


class Sketcher:
    """Sketches values: every element, with a random sign, is added to one of `WIDTH` numbers.

    The map is linear, so whatever combination of values is asked for later has a sketch, too, and its norm is right to
    within about ``1 / sqrt(WIDTH)``, 1.6 %. Values of no more than `WIDTH` elements are kept as they are.

    Args:
        seed: of the signs; sketches of different seeds do not go together.

    Reference:
        Charikar, Chen, Farach-Colton, Finding Frequent Items in Data Streams, 2002 (CountSketch), with buckets by
        position instead of by hash.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._signs: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, value: Tensor) -> Tensor:
        """Sketch of a value of any shape; float32, [min(elements, WIDTH)], on its device."""
        flat = value.detach().flatten().float()
        size = len(flat)
        if size <= WIDTH:
            return flat.clone()
        rows = -(-size // WIDTH)
        signed = flat * self._signs_for(size, value.device)
        return F.pad(signed, (0, rows * WIDTH - size)).view(rows, WIDTH).sum(0)

    def _signs_for(self, size: int, device: torch.device) -> Tensor:
        """Signs of a value's elements; int8, [size]; drawn on the CPU, so that every device has the same."""
        if (size, device) not in self._signs:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
            self._signs[size, device] = (2 * drawn - 1).to(device)
        return self._signs[size, device]


def gram_of(sketches: Tensor) -> Tensor:
    """Inner products of all pairs.

    Args:
        sketches: [values, steps, width].

    Returns:
        float64, [values, steps, steps], on the CPU.
    """
    exact = sketches.to("cpu", torch.float64)
    return exact @ exact.mT
