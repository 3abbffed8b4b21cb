"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dicompile.device import device_name

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
        processor = ", ".join(map(device_name, dict.fromkeys((device, "cpu"))))
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


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
