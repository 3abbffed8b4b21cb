"""What a figure was measured with is told, and what is not there is not."""

from __future__ import annotations

import importlib.metadata
import os
import re

import pytest
import torch

from dicompile.bench import machine
from dicompile.bench.machine import Machine


def test_machine_versions_date_and_command_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    about = Machine.of("cpu", "dicompile bench dit")
    assert about.processor.endswith(f", {os.cpu_count()} cores")
    assert list(about.versions) == ["Python", "torch"]
    assert about.versions["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about.date)
    assert about.command == "dicompile bench dit"
    assert about.threads == torch.get_num_threads()


def test_a_gpu_comes_before_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card ({device})")
    assert Machine.of("cuda:1", "").processor.startswith("a card (cuda:1), ")


def test_where_the_load_cannot_be_told_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    about = Machine.of("cpu", "")
    assert about.load is None
    assert "load" not in about.lines()[0]
