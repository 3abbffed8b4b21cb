"""The one entry of capture: a module and the arguments of a call -> its graph, and what that depends on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dicompile.capture.ambient import entry_of, without_trackers
from dicompile.capture.arguments import Arguments
from dicompile.capture.captured import Captured, Unsettled
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.capture.members import capture_by_members
from dicompile.capture.normalise import Capture, capture_graph
from dicompile.capture.resized import resized, unmarked
from dicompile.capture.roles import NOTHING_SAID, Said
from dicompile.capture.trace import capture_by_running, check_reads, module_tensors
from dicompile.errors import CannotCapture
from dicompile.names import sounds_like_time

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
    with _in_parts(), without_trackers():
        return _capture(module, arguments, by_running=by_running)


@contextlib.contextmanager
def _in_parts() -> Iterator[None]:
    """While open, ``nn.TransformerEncoderLayer`` and the like compute by parts, and not by one fused operator."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


def _capture(module: nn.Module, arguments: Arguments, *, by_running: bool) -> Captured:
    arguments = unmarked(arguments)
    own = set(map(id, module_tensors(module).values()))
    if any(id(tensor) in own for tensor in arguments.given):  # another call gives another tensor there
        arguments = arguments.copied()
    if by_running and not arguments.numbers:
        _check_can_run(module, arguments, "Dynamo cannot take it whole")
        return _settled(capture_by_running, module, arguments)
    captured = capture_by_members(module, arguments)
    if captured is not None:
        return captured
    try:
        return _settled(capture_by_dynamo, module, arguments)
    except CannotCapture as refused:
        return _run_instead(module, arguments, refused)


def _run_instead(module: nn.Module, arguments: Arguments, refused: CannotCapture) -> Captured:
    """Capture what Dynamo could not take by running it, where that can be done."""
    if arguments.numbers:  # they would be constants of the run
        raise refused
    _check_can_run(module, arguments, refused.why or refused.what)
    if any(isinstance(t, FakeTensor) or t.is_meta for t in (*module_tensors(module).values(), *arguments.tensors)):
        raise refused
    log.info(
        "Dynamo cannot take %s whole, so it is run to capture it: %s", type(module).__name__,
        refused.why or refused.what,
    )  # fmt: skip
    try:
        captured = _settled(capture_by_running, module, Arguments.of(arguments.args, arguments.kwargs))
        return replace(captured, refused=refused)
    except CannotCapture as error:
        raise error from refused


def _check_can_run(module: nn.Module, arguments: Arguments, why: str) -> None:
    """Check that a module that is called with real tensors has its weights; see `dicompile.parked.uncovered`.

    Args:
        module: the module.
        arguments: of the call.
        why: it has to be run.

    Raises:
        CannotCapture: it has not.
    """
    are_fake = [isinstance(tensor, FakeTensor) for tensor in arguments.given]
    if any(are_fake) or not any(isinstance(tensor, FakeTensor) for tensor in module_tensors(module).values()):
        return
    raise CannotCapture(
        f"{type(module).__name__} has to be run to capture it, and its weights are brought part by part",
        where="capture",
        why=why,
        fix="offload whole models: pipe.enable_model_cpu_offload()",
    )


def _settled(capture: Callable[[nn.Module, Arguments], Captured], module: nn.Module, arguments: Arguments) -> Captured:
    changed: Sequence[str] = ()
    for _ in range(ATTEMPTS):
        try:
            return capture(module, arguments)
        except Unsettled as unsettled:
            changed = unsettled.changed
            if capture is capture_by_dynamo:  # which does not run it
                _check_can_run(module, arguments, f"it changes what it keeps when it runs: {'; '.join(changed)}")
                copied = arguments.copied()
                with torch.no_grad():
                    getattr(module, entry_of(module))(*copied.args, **copied.kwargs)
    raise CannotCapture(
        f"{type(module).__name__} changes what it keeps at every call",
        where="capture, forward",
        why="; ".join(changed),
        fix="keep counters and records of calls outside of its forward and its hooks; dicompile.disable(model) runs it "
        "as it is",
    )


def capture_functional(
    module: nn.Module, arguments: Arguments, said: Said = NOTHING_SAID, *, by_running: bool = False
) -> tuple[Captured, Capture]:
    """Capture a module for calls like one, and make its graph functional.

    Args:
        module: the module; it may be run, with copies of the arguments.
        arguments: of the call.
        said: what the user says of the inputs.
        by_running: see `capture_call`.

    Raises:
        CannotCapture: no graph can be had that would hold for the next call.
        InvalidSetting: the user named an input that is not there.
    """
    captured = _with_timestep(capture_call(module, arguments, by_running=by_running), module, arguments)
    try:
        return captured, normalised(module, captured, values_of(module, captured, arguments), said)
    except CannotCapture as refused:
        if captured.is_run:
            raise
        with _in_parts(), without_trackers():
            captured = _with_timestep(_run_instead(module, arguments, refused), module, arguments)
    return captured, normalised(module, captured, values_of(module, captured, arguments), said)


def capture_resized(
    module: nn.Module, arguments: Arguments, said: Said = NOTHING_SAID
) -> tuple[Captured, Capture] | None:
    """Capture a module for a call of other sizes, which tells what in its graph are sizes; None if none may vary.

    Args:
        module: the module; it is not run.
        arguments: of a call that it was captured for.
        said: what the user says of the inputs.

    Raises:
        InvalidSetting: a dimension was marked as dynamic, and cannot be.
    """
    with _in_parts(), without_trackers():
        found = resized(module, arguments)
    if found is None:
        return None
    other, captured = found[0], _with_timestep(found[1], module, found[0])
    try:
        return captured, normalised(module, captured, values_of(module, captured, other), said)
    except CannotCapture as refused:
        log.info("%s: no graph of other sizes: %s", type(module).__name__, refused)
        return None


def _with_timestep(captured: Captured, module: nn.Module, arguments: Arguments) -> Captured:
    """The same with the timestep as an input where the forward does not read it: it tells the step all the same."""
    if any(sounds_like_time(name) for name, owned in captured.names if not owned):
        return captured
    unread = [
        (name, i) for i, (name, tensor) in enumerate(zip(arguments.names(module), arguments.tensors, strict=True))
        if sounds_like_time(name) and tensor.ndim <= 1
    ]  # fmt: skip
    if not unread:
        return captured
    (name, position), graph = unread[0], captured.graph.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        graph.placeholder(name.replace(".", "_"))
    captured.graph.recompile()
    place = len(captured.guards.tensors) + position
    return replace(captured, names=(*captured.names, (name, False)), order=(*captured.order, place))


def capture_model(model: nn.Module, inputs: Mapping[str, Any], said: Said = NOTHING_SAID) -> Capture:
    """Capture a model and normalise its graph: what `inspect` and tests need.

    Args:
        model: the module; its tensors and those of the inputs may be fake or on the meta device.
        inputs: keyword arguments of its forward.
        said: what the user says of the inputs.

    Raises:
        CannotCapture: the model does not fit into one graph.
    """
    return capture_functional(model, Arguments.of((), inputs), said)[1]


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
    return captured.pick(captured.tensors(captured.guards.found(module).tensors, arguments))
