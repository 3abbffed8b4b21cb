"""``torch.compile(model, backend="dicache", options={...})``: the same flow from Dynamo's side."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dicompile.capture import (
    NO_TIMESTEP,
    Capture,
    Said,
    ambient,
    capture_graph,
    input_names,
    open_numbers,
    read_inputs,
    resized_inputs,
)
from dicompile.compiler import ONE_AT_A_TIME, Options, compile_capture
from dicompile.errors import CannotCapture, InvalidSetting, UnsupportedModel
from dicompile.garbage import uncollected
from dicompile.gradients import without_gradients
from dicompile.lower import Backend, Hoist, compile_plainly
from dicompile.model import MOST_FRAMES
from dicompile.plan import CacheOptions
from dicompile.policies import get_policy
from dicompile.runtime import SchedulerLink
from dicompile.same import Same
from dicompile.tensor_parallel import is_divided

log = logging.getLogger("dicompile")

CACHE_OPTIONS = ("max_cache_bytes", "over_budget", "cache_dtype", "cache_device")
OPTIONS = ("policy", "steps", "schedule", "timestep", "latent", "hoist", "backend", "options", "compile_mode", "warmup",
           "dynamic", "attention", "mode", *CACHE_OPTIONS)  # fmt: skip


def dicache(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Compile a captured graph with feature caching.

    Args:
        graph: what Dynamo captured.
        example_inputs: its inputs.
        options: "policy" (name, `Policy` or plain data; default "none"), "steps" (number of sampling steps) or
            "schedule" (scheduler or timesteps), the names of the inputs "timestep" and "latent", "hoist", "backend",
            "options" of Inductor, "compile_mode", "warmup", "dynamic" and "attention", and those of the cache:
            "max_cache_bytes", "over_budget", "cache_dtype", "cache_device"; see `dicompile.optimize`.

    Raises:
        InvalidSetting: an option is unknown, or a caching policy comes without steps.
    """
    del example_inputs
    return Specialiser(graph, input_names(graph.graph), _options_of(options or {}))


_READ: dict[int, tuple[dict[str, Any], dict[str, Any], Options]] = {}
MOST_OPTIONS = 64
"""Dictionaries of options that are kept: those that a compiled model was called with last."""


def _options_of(given: dict[str, Any]) -> Options:
    """One object for all graphs of a model, by which they know each other.

    ``torch.compile`` hands every graph of a model the very dictionary that the user gave; it is kept, so that no other
    one takes its identity.
    """
    known = _READ.pop(id(given), None)
    if known is None or known[1] != given:
        known = (given, dict(given), read_options(given))
    _READ[id(given)] = known
    for oldest in list(_READ)[:-MOST_OPTIONS]:
        del _READ[oldest]
    return known[2]


def read_options(options: dict[str, Any]) -> Options:
    """Check the options of the bare backend."""
    for name in options:
        if name not in OPTIONS:
            raise InvalidSetting(
                f"backend 'dicache' has no option {name!r}",
                where="torch.compile",
                fix=f"its options are: {', '.join(OPTIONS)}",
            )
    policy = get_policy(options.get("policy", "none"))
    source = options.get("schedule", options.get("steps"))
    if source is None:
        if policy.rules:
            raise InvalidSetting(
                f"policy {policy.name!r} needs to know the number of steps",
                where="torch.compile(backend='dicache')",
                why="a plan says for every step what is computed",
                fix="options={'policy': ..., 'steps': 50}",
            )
        source = 1
    if policy.gate is not None and policy.gate.tells_rows_apart:
        raise InvalidSetting(
            f"policy {policy.name!r} tells the rows of a batch apart, which the backend cannot",
            where="torch.compile(backend='dicache')",
            why="some rows alone would be another call of the model, and the backend has one graph of it",
            fix="dicompile.optimize(model, policy, schedule=...), or leave out decides='sample' and halves of the gate",
        )
    name = options.get("mode", options.get("backend", "inductor"))  # the older word first
    words = ("options", "compile_mode", "warmup", "dynamic", "attention")
    if options.get("dynamic") is True:
        raise InvalidSetting(
            "whether sizes are symbols at once is not for the backend to say",
            where="torch.compile(backend='dicache')",
            why="Dynamo has made constants of them before it asks the backend",
            fix="torch.compile(model, backend='dicache', dynamic=True)",
        )
    code = Backend.of(name, *map(options.get, words))
    cache = CacheOptions.of(
        **{name: options[name] for name in CACHE_OPTIONS if name in options}, where="torch.compile(backend='dicache')"
    )
    said = Said(options.get("timestep"), options.get("latent"))
    hoist = Hoist.of(options.get("hoist"))
    return Options(policy, SchedulerLink(source), code, cache=cache, said=said, hoist=hoist)


@dataclass
class Specialiser:
    """A Dynamo graph, compiled anew for every set of symbolic sizes and numbers it is called with.

    It is what the backend returns. Compiling at the first call instead of inside the backend keeps dicompile's errors
    its own. A graph that cannot be captured is compiled plainly, and a log line says so.

    Dynamo shares it between all instances of a class: it holds code only, and whose features a call reads and stores is
    told by the parameters that it is called with.
    """

    graph: fx.GraphModule
    names: Sequence[tuple[str, bool]]
    options: Options
    _frames: dict[tuple[object, ...], Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with contextlib.suppress(CannotCapture):  # what Python computes with is a constant of the graph then
            opened = copy.deepcopy(self.graph)
            open_numbers(opened)
            self.graph = opened
        self._read = read_inputs(self.graph.graph)
        self._own = [i for i, (_, owned) in enumerate(self.names) if owned]

    def __call__(self, *arguments: Any) -> Any:
        """Run the frame for the shapes of `arguments`.

        Raises:
            UnsupportedCall: it is differentiated, later.
        """
        sizes = [value for value in arguments if isinstance(value, int)]
        key = (ambient(), *sizes, *(arguments[i].item() for i in self._read))
        frame = self._frames.get(key)
        if frame is None:
            with ONE_AT_A_TIME:
                frame = self._frames.get(key) or self._compile(key, arguments)
                latest = list(self._frames.items())[1 - MOST_FRAMES :]
                self._frames = {**dict(latest), key: frame}
        given = (a for a, (_, owned) in zip(arguments, self.names, strict=True) if isinstance(a, Tensor) and not owned)
        return without_gradients("the model", frame(*arguments), given)

    def _said(self) -> Said:
        """What the user says of the inputs of this graph; behind a graph break they may not be there."""
        said, given = self.options.said, {name for name, owned in self.names if not owned}
        given |= {name.split(".")[0] for name in given}
        timestep = NO_TIMESTEP if said.timestep not in (None, *given) else said.timestep
        return Said(timestep, said.latent if said.latent in given else None)

    def _resized(self, arguments: Sequence[Any]) -> Capture | None:
        """The graph for other sizes, where Dynamo has symbols for them."""
        if self._frames or self.options.backend.is_eager or self.options.backend.dynamic is False:
            return None
        other = resized_inputs(self.graph.graph, arguments)
        if other is None:
            return None
        try:
            with torch.no_grad():
                return capture_graph(self.graph, self.names, other, self._said())
        except CannotCapture as refused:
            log.info("sizes become symbols when they vary: %s", refused.what)
            return None

    @uncollected()
    def _compile(self, key: tuple[object, ...], arguments: Sequence[Any]) -> Callable[..., Any]:
        if any(map(is_divided, arguments)):
            raise UnsupportedModel(
                "layers of the model are divided by tensor parallelism",
                where="torch.compile(backend='dicache')",
                why="Dynamo's graph is one of DTensors, whose sums over ranks are no operators of it",
                fix="dicompile.optimize(model, ...), which computes with what a rank has of every weight",
            )
        try:
            with torch.no_grad():
                capture = capture_graph(self.graph, self.names, arguments, self._said())
        except CannotCapture as refused:
            without = "caching or CUDA graphs" if self.options.backend.records_steps else "caching"
            log.warning("compiled without %s: %s (%s)", without, refused.what, refused.why)
            return compile_plainly(self.graph, arguments, self.options.backend)
        compiled = compile_capture(capture, arguments, self.options, Same(key), self._resized(arguments))
        if not compiled.structure.sites:
            log.info("no cacheable branch in this graph: compiled without caching")
        # Of a dynamic graph, a module's Python numbers are tensors, too, made anew for every call.
        own = [i for i in self._own if isinstance(arguments[i], nn.Parameter)]
        return lambda *inputs: compiled.run.run(self.options.owners.of([inputs[i] for i in own]), inputs)
