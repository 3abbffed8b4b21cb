"""What models run on: its name, and waiting until it is done."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """Name of a device as its maker calls it; of a CPU with its number of cores."""
    device = torch.device(device)
    if device.type == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was asked for."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
