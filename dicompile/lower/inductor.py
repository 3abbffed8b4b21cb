"""One segment -> one callable, by Inductor or as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor import list_mode_options, list_options, standalone_compile
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.errors import InvalidSetting
from dicompile.lower.artifact import Compiled, PassOn, compiled_code, nothing
from dicompile.lower.sizes import Sizes
from dicompile.passes import Segment, Value

BACKENDS = ("inductor", "eager")
MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs")
"""Sets of options of Inductor, under torch's names for them, that can be had."""
_GRAPHS = "triton.cudagraphs"
_OVERWRITES = "CUDA graphs overwrite what an earlier step stored"


@dataclass(frozen=True)
class Backend:
    """What makes code of segments.

    Attributes:
        name: "inductor", or "eager" to run rewritten graphs operator by operator.
        options: of Inductor, by name.
    """

    name: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Backend:
        """Check what the user asked for.

        Args:
            name: see above.
            options: of Inductor; they go before those of the mode.
            mode: one of `MODES`. CUDA graphs are never used: what they return is overwritten when they run again, and
                what a step stores is read steps later.

        Raises:
            InvalidSetting: there is no such backend, mode or option, or the option is one of CUDA graphs.
        """
        if name not in BACKENDS:
            raise InvalidSetting(
                f"backend {name!r} does not exist", where="dicompile", fix=f"use one of: {', '.join(BACKENDS)}"
            )
        if mode is not None and mode not in MODES:
            raise InvalidSetting(
                f"mode {mode!r} cannot be had",
                where="compile_mode",
                why=_OVERWRITES if mode == "reduce-overhead" else "",
                fix=f"use one of: {', '.join(MODES)}",
            )
        chosen = dict(options or {})
        unknown = [option for option in chosen if option not in list_options()]
        if unknown or chosen.get(_GRAPHS):
            raise InvalidSetting(
                f"option {(unknown or [_GRAPHS])[0]!r} of Inductor cannot be had",
                where="options",
                why="Inductor has none of this name" if unknown else _OVERWRITES,
                fix="see torch._inductor.list_options()" if unknown else "leave it out",
            )
        of_mode = list_mode_options(mode) if mode is not None else {}
        return cls(name, tuple(sorted({**of_mode, **chosen, **({_GRAPHS: False} if of_mode else {})}.items())))

    @property
    def is_eager(self) -> bool:
        """True if nothing is compiled."""
        return self.name == "eager"

    def in_effect(self) -> contextlib.AbstractContextManager[Any]:
        """While open, Inductor compiles with these options."""
        return torch._inductor.config.patch(dict(self.options)) if self.options else contextlib.nullcontext()

    def settings(self) -> tuple[object, ...] | None:
        """Everything besides a graph that decides what is made of it."""
        if self.is_eager:
            return None
        with self.in_effect():
            return settings_of_inductor()


INDUCTOR = Backend()


def compile_plainly(graph: fx.GraphModule, arguments: Sequence[Any], backend: Backend) -> Callable[..., Any]:
    """Compile a graph of Dynamo's as it is, without caching."""
    if backend.is_eager:
        return graph
    with backend.in_effect():
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


def compile_segment(segment: Segment, backend: Backend) -> Compiled:
    """Compile a rewritten segment.

    Args:
        segment: what to compile; symbolic ints among its inputs stay symbolic.
        backend: what compiles it.
    """
    if not segment.results:
        return nothing
    if backend.is_eager:
        # Not by nn.Module.__call__, which tracing in another thread replaces for a while.
        function: Compiled = segment.graph_module.forward
        return function
    placeholders: list[fx.Node] = segment.graph.find_nodes(op="placeholder")
    places = [placeholders.index(node) if node.op == "placeholder" else None for node in segment.results]
    if None not in places:
        return PassOn(nothing, tuple(places))
    graph_module, copies = segment.graph_module, {node: node for node in placeholders}
    if any(place is not None for place in places):
        made, copies = fx.Graph(), {}
        made.graph_copy(segment.graph, copies)
        made.output([copies[node] for node in segment.results if node.op != "placeholder"])
        graph_module = fx.GraphModule(segment.graph_module, made)
    given = zip(placeholders, segment.inputs, strict=True)
    own = {copies[node] for node, item in given if isinstance(item, Value) and item.index in segment.owned}
    with backend.in_effect():
        function = SIZES.code(graph_module, segment.fake_mode, settings_of_inductor(), _compiled, own)
    return function if graph_module is segment.graph_module else PassOn(function, tuple(places))


def _compiled(graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Compiled:
    context = torch._guards.TracingContext(mode)
    with torch.no_grad(), torch._C._DisableAutocast(), torch._guards.tracing(context):
        return compiled_code(
            lambda: standalone_compile(graph_module, list(arguments), dynamic_shapes="from_tracing_context")
        )


SIZES = Sizes()
"""Compiled code of all models of the process, whatever their sizes."""
