"""Tensors whose memory does not hold their values: ``x.conj()`` and ``x.conj().imag`` are views that carry a mark.

Operators of torch look at the mark; code that Inductor makes reads memory (torch 2.11 to 2.14), and so its results are
those of the conjugate, or of the negative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))
"""Classes of tensors that have memory; others answer for themselves."""


def is_lazy(value: object) -> bool:
    """True for a tensor that still has to be conjugated or negated."""
    return type(value) in _PLAIN and (value.is_conj() or value.is_neg())  # type: ignore[attr-defined]


def resolved(tensor: Tensor) -> Tensor:
    """The same values in memory of their own, laid out in the same way."""
    once = tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]
    made = torch.empty_strided(once.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(once).expand(tensor.shape)
