"""One segment -> one callable, by Inductor or as it is.

Inductor keeps what it made in its own on-disk caches (FX graph cache), so a second process starts warm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import standalone_compile
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.errors import InvalidSetting
from dicompile.lower.sizes import Sizes
from dicompile.passes import Segment, Value

MODES = ("inductor", "eager")
Compiled = Callable[..., Sequence[Any]]


def check_mode(mode: str) -> None:
    """Raise if `mode` is not one of `MODES`.

    Raises:
        InvalidSetting: it is not.
    """
    if mode not in MODES:
        raise InvalidSetting(f"mode {mode!r} does not exist", where="dicompile", fix=f"use one of: {', '.join(MODES)}")


def compile_plainly(graph: fx.GraphModule, arguments: Sequence[Any], mode: str) -> Callable[..., Any]:
    """Compile a graph of Dynamo's as it is, without caching."""
    if mode == "eager":
        return graph
    compiled: Any = compile_fx(graph, list(arguments))
    function: Callable[..., Any] = compiled
    return function


def settings_of_inductor() -> tuple[object, ...]:
    """Everything besides a graph that decides what Inductor makes of it."""
    return (
        torch._inductor.config.get_hash(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


def compile_segment(segment: Segment, mode: str) -> Compiled:
    """Compile a rewritten segment.

    Args:
        segment: what to compile; symbolic ints among its inputs stay symbolic.
        mode: "inductor", or "eager" to run the rewritten graph operator by operator.
    """
    if not segment.results:
        return _nothing
    if mode == "eager":
        # Not by nn.Module.__call__, which tracing in another thread replaces for a while.
        function: Compiled = segment.graph_module.forward
        return function
    placeholders: list[fx.Node] = segment.graph.find_nodes(op="placeholder")
    places = [placeholders.index(node) if node.op == "placeholder" else None for node in segment.results]
    if None not in places:
        return functools.partial(_pass_on, _nothing, tuple(places))
    graph_module, copies = segment.graph_module, {node: node for node in placeholders}
    if any(place is not None for place in places):
        made, copies = fx.Graph(), {}
        made.graph_copy(segment.graph, copies)
        made.output([copies[node] for node in segment.results if node.op != "placeholder"])
        graph_module = fx.GraphModule(segment.graph_module, made)
    given = zip(placeholders, segment.inputs, strict=True)
    own = {copies[node] for node, item in given if isinstance(item, Value) and item.index in segment.owned}
    function = SIZES.code(graph_module, segment.fake_mode, settings_of_inductor(), _compiled, own)
    return function if graph_module is segment.graph_module else functools.partial(_pass_on, function, tuple(places))


def _compiled(graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Compiled:
    context = torch._guards.TracingContext(mode)
    with torch.no_grad(), torch._C._DisableAutocast(), torch._guards.tracing(context):
        compiled: Compiled = standalone_compile(graph_module, list(arguments), dynamic_shapes="from_tracing_context")
    return compiled


SIZES = Sizes()
"""Compiled code of all models of the process, whatever their sizes."""


def _pass_on(function: Compiled, places: Sequence[int | None], *arguments: Any) -> list[Any]:
    """Results of a function, and between them arguments that leave as they came: a reused stream is not copied."""
    computed = iter(function(*arguments))
    return [next(computed) if place is None else arguments[place] for place in places]


def _nothing(*_: Any) -> tuple[()]:
    return ()
