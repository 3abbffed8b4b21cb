"""One segment -> one callable, by Inductor or as it is."""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor import list_mode_options, list_options, standalone_compile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from dicompile.compat import any_number_of_queries, function_of, lazy_graph_module
from dicompile.errors import InvalidSetting
from dicompile.lower.artifact import Compiled, PassOn, compiled_code, nothing
from dicompile.lower.sizes import Compile, Sizes
from dicompile.lower.workers import Request, ask
from dicompile.lower.written_out import written_out
from dicompile.ops.attention_kernels import AttentionKernel
from dicompile.ops.flash import FLASH, check_installed
from dicompile.ops.flex import FLEX
from dicompile.passes import Segment, Value
from dicompile.plan import CacheOptions

BACKENDS = ("inductor", "eager")
GRAPHS_MODE = "reduce-overhead"
MODES = ("default", GRAPHS_MODE, "max-autotune", "max-autotune-no-cudagraphs")
"""Sets of options of Inductor, under torch's names for them, that can be had."""
KERNELS: Mapping[str, AttentionKernel] = {kernel.name: kernel for kernel in (FLASH, FLEX)}
ATTENTIONS = ("sdpa", "cudnn", *KERNELS)
"""Who computes attention: whatever torch chooses, cuDNN before all others of torch's, or a kernel that fits it."""
BACKGROUND = "background"
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
_GRAPHS = "triton.cudagraphs"
_OVERWRITES = "Inductor's CUDA graphs overwrite what an earlier step stored"


@dataclass(frozen=True)
class Backend:
    """What makes code of segments.

    Attributes:
        name: "inductor", or "eager" to run rewritten graphs operator by operator.
        options: of Inductor, by name.
        in_background: other processes compile, and generations that begin before they are done run uncached.
        dynamic: False if every size gets code of its own, True if sizes are symbols at once.
        attention: one of `ATTENTIONS`.
        records_steps: every step runs as one CUDA graph (see `dicompile.runtime.graphs`).
    """

    name: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()
    in_background: bool = False
    dynamic: bool | None = None
    attention: str = "sdpa"
    records_steps: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        warmup: str | None = None,
        dynamic: bool | None = None,
        attention: str | None = None,
    ) -> Backend:
        """Check what the user asked for.

        Args:
            name: see above.
            options: of Inductor; they go before those of the mode.
            mode: one of `MODES`. CUDA graphs of Inductor are never used: what they return is overwritten when they run
                again, and what a step stores is read steps later. "reduce-overhead" records whole steps instead.
            warmup: "background", or None.
            dynamic: False for code of its own for every size, True for symbols at once; by default what varies is a
                symbol from the second on.
            attention: one of `ATTENTIONS`; "sdpa" by default.

        Raises:
            InvalidSetting: there is no such backend, mode, option, warm-up or attention, the option is one of CUDA
                graphs, nothing is compiled, or flash-attn is not installed.
        """
        if name not in BACKENDS:
            raise InvalidSetting(
                f"backend {name!r} does not exist", where="dicompile", fix=f"use one of: {', '.join(BACKENDS)}"
            )
        if mode is not None and mode not in MODES:
            raise InvalidSetting(
                f"mode {mode!r} cannot be had",
                where="compile_mode",
                fix=f"use one of: {', '.join(MODES)}",
            )
        if warmup not in (None, BACKGROUND):
            raise InvalidSetting(
                f"warmup {warmup!r} cannot be had", where="warmup", fix=f"use {BACKGROUND!r}, or leave it out"
            )
        if dynamic not in (None, False, True):
            raise InvalidSetting(
                f"dynamic={dynamic!r} cannot be had",
                where="dynamic",
                fix="True makes symbols of sizes at once, False of none; None of what varied",
            )
        if attention not in (None, *ATTENTIONS):
            raise InvalidSetting(
                f"attention {attention!r} does not exist", where="attention", fix=f"use one of: {', '.join(ATTENTIONS)}"
            )
        if attention == FLASH.name:
            check_installed()
        chosen = dict(options or {})
        words = {
            "options": chosen or None, "compile_mode": mode, "warmup": warmup, "dynamic": dynamic,
            "attention": attention if attention == "cudnn" else None,
        }  # fmt: skip
        given = [word for word, value in words.items() if value is not None]
        if name == "eager" and given:
            raise InvalidSetting(
                f"backend 'eager' takes no {given[0]}",
                where=given[0],
                why="it is about compiling, and nothing is compiled",
                fix="leave it out, or use backend='inductor'",
            )
        unknown = [option for option in chosen if option not in list_options()]
        if unknown or chosen.get(_GRAPHS):
            raise InvalidSetting(
                f"option {(unknown or [_GRAPHS])[0]!r} of Inductor cannot be had",
                where="options",
                why="Inductor has none of this name" if unknown else _OVERWRITES,
                fix="see torch._inductor.list_options()" if unknown else f"compile_mode={GRAPHS_MODE!r}",
            )
        of_mode = list_mode_options(mode) if mode is not None else {}
        every = {**of_mode, **chosen, **({_GRAPHS: False} if of_mode else {})}
        made = tuple(sorted(every.items()))
        return cls(name, made, warmup is not None, dynamic, attention or "sdpa", mode == GRAPHS_MODE)

    def check_cache(self, cache: CacheOptions) -> None:
        """Check that steps can be recorded although the cache is limited as it is.

        Raises:
            InvalidSetting: they cannot.
        """
        if not self.records_steps:
            return
        limits = {
            "cache_device": (cache.device, "what comes back from the host lies elsewhere at every step"),
            "max_cache_bytes": (cache.max_bytes, "recorded steps keep every slot, and a pool that no plan knows"),
        }
        for name, (value, why) in limits.items():
            if value is not None:
                raise InvalidSetting(
                    f"compile_mode {GRAPHS_MODE!r} takes no {name}",
                    where=name,
                    why=why,
                    fix="leave out one of them",
                )

    @property
    def is_eager(self) -> bool:
        """True if nothing is compiled."""
        return self.name == "eager"

    @property
    def kernel(self) -> AttentionKernel | None:
        """What computes the attention that it can in the place of torch's operator."""
        return KERNELS.get(self.attention)

    @contextlib.contextmanager
    def in_effect(self) -> Iterator[None]:
        """While open, Inductor compiles with these options."""
        options = torch._inductor.config.patch(dict(self.options)) if self.options else contextlib.nullcontext()
        kernels = sdpa_kernel(CUDNN_FIRST, set_priority=True) if self.attention == "cudnn" else contextlib.nullcontext()
        with options, kernels:
            yield

    def settings(self) -> tuple[object, ...]:
        """Everything besides a graph that decides what is made of it."""
        if self.is_eager:
            return (self.attention,)
        with self.in_effect():
            return *settings_of_inductor(), self.dynamic, self.attention


INDUCTOR = Backend()


def compile_plainly(graph: fx.GraphModule, arguments: Sequence[Any], backend: Backend) -> Callable[..., Any]:
    """Compile a graph of Dynamo's as it is, without caching."""
    if backend.is_eager:
        return graph
    from torch._inductor.compile_fx import compile_fx  # 0.8 s of CPU time, which no command that only looks needs

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


class Code:
    """A segment as a function; compiled when somebody says so, or calls it.

    Args:
        segment: what to compile; symbolic ints among its inputs stay symbolic. None where it is compiled.
        backend: what compiles it.
        function: it compiled, if it is.
    """

    __slots__ = ("_backend", "_function", "segment")

    def __init__(self, segment: Segment | None, backend: Backend, function: Compiled | None = None) -> None:
        self.segment, self._backend, self._function = segment, backend, function

    @property
    def is_compiled(self) -> bool:
        """True if calling it compiles nothing."""
        return self._function is not None

    @property
    def passes_on(self) -> tuple[int, ...] | None:
        """Numbers of the arguments that its results are, if it does nothing else."""
        if self.segment is not None:
            places = tuple(_places(self.segment))
        else:
            places = self._function.places if isinstance(self._function, PassOn) else (None,)
        known = tuple(place for place in places if place is not None)
        return known if len(known) == len(places) else None

    def compile(self) -> Compiled:
        """The compiled function."""
        if self._function is None:
            assert self.segment is not None
            self._function = compile_segment(self.segment, self._backend)
        return self._function

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """What the segment computes."""
        return (self._function or self.compile())(*arguments)


def requests_of(codes: Sequence[Code], backend: Backend) -> list[Request]:
    """What Inductor would be asked for to compile these, one after the other."""
    found: list[Request | None] = []

    def noted(graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Compiled:
        found.append(Request.of(graph_module, arguments, mode))
        return nothing

    sizes = SIZES.copy()
    for code in codes:
        if not code.is_compiled and code.segment is not None:
            compile_segment(code.segment, backend, sizes, noted)
    return [request for request in found if request is not None]


def ask_workers(requests: Sequence[Request]) -> list[Future[None]]:
    """Let other processes compile, as far as that was not done before."""
    return ask(requests, _compiled)


def compile_segment(
    segment: Segment, backend: Backend, sizes: Sizes | None = None, compile_: Compile | None = None
) -> Compiled:
    """Compile a rewritten segment.

    Args:
        segment: what to compile; symbolic ints among its inputs stay symbolic.
        backend: what compiles it.
        sizes: what was compiled before; by default that of the process.
        compile_: compiles a graph for examples of its inputs; Inductor by default.
    """
    if not segment.results:
        return nothing
    if backend.is_eager:
        # Not by nn.Module.__call__, which tracing in another thread replaces for a while.
        return function_of(segment.graph_module)
    places = _places(segment)
    if None not in places:
        return PassOn(nothing, tuple(places))
    graph_module, own = _computed(segment, places)
    made_of = compile_ or _compiled

    def compiled(graph: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Compiled:
        return made_of(written_out(graph, arguments, mode), arguments, mode)

    with backend.in_effect():
        function = (sizes or SIZES).code(
            graph_module,
            segment.fake_mode,
            _how(backend),
            compiled,
            own,
            is_static=backend.dynamic is False,
        )
    return function if graph_module is segment.graph_module else PassOn(function, tuple(places))


def note_sizes(segment: Segment, backend: Backend) -> None:
    """Let a segment that is never compiled tell which numbers of another one like it are sizes."""
    places = _places(segment)
    if None in places:
        graph_module, own = _computed(segment, places)
        with backend.in_effect():
            SIZES.note(graph_module, _how(backend), own)


def _how(backend: Backend) -> tuple[object, ...]:
    return *settings_of_inductor(), backend.attention


def _places(segment: Segment) -> list[int | None]:
    """Number of the input that each result is, if it is one."""
    placeholders: list[fx.Node] = segment.graph.find_nodes(op="placeholder")
    return [placeholders.index(node) if node.op == "placeholder" else None for node in segment.results]


def _computed(segment: Segment, places: Sequence[int | None]) -> tuple[fx.GraphModule, set[fx.Node]]:
    """The graph of the results that are no inputs, and its inputs that are tensors of the model."""
    placeholders: list[fx.Node] = segment.graph.find_nodes(op="placeholder")
    graph_module, copies = segment.graph_module, {node: node for node in placeholders}
    if any(place is not None for place in places):
        made, copies = fx.Graph(), {}
        made.graph_copy(segment.graph, copies)
        made.output([copies[node] for node in segment.results if node.op != "placeholder"])
        graph_module = lazy_graph_module(segment.graph_module, made)
    given = zip(placeholders, segment.inputs, strict=True)
    return graph_module, {copies[n] for n, item in given if isinstance(item, Value) and item.index in segment.owned}


def _compiled(graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Compiled:
    context = torch._guards.TracingContext(mode)
    has_flex = graph_module.graph.find_nodes(op="call_function", target=FLEX.operator)
    whole = any_number_of_queries() if has_flex else contextlib.nullcontext()
    with torch.no_grad(), torch._C._DisableAutocast(), torch._guards.tracing(context), _keys_alike(), whole:
        return compiled_code(
            lambda: standalone_compile(graph_module, list(arguments), dynamic_shapes="from_tracing_context")
        )


@contextlib.contextmanager
def _keys_alike() -> Iterator[None]:
    """While open, the keys of Inductor's caches are the same in every process.

    They are made by pickle, which writes a memory format down as an attribute of the module that imported torch first
    (torch 2.11 to 2.14).
    """
    copyreg.dispatch_table[torch.memory_format] = lambda value: (_format_of, (str(value),))
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(torch.memory_format, None)


def _format_of(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name.removeprefix("torch."))
    return found


SIZES = Sizes()
"""Compiled code of all models of the process, whatever their sizes."""
