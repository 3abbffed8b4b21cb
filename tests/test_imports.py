"""What a fresh process imports: everybody waits for it, and a command that only looks waits for nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import gc, json, sys
import torch

collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
import dicompile
found = {"collections": collections.count("start"), "collects": gc.isenabled()}
from dicompile.cli.main import app
found["imported"] = sorted(sys.modules)
app(["--quiet", "inspect", "demo", "--policy", "fora", "--json"], standalone_mode=False)
print(json.dumps({**found, "inspected": sorted(sys.modules)}))
"""
COMPILING = ("torch._inductor.compile_fx", "torch._inductor.graph", "torch._inductor.async_compile")
"""What it takes to compile."""
TRACING = ("torch._inductor.codecache", "torch._functorch.partitioners", "networkx")
"""What Dynamo imports when it traces for the first time."""
OPTIONAL = ("diffusers", "transformers", "accelerate", "matplotlib", "jinja2", "PIL", "scipy", "dicompile.bench.models")
"""What only pipelines, pictures and comparisons need."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("name", [*COMPILING, *TRACING, *OPTIONAL])
def test_importing_the_package_and_its_commands_does_without(name: str, found: dict[str, Any]) -> None:
    assert "dicompile.cli.inspect" in found["imported"]
    assert name not in found["imported"]


@pytest.mark.parametrize("name", [*COMPILING, "matplotlib", "dicompile.bench.models"])
def test_looking_at_a_model_does_without(name: str, found: dict[str, Any]) -> None:
    assert "diffusers.models" in found["inspected"]
    assert name not in found["inspected"]


def test_garbage_is_looked_for_once_when_the_package_has_been_imported(found: dict[str, Any]) -> None:
    assert found["collections"] <= 1
    assert found["collects"]
