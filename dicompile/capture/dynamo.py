"""Capture a model without running it: what `inspect` and tests need; its tensors may be fake or on the meta device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dicompile.capture.inputs import input_names
from dicompile.capture.normalise import Capture, capture_graph
from dicompile.errors import CannotCapture


class _Captured(Exception):
    """Stops the call once the graph is there."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture


def capture_model(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Capture a model as one graph for the shapes of `inputs`.

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
