"""Captures of the tiny models, made once for all tests that only read them; and a way to run a captured graph."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Capture, Role
from tests.models import MODELS, Sample, capture, plain_dit


@functools.cache
def sample(name: str) -> Sample:
    torch.manual_seed(0)
    return MODELS[name]()


@functools.cache
def one_block() -> tuple[Sample, Capture]:
    """A plain DiT of one block, for tests that look at capture itself."""
    torch.manual_seed(0)
    small = plain_dit(layers=1)
    return small, capture(small)


@functools.cache
def captured(name: str) -> Capture:
    return capture(sample(name))


@functools.cache
def structure(name: str) -> ModelStructure:
    return analyse(captured(name))


def roles(found: Capture) -> dict[str, str]:
    """Role of every input that is no parameter."""
    return {item.name: item.role.value for item in found.inputs if item.role is not Role.PARAMETER}


def operators(found: Capture) -> set[str]:
    return {str(node.target) for node in found.graph.nodes if node.op == "call_function"}


def node_of(found: Capture, name: str) -> fx.Node:
    return next(node for node in found.graph.nodes if node.name == name)


def run_graph(found: Capture, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """First output of the captured graph on the model's own tensors, looked up by the names of the graph's inputs."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    arguments = [tensors[i.name] if i.role is Role.PARAMETER else inputs[i.name] for i in found.inputs]
    with torch.no_grad():
        return found.graph_module(*arguments)[0]


def tiny(model: nn.Module, **inputs: Any) -> Capture:
    """Capture of a small module of a test's own."""
    return capture(Sample(model.eval(), inputs))
