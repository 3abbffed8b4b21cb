"""Global state that a forward may depend on: part of the key under which its graph is kept."""

from __future__ import annotations

import torch
from torch.utils import _device

_accelerator = torch.accelerator.current_accelerator()
DEVICES = ("cpu", "cuda" if _accelerator is None else _accelerator.type)
"""Kinds of device whose autocast is looked at."""


def ambient() -> tuple[object, ...]:
    """Autocast, inference mode, determinism, default dtype and device, modes; gradients are off in whatever we run."""
    return (
        *(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in DEVICES),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        _device.CURRENT_DEVICE,
        torch._C._len_torch_function_stack(),
    )
