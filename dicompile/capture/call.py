"""The one entry of capture: a module and the arguments of a call -> its graph, and what that depends on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dicompile.capture.arguments import Arguments
from dicompile.capture.captured import Captured, Unsettled
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.capture.normalise import Capture, capture_graph
from dicompile.capture.roles import NOTHING_SAID, Said
from dicompile.capture.trace import capture_by_running, check_reads, module_tensors
from dicompile.errors import CannotCapture

log = logging.getLogger("dicompile")

ATTEMPTS = 3
"""A forward may fill in what it keeps (a table, a flag) the first times; one that never settles counts its calls."""


def capture_call(module: nn.Module, arguments: Arguments, *, by_running: bool = False) -> Captured:
    """Capture a module for calls like one.

    Args:
        module: the module; it may be run, with copies of the arguments.
        arguments: of the call.
        by_running: do not ask Dynamo, which was seen to refuse this module before.

    Raises:
        CannotCapture: neither Dynamo nor a run gives a graph that would hold for the next call.
    """
    own = set(map(id, module_tensors(module).values()))
    if any(id(tensor) in own for tensor in arguments.given):  # another call gives another tensor there
        arguments = arguments.copied()
    if by_running and not arguments.numbers:
        return _settled(capture_by_running, module, arguments)
    try:
        return _settled(capture_by_dynamo, module, arguments)
    except CannotCapture as refused:
        if arguments.numbers:  # they would be constants of the run
            raise
        if any(isinstance(t, FakeTensor) or t.is_meta for t in (*module_tensors(module).values(), *arguments.tensors)):
            raise
        log.info(
            "Dynamo cannot take %s whole, so it is run to capture it: %s", type(module).__name__,
            refused.why or refused.what,
        )  # fmt: skip
        try:
            captured = _settled(capture_by_running, module, Arguments.of(arguments.args, arguments.kwargs))
            return replace(captured, refused=refused)
        except CannotCapture as error:
            raise error from refused


def _settled(capture: Callable[[nn.Module, Arguments], Captured], module: nn.Module, arguments: Arguments) -> Captured:
    changed: Sequence[str] = ()
    for _ in range(ATTEMPTS):
        try:
            return capture(module, arguments)
        except Unsettled as unsettled:
            changed = unsettled.changed
            if capture is capture_by_dynamo:  # which does not run it
                copied = arguments.copied()
                with torch.no_grad():
                    module._call_impl(*copied.args, **copied.kwargs)
    raise CannotCapture(
        f"{type(module).__name__} changes what it keeps at every call",
        where="capture, forward",
        why="; ".join(changed),
        fix="keep counters and records of calls outside of its forward",
    )


def capture_model(model: nn.Module, inputs: Mapping[str, Any], said: Said = NOTHING_SAID) -> Capture:
    """Capture a model and normalise its graph: what `inspect` and tests need.

    Args:
        model: the module; its tensors and those of the inputs may be fake or on the meta device.
        inputs: keyword arguments of its forward.
        said: what the user says of the inputs.

    Raises:
        CannotCapture: the model does not fit into one graph.
    """
    arguments = Arguments.of((), inputs)
    captured = capture_call(model, arguments)
    return normalised(model, captured, values_of(model, captured, arguments), said)


def normalised(module: nn.Module, captured: Captured, values: Sequence[Tensor], said: Said = NOTHING_SAID) -> Capture:
    """The functional graph of what was captured, with roles.

    Args:
        module: what was captured.
        captured: its graph.
        values: of the graph's placeholders.
        said: what the user says of the inputs.

    Raises:
        CannotCapture: it cannot be made functional, or Python read a value that differs at every step.
    """
    capture = capture_graph(captured.graph, captured.names, values, said)
    check_reads(captured, [item.role for item in capture.inputs], type(module).__name__)
    return capture


def values_of(module: nn.Module, captured: Captured, arguments: Arguments) -> Sequence[Tensor]:
    """Values of the placeholders of a graph that was captured just now."""
    pins = captured.guards.pin(module)
    assert not isinstance(pins, str), pins
    return captured.pick([*pins.tensors, *arguments.tensors, *captured.constants])
