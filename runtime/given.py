"""Tensors as calls got them, compared without waiting where that can be told."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Given:
    """An input as a call got it.

    Attributes:
        tensor: the input itself, not a copy; as long as it is held, nothing else is written where it lies.
        version: counts the writes to it.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Given:
        """An input of the call that is being made."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def is_same(self, other: Given) -> bool:
        """True if both were equal in every bit; waits for the device only if they lie at different places."""
        first, second = self.tensor, other.tensor
        if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
            return False
        if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
            return self.version == other.version
        return Given.of(first).version == self.version and bool(torch.equal(first, second))
