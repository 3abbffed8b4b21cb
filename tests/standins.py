"""Modules of engines that are not installed: what stands in for them, under their names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest


def install(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Let modules be imported, each with these names in it, until the test ends."""
    for path, names in modules.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
        vars(sys.modules[path]).update(names)
