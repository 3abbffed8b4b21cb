"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = ("dicompile", "torch", "triton", "diffusers", "cache-dit")


@dataclass(frozen=True)
class Machine:
    """Machine, versions and date.

    Attributes:
        processor: name of the CPU, and of the GPU if that is what ran.
        threads: of torch.
        load: mean number of processes that wanted to run in the minute before; None where it cannot be told.
        versions: by package, of those that are installed.
        date: in UTC, ISO 8601.
        command: what was called.
    """

    processor: str
    threads: int
    load: float | None
    versions: dict[str, str]
    date: str
    command: str

    @classmethod
    def of(cls, device: str, command: str) -> Machine:
        """This one, now.

        Args:
            device: what runs the models, "cpu" or "cuda".
            command: what was called.
        """
        processor = f"{_cpu()}, {os.cpu_count()} cores"
        if device != "cpu":
            processor = f"{torch.cuda.get_device_name(device)}, {processor}"
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        versions = {"Python": platform.python_version(), **_versions(PACKAGES)}
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return cls(processor, torch.get_num_threads(), load, versions, date, command)

    def lines(self) -> list[str]:
        """For people to read."""
        load = "" if self.load is None else f", load {self.load:.1f} at the start"
        return [
            f"{self.date}, {self.processor}, {self.threads} {'thread' if self.threads == 1 else 'threads'}{load}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
