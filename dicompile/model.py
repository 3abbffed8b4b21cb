"""Calls of an optimized model: captured once for every way through its forward, then dispatched.

A call costs what it takes to see that nothing changed: its arguments are taken apart, what the forward read is held
against what lies there now, and compiled code runs. Nothing of torch is asked whether that code is valid.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.batch import batch_of, with_timesteps
from dicompile.capture import (
    CAPTURES,
    NO_TIMESTEP,
    Arguments,
    Capture,
    Known,
    Pins,
    Role,
    Said,
    ambient,
    bind_positions,
    capture_resized,
    is_number,
    key_of_class,
    known_capture,
    marked_dims,
    with_python_numbers,
)
from dicompile.compat import forget_tensors
from dicompile.compiler import COMPILING, ONE_AT_A_TIME, CompiledFrame, Options, compile_capture
from dicompile.errors import CannotCapture, InvalidSetting, NoSitesFound, TimestepNotFound
from dicompile.garbage import uncollected
from dicompile.names import sounds_like_time
from dicompile.offload import check_can_bring, check_hooks
from dicompile.parallel import SHARDED, settle_hooks
from dicompile.parked import Home, homes_of, uncovered
from dicompile.progress import progress
from dicompile.runtime import Batch, Owner, current_session
from dicompile.same import Same
from dicompile.tensor_parallel import is_divided

log = logging.getLogger("dicompile")

MOST_FRAMES = 64
"""Ways through the forward, and shapes, for which compiled code is kept: the latest ones."""

_CALLS = itertools.count()


@dataclass
class Frame:
    """Compiled code for calls like one, and what it depends on.

    Attributes:
        known: the graph, and what it depends on.
        compiled: what runs.
        pins: what its guards found.
        used: number of the last call that it served.
        parted: so many of its rows are known to run as a call of their own.
    """

    known: Known
    compiled: CompiledFrame
    pins: Pins
    used: int = 0
    parted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.captured = self.known.captured
        self._pick = self.captured.picker()

    def inputs_if_valid(
        self, pins: Pins, own: list[Tensor] | None, arguments: Arguments
    ) -> tuple[Sequence[Any], Sequence[Any]] | None:
        """All tensors, and those that the code takes, if the values that Python read are as they were."""
        if own is None:
            return None
        tensors = self.captured.tensors(pins.given(own), arguments)
        inputs = self._pick(tensors)
        if self.known.read and not self.known.was_read(inputs):
            return None
        return tensors, inputs


Found = tuple[Frame, Sequence[Any], Sequence[Any]]
"""Code for a call, all tensors of the call, and those that the code takes; some may be `Parked`."""


class ModelCalls:
    """What an optimized module does when it is called.

    Args:
        module: the module.
        options: what the user asked for.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self.owner = Owner(options.link)
        self._frames: dict[tuple[Any, ...], tuple[Frame, ...]] = {}
        self._times = _names_of_time(module, options.said)
        self._kinds: set[Hashable] = set()
        self._takes_any_number = True
        self._by_running = False
        self._looking = threading.RLock()
        self._device: torch.device | None = None

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled that is kept, what ran last at the end."""
        return [frame.compiled for frame in self._by_use(self._frames)]

    @property
    def is_run(self) -> bool:
        """True if the module was run to capture it, since Dynamo could not take it whole."""
        return self._by_running

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call."""
        start, compiled = time.perf_counter(), COMPILING.seconds
        arguments = self.arguments(args, kwargs)
        if (gate := self.options.policy.gate) is not None and gate.tells_rows_apart:
            arguments, found = with_timesteps(self, arguments)
            batch = batch_of(self, gate, arguments, found)
        else:
            found, batch = self.find(arguments), None
        packed = self.run(self.owner, arguments, found, batch)
        if batch is not None:
            found[0].used = next(_CALLS)  # after what some of its rows used
        state, compiling = current_session().state_of(self.owner), COMPILING.seconds - compiled
        state.report.time(state.step, time.perf_counter() - start - compiling, compiling)
        return packed

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments of a call, taken apart; on the device where weights are brought to, as hooks would move them."""
        if self._times:
            args, kwargs = bind_positions(self.module, args, kwargs, self._times)
        arguments = self._taken_apart(args, kwargs)
        if self._are_there(arguments):
            return arguments
        return self._taken_apart(*arguments.filled([tensor.to(self._device) for tensor in arguments.given]))

    def _taken_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        if self._takes_any_number:
            return Arguments.of(args, kwargs, self._times)
        return Arguments.of(args, with_python_numbers(kwargs, self._times))

    def _are_there(self, arguments: Arguments) -> bool:
        """True if arguments are where the weights are, as far as these are brought by somebody."""
        return self._device is None or all(tensor.device == self._device for tensor in arguments.given)

    @staticmethod
    def run(owner: Owner, arguments: Arguments, found: Found, batch: Batch | None = None) -> Any:
        """Run the code for a call.

        Args:
            owner: whose call it is.
            arguments: of the call.
            found: what `find` has found for them.
            batch: the rows of the call, where the policy tells them apart.
        """
        frame, tensors, inputs = found
        with torch._C.DisableTorchFunctionSubclass():  # what operators do to weights, GGUF's say, is in the graph
            results = frame.compiled.run.run(owner, inputs, batch)
        for taken in frame.captured.taken_out:
            taken.repeat(arguments)
        return frame.captured.pack(results, tensors)

    def find(self, arguments: Arguments) -> Found:
        """The code for a call, with all tensors and with its inputs; captured if nothing like it came before."""
        found = self._frame(arguments)
        found[0].used = next(_CALLS)
        return found

    def _frame(self, arguments: Arguments) -> Found:
        """The code for a call, with all tensors and with its inputs."""
        key = (arguments.key, ambient())
        found = self._find(key, arguments) or self._find_alike(key, arguments)
        if found is not None:
            return found
        with COMPILING, ONE_AT_A_TIME:
            found = self._find(key, arguments) or self._find_alike(key, arguments)
            return found if found is not None else self._capture(key, arguments)

    def _find_alike(self, key: tuple[Any, ...], arguments: Arguments) -> Found | None:
        """The code for calls whose tensors only lie in memory in another way."""
        for known in list(self._frames):
            laid_out = arguments.laid_out_as(known[0]) if known != key and known[1:] == key[1:] else None
            found = None if laid_out is None else self._find(known, laid_out)
            if found is not None:
                return found
        return None

    def _find(self, key: tuple[object, ...], arguments: Arguments) -> Found | None:
        frames = self._frames.get(key, ())
        for frame in frames:
            pins = frame.pins
            valid = frame.inputs_if_valid(pins, pins.hold(), arguments)
            if valid is not None:
                return frame, *valid
        with self._looking:
            return self._look(frames, arguments)

    def _look(self, frames: Sequence[Frame], arguments: Arguments) -> Found | None:
        """The same, where things do not lie where they lay: an equal object may be in the place of another."""
        homes = self._homes() if frames else {}
        for frame in frames:
            pins = frame.captured.guards.pin(self.module, homes)
            if isinstance(pins, str):
                log.debug("%s: %s", type(self.module).__name__, pins)
                continue
            frame.pins = pins
            valid = frame.inputs_if_valid(pins, pins.tensors, arguments)
            if valid is not None:
                return frame, *valid
        return None

    def _homes(self) -> Mapping[int, Home]:
        """Where weights are that hooks bring and take away.

        Raises:
            UnsupportedModel: that cannot be told, or compiled code could not have them.
        """
        homes = homes_of(self.module)
        if homes:
            check_hooks(self.module)
            check_can_bring(self.module, self.options.backend)
            if any(home.sharding is not None for home in homes.values()):
                self.options.check_ranks(SHARDED)
        self._device = next((home.device for home in homes.values()), None)
        return homes

    @uncollected()
    def _capture(self, key: tuple[object, ...], arguments: Arguments) -> Found:
        check_hooks(self.module)
        settle_hooks(self.module)
        homes = self._homes()
        if not self._are_there(arguments):
            moved = self.arguments(arguments.args, arguments.kwargs)
            if self._are_there(moved):
                return self._frame(moved)
        start = time.perf_counter()
        try:
            with progress(f"looking at {type(self.module).__name__}"):
                with self._looking, uncovered(self.module):
                    store, said = self.options.settings.store, self.options.said
                    known, pins = known_capture(self.module, arguments, key, store, said, by_running=self._by_running)
                    self._require_timestep(known.capture, arguments)
                    resized = self._resized(key, arguments)
                if homes or any(map(is_divided, self.module.parameters())):  # they were found while it was uncovered
                    pins = known.captured.guards.found(self.module, homes)
                tensors = known.captured.tensors(pins.given(pins.tensors), arguments)
                inputs = known.captured.pick(tensors)
                way = Same((arguments.key, str(known.captured.guards)))
                compiled = compile_capture(known.capture, inputs, self.options, way, resized)
        except CannotCapture:
            if not arguments.numbers:
                raise
            return self._capture_number(arguments)
        self._require_sites(compiled)
        self._by_running = self._by_running or known.captured.is_run
        frame = Frame(known, compiled, pins, next(_CALLS))
        sites, seconds = len(compiled.structure.sites), time.perf_counter() - start
        log.info("%s captured and analysed in %.1f s: %d sites", type(self.module).__name__, seconds, sites)
        self._keep(key, frame)
        for graph in (known.captured.graph.graph, known.capture.graph):
            forget_tensors(graph)
        return frame, tensors, inputs

    def _resized(self, key: tuple[object, ...], arguments: Arguments) -> Capture | None:
        """The graph for other sizes, if sizes are to be symbols at once; of every kind of call it is made once.

        Raises:
            InvalidSetting: a dimension was marked as dynamic, and cannot be.
        """
        marked, dynamic = marked_dims(arguments), self.options.backend.dynamic
        if marked and dynamic is False:
            raise InvalidSetting(
                f"dimensions of the arguments of {type(self.module).__name__} are marked, and may not be dynamic",
                where="mark_dynamic",
                why="dynamic=False compiles every size by itself",
                fix="leave out dynamic=False, or take the marks off",
            )
        kind = arguments.without_sizes, marked
        if self.options.backend.is_eager or not (marked or dynamic) or kind in self._kinds:
            return None
        key = ("resized", marked, *key_of_class(self.module, self.options.said, key))
        store = self.options.settings.store
        found = CAPTURES.find(key, self.module, arguments, store)
        if found is not None:
            known: Known | None = found[0]
        else:
            made = capture_resized(self.module, arguments, self.options.said)
            known = None if made is None else Known(*made, {})
            if known is not None:
                CAPTURES.keep(key, known, self.module, store)
        self._kinds.add(kind)
        return None if known is None else known.capture

    def _capture_number(self, arguments: Arguments) -> Found:
        """The code for one value of a timestep that is a number which Python decides on."""
        found = self._frame(Arguments.of(arguments.args, with_python_numbers(arguments.kwargs, arguments.numbers)))
        if self._takes_any_number:  # not before that worked: the call may have been a mistake
            self._takes_any_number = False
            log.info(
                "the timestep of %s is a number that Python reads: every value of it is captured by itself",
                type(self.module).__name__,
            )
        return found

    def _keep(self, key: tuple[object, ...], frame: Frame) -> None:
        """Keep a frame, and drop the one that was not used for longest where there are too many."""
        frames = {**self._frames, key: (frame, *self._frames.get(key, ()))}
        kept = self._by_use(frames)
        if len(kept) > MOST_FRAMES:
            log.warning(
                "%s runs with more than %d shapes and settings: compiled code for the one that was not used for "
                "longest is dropped", type(self.module).__name__, MOST_FRAMES,
            )  # fmt: skip
            frames = {k: tuple(f for f in group if f is not kept[0]) for k, group in frames.items()}
        self._frames = {k: group for k, group in frames.items() if group}

    @staticmethod
    def _by_use(frames: Mapping[tuple[object, ...], tuple[Frame, ...]]) -> list[Frame]:
        return sorted((frame for group in frames.values() for frame in group), key=lambda frame: frame.used)

    def _require_timestep(self, capture: Capture, arguments: Arguments) -> None:
        """Raise if a caching policy for several steps meets a model whose timestep cannot be told.

        Raises:
            TimestepNotFound: it does.
        """
        if capture.input_position(Role.TIMESTEP) is not None or not self.options.policy.rules:
            return
        is_given = any(is_number(arguments.kwargs.get(name)) for name in self._times)
        if is_given or self.options.said.timestep == NO_TIMESTEP or self.options.link.schedule.steps == 1:
            return
        names = [item.name for item in capture.inputs if item.role.is_given]
        if all(item.role is Role.LATENT for item in capture.inputs if item.role.is_given):
            return  # nothing that could be one: every call is a step
        raise TimestepNotFound(
            f"which input of {type(self.module).__name__} is the timestep cannot be told",
            where=f"inputs {', '.join(names)}",
            why="none is called after time, and none alone goes into a sinusoidal embedding",
            fix='optimize(..., timestep="its name"), or timestep="none" where every call is a step',
        )

    def _require_sites(self, frame: CompiledFrame) -> None:
        """Raise if a caching policy meets a model without sites.

        Raises:
            NoSitesFound: it does.
        """
        if frame.structure.sites or not self.options.policy.rules:
            return
        raise NoSitesFound(
            f"{type(self.module).__name__} has no cacheable branch",
            where=f"analysis, {frame.structure.flops / 1e9:.3f} GFLOP a call",
            why="no residual add with a matrix product in its branch depends on the latent",
            fix="use policy 'none' to compile it without caching",
        )


def _names_of_time(module: nn.Module, said: Said) -> tuple[str, ...]:
    if said.timestep is not None:
        return () if said.timestep == NO_TIMESTEP else (said.timestep,)
    return tuple(name for name in inspect.signature(module.forward).parameters if sounds_like_time(name))
