"""CUDA graphs: the kernels of a whole step are recorded once, and from then on launched as one.

What was recorded reads and writes the addresses that it was recorded with. So whatever differs between two calls of a
step has a place that never moves: inputs, tables, weights and random scores are copied there before, what the step
stores is copied into its slots at its end, and the caller gets copies of the results. What is not copied, the weights
of the model, stands with its addresses in the key of a recording, as do token counts and clocks, which are baked in.
Whatever else a kernel asks of torch when it is launched is as it was when it was recorded.

A step that was never seen runs as it is, on the very same memory: that loads and tunes its kernels. The second time it
is recorded, the third time replayed. Memory and recordings outlive the generation; they belong to one context at a
time, and to the next one when that has forgotten what it stored, or is gone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dicompile.errors import InvalidSetting
from dicompile.latest import Latest
from dicompile.runtime.storage import run_calls
from dicompile.text import first_line

if TYPE_CHECKING:
    from dicompile.runtime.contexts import ContextState
    from dicompile.runtime.steps import Step

log = logging.getLogger("dicompile")

PLAIN, RECORDED, REPLAYED = "plain", "recorded", "replayed"
"""How a step ran: kernel by kernel, or as a CUDA graph, one that was recorded for it or before."""

MOST_RECORDINGS = 256
"""Different steps that are recorded for one context: a run of 250 steps may have no two alike."""


@dataclass
class Outcome:
    """What a step leaves.

    Attributes:
        results: outputs of the model.
        chosen: tokens that sites refreshed, where somebody asked for them.
        store: the slots after it, by their numbers.
    """

    results: list[Any]
    chosen: dict[int, Tensor]
    store: list[Tensor | None]


class Recording(Protocol):
    """A recorded step."""

    def replay(self) -> Outcome:
        """Run it; what it leaves lies at the same addresses every time, until anything of its pool runs again."""
        ...


class Recorder(Protocol):
    """Records what runs on one device."""

    lock: threading.RLock

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """While open, this thread alone uses what was recorded, after all that its stream has to do so far."""
        ...

    def new_pool(self) -> Any:
        """Memory for recordings of which never two run at once."""
        ...

    def record(self, compute: Callable[[], Outcome], pool: Any) -> Recording:
        """Record what a function does, instead of doing it."""
        ...

    def give(self, tensor: Tensor) -> Tensor:
        """A copy for the caller, who goes on with the stream that was the current one before the turn."""
        ...

    def bytes_of(self, pool: Any) -> int:
        """What a pool holds."""
        ...

    def release(self) -> None:
        """Memory of pools that are gone becomes free for everybody."""
        ...


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph.

    Attributes:
        graph: it.
        outcome: tensors in its pool, and slots.
    """

    graph: torch.cuda.CUDAGraph
    outcome: Outcome

    def replay(self) -> Outcome:
        """See `Recording`."""
        self.graph.replay()
        return self.outcome


_ONE_AT_A_TIME = threading.Lock()
"""Held while something is recorded: torch can do so once at a time in a process."""


class CudaRecorder:
    """Records CUDA graphs, on one stream for all models of a device.

    Everything that touches what recordings read or write runs on that stream, copies included, in the order of the
    turns; the streams of callers wait for it, and it for them, and the host for neither. So no two recordings ever run
    at once: they may share scratch memory (a pool, workspaces of cuBLAS), whichever thread, session or model it is.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._stream = torch.cuda.Stream(device)
        self._caller = torch.cuda.current_stream(device)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder`."""
        with self.lock:
            caller = self._caller = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                caller.wait_stream(self._stream)

    def new_pool(self) -> Any:
        """See `Recorder`."""
        return torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], Outcome], pool: Any) -> Recording:
        """See `Recorder`.

        Raises:
            InvalidSetting: something in the step needs the host.
        """
        from torch._inductor.cudagraph_trees import clear_cublas_manager  # imports much, and nothing without a GPU

        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            # A workspace that was there before the recording could be freed while recordings still write to it; one
            # that is made during the recording is part of the pool.
            with _ONE_AT_A_TIME, clear_cublas_manager(), recording:
                outcome = compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InvalidSetting(
                "a step of this model cannot be recorded as a CUDA graph",
                where="compile_mode",
                why=first_line(error),
                fix="leave out compile_mode='reduce-overhead'",
            ) from error
        return CudaRecording(graph, outcome)

    def give(self, tensor: Tensor) -> Tensor:
        """See `Recorder`."""
        copy = tensor.clone()
        copy.record_stream(self._caller)
        return copy

    def bytes_of(self, pool: Any) -> int:
        """See `Recorder`."""
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))

    def release(self) -> None:
        """See `Recorder`."""
        with self.lock:
            self._stream.synchronize()
            torch.cuda.empty_cache()


@functools.cache
def recorder_of(device: torch.device) -> Recorder:
    """What records on a CUDA device; one for all models."""
    return CudaRecorder(device)


class Static:
    """A place for tensors of one layout that never moves.

    Args:
        like: such a tensor; where it repeats one number along an axis, so does the place.
    """

    def __init__(self, like: Tensor) -> None:
        repeated = [size > 1 and not stride for size, stride in zip(like.shape, like.stride(), strict=True)]
        self._part = tuple(slice(0, 1) if again else slice(None) for again in repeated)
        part = self.part_of(like)
        with torch.inference_mode(mode=False):
            self.written = torch.empty_strided(part.shape, part.stride(), dtype=like.dtype, device=like.device)
            self.tensor = self.written.expand(like.shape)
        self.source: Callable[[], Tensor | None] = _nothing

    def part_of(self, tensor: Tensor) -> Tensor:
        """What of a tensor has to be copied."""
        return tensor[self._part] if self._part else tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to this place; returns what lies there."""
        self.written.copy_(self.part_of(tensor))
        return self.tensor


class Buffers:
    """Memory that does not move, and what was recorded on it; used by one context at a time.

    Args:
        pool: memory of the recordings for what is gone when a step ends.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.pool_bytes = 0
        self.static_bytes = 0
        self.weights: tuple[int, ...] | None = None
        self.recordings: Latest[Recording | None] = Latest(MOST_RECORDINGS)
        self._statics: dict[Hashable, Static] = {}
        self._user: Callable[[], ContextState | None] = _nothing

    @property
    def is_free(self) -> bool:
        """True if the context that used it is gone, or has forgotten what it stored."""
        user = self._user()
        return user is None or user.buffers is not self

    def serve(self, context: ContextState) -> None:
        """Belong to a context from now on."""
        context.buffers, self._user = self, weakref.ref(context)

    def load(self, step: Step, registers: list[Any], given: Sequence[int]) -> None:
        """Copy what differs between calls to where the recordings read it, and put that into the registers.

        Anybody may write to what a call is given, so it is copied at every call; tables and weights, which are ours,
        are copied when there are others.
        """
        filled: list[tuple[Static, Tensor]] = []
        for name, register in (*((i, i) for i in given), *step.loads):
            value = registers[register]
            if not isinstance(value, Tensor):
                continue  # a number, part of the key
            static = self._static(name, value)
            registers[register] = static.tensor
            if static.source() is not value or isinstance(name, int):
                static.source = weakref.ref(value)
                filled.append((static, value))
        if filled:
            written, parts = [static.written for static, _ in filled], [s.part_of(value) for s, value in filled]
            torch._foreach_copy_(written, parts)

    def keep(self, step: Step, registers: Sequence[Any], old: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Copy what a step stores into its slots.

        Args:
            step: the step.
            registers: after it.
            old: slots before it, by their numbers.

        Returns:
            Slots after it.
        """
        places = {_place(static.tensor) for static in self._statics.values()}
        fresh: dict[int, Tensor] = {}
        for number, source in enumerate(step.moves):
            if source is not None and source < 0:
                tensor = registers[~source]  # where it is passed on from a slot, that one may be overwritten first
                fresh[number] = tensor.clone() if _place(tensor) in places else tensor
        after: list[Tensor | None] = [None] * len(step.moves)
        for number in range(len(after) - 1, -1, -1):  # ages of a slot are numbered upwards: the oldest moves first
            source = step.moves[number]
            content = fresh.get(number) if source is None or source < 0 else old[source]
            if content is not None:
                is_there = source == number
                after[number] = content if is_there else self._static(step.slots[number], content).copy(content)
        return after

    def _static(self, name: Hashable, like: Tensor) -> Static:
        key = (name, like.shape, like.stride(), like.dtype)
        static = self._statics.get(key)
        if static is None:
            static = self._statics[key] = Static(like)
            self.static_bytes += static.written.untyped_storage().nbytes()
        return static


class Graphs:
    """Recorded steps of one model by one compiled code, on as many sets of buffers as it had contexts at once.

    Args:
        recorder: of its device.
        given: numbers of the inputs that calls bring.
        own: numbers of those that lie where they lie: parameters, buffers and constants.
    """

    def __init__(self, recorder: Recorder, given: Sequence[int], own: Sequence[int] = ()) -> None:
        self.recorder, self._given, self._own = recorder, tuple(given), tuple(own)
        self._all: list[Buffers] = []
        self._have_moved = False

    @property
    def bytes(self) -> int:
        """Bytes of all buffers and pools."""
        return sum(buffers.static_bytes + buffers.pool_bytes for buffers in self._all)

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """While open, nobody else touches the buffers of this device."""
        return self.recorder.turn()

    def run(
        self, step: Step, registers: list[Any], context: ContextState | None, *, keep_chosen: bool
    ) -> tuple[Outcome, str]:
        """Run a step within a turn.

        Args:
            step: the step.
            registers: all that it reads.
            context: whose slots it reads and writes; None if it has none.
            keep_chosen: also tell which tokens were refreshed.

        Returns:
            What it leaves; and how it ran: `PLAIN`, `RECORDED` or `REPLAYED`.
        """
        buffers = self._buffers_of(context)
        buffers.load(step, registers, self._given)
        start = tuple(registers)
        old = () if context is None else tuple(context.store)

        def compute() -> Outcome:
            own = list(start)
            run_calls(step.program, own, None)
            results, chosen = step.outputs(own), step.chosen(own) if keep_chosen else {}
            return Outcome(results, chosen, buffers.keep(step, own, old))

        self._check_weights(buffers, tuple(_address(start[i]) for i in self._own))
        moved = [old[source] for source in step.moves if source is not None and source >= 0]
        key = (step.key, keep_chosen, _settings(), *map(_address, (*start, *moved)))
        outcome, how = self._replayed(buffers, key, compute)
        return self._given_away(outcome), how

    def _replayed(self, buffers: Buffers, key: Hashable, compute: Callable[[], Outcome]) -> tuple[Outcome, str]:
        recordings, how = buffers.recordings, REPLAYED
        if key not in recordings:
            if len(recordings) == recordings.most:
                log.warning("more than %d different steps: the CUDA graphs of some are dropped", MOST_RECORDINGS)
            outcome = compute()
            recordings.put(key, None)
            return outcome, PLAIN
        recording = recordings.get(key)
        if recording is None:
            recording, how = self._recorded(buffers, compute), RECORDED
            recordings.put(key, recording)
        return recording.replay(), how

    def _check_weights(self, buffers: Buffers, weights: tuple[int, ...]) -> None:
        """Drop what was recorded with weights that have been moved or replaced since."""
        if buffers.weights not in (None, weights):
            buffers.recordings.clear()
            if not self._have_moved:
                log.warning("weights were moved or replaced: steps are recorded as CUDA graphs anew whenever they are")
            self._have_moved = True
        buffers.weights = weights

    def _recorded(self, buffers: Buffers, compute: Callable[[], Outcome]) -> Recording:
        try:
            recording = self.recorder.record(compute, buffers.pool)
        except BaseException:
            buffers.pool = self.recorder.new_pool()  # in what state that leaves the old one, nobody knows
            raise
        buffers.pool_bytes = self.recorder.bytes_of(buffers.pool)
        return recording

    def trim(self) -> None:
        """Release the buffers that belong to no context, with all that was recorded on them."""
        with self.recorder.lock:
            kept = [buffers for buffers in self._all if not buffers.is_free]
            if len(kept) < len(self._all):
                self._all = kept
                self.recorder.release()

    def _buffers_of(self, context: ContextState | None) -> Buffers:
        if context is not None and context.buffers is not None:
            return context.buffers
        found = next((buffers for buffers in self._all if buffers.is_free), None)
        if found is None:
            found = Buffers(self.recorder.new_pool())
            self._all.append(found)
        if context is not None:
            found.serve(context)
        return found

    def _given_away(self, outcome: Outcome) -> Outcome:
        give = self.recorder.give
        results = [give(result) if isinstance(result, Tensor) else result for result in outcome.results]
        chosen = {site: give(tokens) for site, tokens in outcome.chosen.items()}
        return Outcome(results, chosen, list(outcome.store))


def _nothing() -> None:
    return None


def _settings() -> tuple[object, ...]:
    """What kernels ask for when they are launched, and no compiled code depends on."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _address(value: Any) -> Any:
    """Where a tensor lies; a number, or nothing, as it is."""
    return value.data_ptr() if isinstance(value, Tensor) else value


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
