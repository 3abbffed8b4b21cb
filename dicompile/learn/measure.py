"""Times of steps on the user's own machine, taken in runs of the user's own pipeline.

Inside `measure` steps of all kinds that `auto` chooses from come in turns (`dicompile.plan.timing_plan`), so that a
machine that drifts drifts for all. Timed are whole calls of the denoiser, which the device has finished when they end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from dicompile.compiler import COMPILING, CompiledFrame, Options
from dicompile.device import wait_for
from dicompile.errors import InvalidTiming
from dicompile.learn.watch import followed
from dicompile.model import ModelCalls
from dicompile.opened import tensors_in
from dicompile.plan import TURN, StepPlan, TimedKind, TimestepSchedule, Timing, TimingFacts, timing_plan
from dicompile.policies import NoCache
from dicompile.runtime import Owner, RunReport, current_session
from dicompile.wrapper import Record, record_of

DIGITS = 6
"""Of seconds in a file."""


@contextlib.contextmanager
def measure(model: Any, *, components: Sequence[str] | None = None, backend: str | None = None) -> Iterator[Timing]:
    """Time steps in the runs inside a ``with``; afterwards the model is as it was.

    Every step of these runs is of one of the kinds that "auto" chooses from: everything computed; every branch, or the
    stack, recalled from one stored value, or forecast from two or three. So what they return is not to be looked at.
    The first call of each kind, which loads code, does not count, nor does any time spent compiling. Where a run is
    short, several add up: a step takes as long whatever the number of steps.

    Args:
        model: a diffusers pipeline, optimized or not; or a module that `optimize` returned, with whatever policy. An
            optimized one is timed with its own options: those of the compiler, and how and where the cache stores.
        components: of a pipeline that is not optimized: the denoisers to time, if not all of them.
        backend: of a pipeline that is not optimized: "inductor", the default, or "eager".

    Yields:
        The times, which are complete after the ``with``.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
        InvalidTiming: no call of some kind was timed.

    Example:
        >>> with dicompile.measure(pipe) as timing:
        ...     pipe(prompt, num_inference_steps=50)
        >>> pipe = dicompile.optimize(pipe, "auto", recording=recording, timing=timing, speedup=3)
    """
    with followed(model, components, backend or "inductor") as found:
        timers = {n: Timer(record_of(cached), n if len(found) > 1 else "") for n, cached in found.items()}
        for name, cached in found.items():
            record_of(cached).calls = timers[name]
        timing = Timing()
        yield timing
        taken = {name: timer.taken() for name, timer in timers.items()}
        timing.take(Timing(denoisers=taken) if len(taken) > 1 else next(iter(taken.values())))


class Timer:
    """Calls of a model, whose steps are timed.

    Args:
        record: the model.
        component: its name in a pipeline.

    Attributes:
        owner: see `dicompile.wrapper.Calls`.
        seconds: of the calls so far, by kind of step.
    """

    def __init__(self, record: Record, component: str = "") -> None:
        options = _timed(record.options)
        self._component = component
        self._name, self._records_steps = type(record.module).__name__, options.backend.records_steps
        self._calls = ModelCalls(record.module, options)
        self._begun: set[str] = set()
        self.owner: Owner = self._calls.owner
        self.seconds: dict[str, list[float]] = {}

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled that is kept, what ran last at the end."""
        return self._calls.frames

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call, and time it."""
        before = self._report
        replayed = before.replayed
        device = _device(args, kwargs)
        wait_for(device)
        start, compiled = perf_counter(), COMPILING.seconds
        result = self._calls(args, kwargs)
        wait_for(device)
        seconds = perf_counter() - start - (COMPILING.seconds - compiled)
        report = self._report
        is_replay = report.replayed > (replayed if report is before else 0)
        if report.latest in self._begun and (is_replay or not self._records_steps):
            self.seconds.setdefault(report.latest, []).append(seconds)
        self._begun.add(report.latest)
        return result

    @property
    def _report(self) -> RunReport:
        return current_session().state_of(self.owner).report

    def taken(self) -> Timing:
        """What was timed.

        Raises:
            InvalidTiming: no call of some kind was, or calls were of several shapes.
        """
        if not self.frames:
            raise self._unusable("it was not called", "sample inside of the with")
        frame, several = self.frames[-1], {str(list(frame.conditions.latent)) for frame in self.frames}
        if len(several) > 1:
            raise self._unusable(f"there were latents {' and '.join(sorted(several))}", "time each size by itself")
        structure = frame.structure
        kinds = {step.kind: step for step in timing_plan(structure, TimestepSchedule(TURN)).steps}
        if missing := [kind for kind in sorted(kinds) if kind not in self.seconds]:
            more = f"sample with more steps inside of the with, {3 * TURN} say, or several times; the time is the same"
            if self._component:
                more = f"sample with so many that {self._component} has {TURN} of them, and several times"
            raise self._unusable(f"too few steps ran: of {', '.join(missing)} nothing was timed", more)
        facts = TimingFacts(
            model=self._name,
            sites=tuple(site.label for site in structure.sites),
            spans=tuple(span.label for span in structure.stack),
            **frame.conditions._asdict(),
        )
        return Timing(facts, [_kind(step, self.seconds[kind]) for kind, step in sorted(kinds.items())])

    def _unusable(self, why: str, fix: str) -> InvalidTiming:
        name = f"{self._component} ({self._name})" if self._component else self._name
        return InvalidTiming(f"times of {name} are incomplete", where="dicompile.measure", why=why, fix=fix)


def _device(*given: Any) -> torch.device:
    """Of the first tensor among the arguments of a call."""
    return next((tensor.device for tensor in tensors_in(given)), torch.device("cpu"))


def _kind(step: StepPlan, seconds: Sequence[float]) -> TimedKind:
    rounded = tuple(float(f"{value:.{DIGITS}g}") for value in seconds)
    return TimedKind(name=step.kind, flops=step.flops, bytes=step.bytes, seconds=rounded)


def _timed(options: Options) -> Options:
    """The same, so that steps take as long as they will, but with steps of all kinds."""
    backend = replace(options.backend, in_background=False)
    return replace(
        options, policy=NoCache(), link=options.link.whole, backend=backend, planner=timing_plan, observer=None,
        timing=None,
    )  # fmt: skip
