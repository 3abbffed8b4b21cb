"""Capture a model without running it: what `inspect` and tests need; its tensors may be fake or on the meta device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dicompile.capture.arguments import Inputs
from dicompile.capture.inputs import input_names
from dicompile.capture.normalise import Capture, capture_graph
from dicompile.capture.trace import module_tensors, trace_model
from dicompile.errors import CannotCapture


class _Captured(Exception):
    """Stops the call once the graph is there."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture


def capture_model(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Capture a model as one graph for the shapes of `inputs`.

    A model that Dynamo cannot take whole is run once instead, where its inputs are real.

    Args:
        model: the module; Dynamo reads none of its parameters.
        inputs: keyword arguments of its forward.

    Raises:
        CannotCapture: the model does not fit into one graph.
    """
    try:
        return capture_by_dynamo(model, inputs)
    except CannotCapture as refused:
        if any(isinstance(leaf, FakeTensor) or leaf.is_meta for leaf in _tensors(model, inputs)):
            raise
        try:
            return _capture_by_running(model, inputs)
        except CannotCapture as error:
            raise error from refused


def _tensors(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(inputs)
    return [*module_tensors(model).values(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]


def _capture_by_running(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    taken = Inputs.of(model, (), inputs)
    trace = trace_model(model, taken)
    arguments = [*module_tensors(model).values(), *taken.tensors.values(), *trace.constants]
    capture = capture_graph(trace.graph, trace.names, arguments)
    trace.check(capture.inputs, type(model).__name__)
    return capture


def capture_by_dynamo(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Capture a model as one graph that names no tensor but its own and its inputs.

    Args:
        model: the module; its parameters are not read.
        inputs: keyword arguments of its forward.

    Raises:
        CannotCapture: Dynamo cannot take the model in one graph.
    """

    def backend(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        names = input_names(graph.graph)

        def stop(*arguments: Any) -> Any:
            raise _Captured(capture_graph(graph, names, arguments))

        return stop

    # Every capture is a compilation of its own, and Dynamo counts those of all instances of a class together.
    unlimited = torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    try:
        with torch.no_grad(), unlimited:
            torch._dynamo.optimize(backend, nopython=True, dynamic=False)(model.__call__)(**inputs)
    except _Captured as done:
        return done.capture
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CannotCapture(
            f"{type(model).__name__} does not fit into one graph",
            where="capture",
            why=str(error).splitlines()[0],
            fix="move data-dependent Python out of its forward",
        ) from error
    raise CannotCapture(f"{type(model).__name__} ran without any operator", where="capture", fix="check its inputs")
