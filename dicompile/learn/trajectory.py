"""Trajectories: what a denoiser was called with at every step of uncached runs. Routers and predictors learn from them.

They come from the user's own pipeline, so with its scheduler, guidance, adapters and prompts. Kept are the arguments
alone, in host memory, and what did not change since the step before only once: 28 steps of a FLUX model at 1024 pixels
take about 20 MB, most of it the latents. Where that is too much, `Stream` keeps the latest runs only.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dicompile import outside
from dicompile.errors import InvalidTrainingData
from dicompile.learn.checkpoint import save_checkpoint
from dicompile.learn.watch import one_followed, watch
from dicompile.model import ModelCalls
from dicompile.opened import opened, tensors_in
from dicompile.plan import Slot
from dicompile.runtime import Seen
from dicompile.wrapper import CachedModel, record_of

log = logging.getLogger("dicompile")

VERSION = "dicompile.trajectories/1"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One guidance context of one run.

    Attributes:
        run: number of the run.
        context: its label; empty if there is one only.
        calls: keyword arguments of the denoiser at every step; tensors are on the CPU.
    """

    run: int
    context: str
    calls: tuple[Mapping[str, Any], ...] = field(repr=False)

    def call(self, step: int, device: torch.device) -> dict[str, Any]:
        """Keyword arguments at a step."""
        moved: dict[str, Any] = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), opened(dict(self.calls[step]))
        )
        return moved


class Source(Protocol):
    """Where a training finds trajectories."""

    @property
    def sampler(self) -> str:
        """Class of the scheduler."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the runs, in calling order, as the scheduler counts them; an index where it does not."""

    def at(self, iteration: int) -> Sequence[Trajectory]:
        """What an iteration draws from, the same whenever it is asked for; at least one."""


class Trajectories:
    """Recorded trajectories of one model and sampler.

    Attributes:
        model: class of the denoiser.
        sampler: class of the scheduler.
        timesteps: of every run, in calling order, as the scheduler counts them.
        all: the trajectories.

    Example:
        >>> with dicompile.record_trajectories(pipe) as trajectories:
        ...     for prompt in prompts:
        ...         pipe(prompt, num_inference_steps=50)
        >>> router = dicompile.train_router(pipe, trajectories, RouterOptions(iterations=2000))
    """

    def __init__(
        self, model: str = "", sampler: str = "", timesteps: Sequence[float] = (), all: Sequence[Trajectory] = ()
    ) -> None:
        self.model, self.sampler, self.timesteps, self.all = model, sampler, tuple(timesteps), tuple(all)

    @property
    def nbytes(self) -> int:
        """Host memory of all tensors."""
        tensors = {id(value): value for one in self.all for value in _tensors(one.calls)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def at(self, iteration: int) -> Sequence[Trajectory]:
        """All of them, at every iteration."""
        del iteration
        return self.all

    def add(self, other: Trajectories) -> None:
        """Take the trajectories of another recording in.

        Raises:
            InvalidTrainingData: it is of another model or sampler.
        """
        if not self.all:
            self.model, self.sampler, self.timesteps = other.model, other.sampler, other.timesteps
        mine, theirs = (self.model, self.sampler, self.timesteps), (other.model, other.sampler, other.timesteps)
        if mine != theirs:
            raise _unusable("they are of different models or samplers", f"{_about(self)}; {_about(other)}")
        first = max((one.run for one in self.all), default=-1) + 1
        self.all += tuple(Trajectory(first + one.run, one.context, one.calls) for one in other.all)

    def save(self, path: str | Path) -> None:
        """Write one file; arguments that are no tensors have to be plain data."""
        rows = [(one.run, one.context, [dict(call) for call in one.calls]) for one in self.all]
        about = {"model": self.model, "sampler": self.sampler, "timesteps": list(self.timesteps)}
        save_checkpoint({"key": VERSION, **about, "all": rows}, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            InvalidTrainingData: it is missing, damaged, or something else.
        """
        try:
            read = outside.read_pickle(path, most=sys.maxsize)
            if read["key"] != VERSION:
                raise ValueError(f"its format is {read['key']}")
            rows = [Trajectory(int(run), str(context), tuple(calls)) for run, context, calls in read["all"]]
            made = cls(str(read["model"]), str(read["sampler"]), tuple(map(float, read["timesteps"])), rows)
        except (OSError, outside.Unreadable, KeyError, TypeError, ValueError) as error:
            raise _unusable(f"{Path(path).name} holds none", str(error).partition("\n")[0]) from None
        return made

    def __str__(self) -> str:
        runs = len({one.run for one in self.all})
        return f"{_about(self)}: {runs} runs, {len(self.all)} trajectories, {self.nbytes / 1e6:.1f} MB"


@contextlib.contextmanager
def record_trajectories(
    model: Any, *, components: Sequence[str] | None = None, backend: str | None = None
) -> Iterator[Trajectories]:
    """Record what the denoiser is called with inside a ``with``; nothing is cached meanwhile.

    Recorded is every run that goes through the whole schedule, every guidance context by itself.

    Args:
        model: a diffusers pipeline, optimized or not; or a module that `dicompile.optimize` returned.
        components: of a pipeline that is not optimized: the one denoiser to record, if it has several.
        backend: "eager" or "inductor"; by default that of an optimized model, else "eager".

    Yields:
        The trajectories, to which every run is added at its last step.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
        UnsupportedModel: several denoisers.
        InvalidTrainingData: no run came from its first step to its last, or their timesteps differ.
    """
    with one_followed(model, components, backend or "eager") as cached:
        recorder = _Recorder(cached)
        watch(cached, recorder, backend)
        with recorder.listening():
            yield recorder.trajectories
    if not recorder.trajectories.all:
        raise _unusable("no run was recorded", "none called the denoiser at every step of the schedule")


class Stream:
    """Trajectories of runs that are made while the training goes on; the latest ones are kept.

    A run is told its number and nothing else, so that a training which is resumed, or several processes, see the same.

    Args:
        model: as `record_trajectories` takes it.
        run: makes one run of the model, from noise and conditioning that its number decides.
        keep: runs that are kept, and drawn from.
        every: iterations that come with each new run.
        components, backend: as `record_trajectories` takes them.

    Example:
        >>> def run(number):
        ...     pipe(prompts[number % len(prompts)], generator=torch.Generator().manual_seed(number))
        >>> router = dicompile.train_router(pipe, dicompile.Stream(pipe, run), RouterOptions(iterations=2000))
    """

    def __init__(
        self,
        model: Any,
        run: Callable[[int], object],
        *,
        keep: int = 4,
        every: int = 100,
        components: Sequence[str] | None = None,
        backend: str | None = None,
    ) -> None:
        self._model, self._run, self._keep, self._every = model, run, max(1, keep), max(1, every)
        self._components, self._backend = components, backend
        self._made: dict[int, Trajectories] = {}

    @property
    def sampler(self) -> str:
        """Class of the scheduler."""
        return self._first.sampler

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the runs, in calling order."""
        return self._first.timesteps

    def at(self, iteration: int) -> Sequence[Trajectory]:
        """Those of the latest runs; they are made now if they were not yet."""
        last = iteration // self._every
        wanted = range(max(0, last - self._keep + 1), last + 1)
        self._made = {number: self._made.get(number) or self._record(number) for number in wanted}
        return [one for made in self._made.values() for one in made.all]

    @property
    def _first(self) -> Trajectories:
        if not self._made:
            self.at(0)
        return next(iter(self._made.values()))

    def _record(self, number: int) -> Trajectories:
        with record_trajectories(self._model, components=self._components, backend=self._backend) as made:
            self._run(number)
        if self._made and made.timesteps != self.timesteps:
            raise _unusable("the runs of one stream differ", "their timesteps are others")
        return made


class _Recorder:
    """Watches the runs of one denoiser, and adds each to the trajectories at its last step."""

    calls: ModelCalls

    def __init__(self, cached: CachedModel) -> None:
        self.trajectories = Trajectories()
        self._cached, self._record = cached, record_of(cached)
        self._given: dict[str, Any] = {}
        self._open: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        self._runs: dict[int, int] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Learn the arguments of every call."""
        handle = self._cached.register_forward_pre_hook(self._called, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        del module
        names = inspect.signature(self._record.module.forward).parameters
        self._given = {**dict(zip(names, args, strict=False)), **kwargs}

    def saw(self, call: Seen, slot: Slot, value: Tensor) -> None:
        """Values are computed again where they are needed."""

    def ended(self, call: Seen, results: Sequence[Any], tried: object) -> None:
        """Copy what the step was called with; after the last one the context becomes a trajectory."""
        del results, tried
        steps = self._open.setdefault((call.generation, call.context), {})
        steps[call.step] = _on_host(self._given, steps.get(call.step - 1, {}))
        if call.step + 1 < call.schedule.steps:
            return
        del self._open[call.generation, call.context]
        if len(steps) < call.schedule.steps:
            log.warning("a run that did not begin at the first step of the schedule is not recorded")
            return
        run = self._runs.setdefault(call.generation, len(self._runs))
        one = Trajectory(run, call.context, tuple(steps[step] for step in range(call.schedule.steps)))
        known, times = self.trajectories, call.schedule.timesteps or tuple(map(float, range(call.schedule.steps)))
        if known.all and known.timesteps != times:
            raise _unusable("the runs of one recording differ", "their timesteps are others")
        known.model = type(self._record.module).__name__
        known.sampler, known.timesteps = type(self._record.options.link.source).__name__, times
        known.all = (*known.all, one)


def _on_host(given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of all tensors, those of the step before where they are the same."""
    known = dict(pytree.tree_flatten_with_path(opened(dict(before)))[0])

    def copied(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kept, host = known.get(path), value.detach().to("cpu", copy=True)
        same = isinstance(kept, Tensor) and kept.dtype == host.dtype and torch.equal(kept, host)
        return kept if same else host

    made: dict[str, Any] = pytree.tree_map_with_path(copied, opened(dict(given)))
    return made


def _tensors(calls: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return tensors_in(list(map(dict, calls)))


def _about(these: Trajectories) -> str:
    return f"{these.model or 'nothing'}, {these.sampler}, {len(these.timesteps)} steps"


def _unusable(what: str, why: str) -> InvalidTrainingData:
    return InvalidTrainingData(
        f"these trajectories cannot be trained on: {what}",
        where="dicompile.record_trajectories",
        why=why,
        fix="record whole runs of one model with one scheduler and number of steps",
    )
