"""Calibration by the user's own runs: whatever scheduler, guidance, adapters and shapes they have is what is recorded.

Inside `calibrate` every step computes everything, exactly as without a cache, and lets the value of every branch and of
the stack leave its segment; of each a sketch is taken. At the last step of a run the sketches become a Gram matrix,
which is all that is kept. The values themselves stay until the next step, which tries what its output would have been
with them: so much memory a policy takes, too, that reuses every branch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dicompile.analysis import ModelStructure, SiteKind
from dicompile.errors import InvalidRecording
from dicompile.learn.recording import Recording
from dicompile.learn.sketch import Sketcher, gram_of
from dicompile.learn.trace import Facts, Trace
from dicompile.learn.watch import watched
from dicompile.model import ModelCalls
from dicompile.plan import Slot, TimestepSchedule, reusing_plan
from dicompile.runtime import Seen
from dicompile.wrapper import Record, record_of

log = logging.getLogger("dicompile")


@contextlib.contextmanager
def calibrate(
    model: Any, *, components: Sequence[str] | None = None, backend: str | None = None, seed: int = 0
) -> Iterator[Recording]:
    """Record the runs inside a ``with``; nothing is cached meanwhile, and afterwards the model is as it was.

    Recorded is every run that goes through the whole schedule, every guidance context by itself.

    Args:
        model: a diffusers pipeline, optimized or not; or a module that `optimize` returned, with whatever policy.
        components: of a pipeline that is not optimized: the one denoiser to record, if it has several.
        backend: "eager" runs the captured graph operator by operator; "inductor" compiles it. By default that of an
            optimized model, else "eager": a calibration is a few runs.
        seed: of the sketches.

    Yields:
        The recording, to which every run is added at its last step.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
        UnsupportedModel: several denoisers.
        InvalidRecording: no run was recorded from its first step to its last.

    Example:
        >>> with dicompile.calibrate(pipe) as recording:
        ...     pipe(prompt, num_inference_steps=50)
        >>> pipe = dicompile.optimize(pipe, recording.policy(speedup=3))
    """
    with watched(model, lambda cached: Recorder(record_of(cached), Sketcher(seed)), components, backend) as recorder:
        yield recorder.recording
    recorder.check()


@dataclass
class _Open:
    """A context of a run that has not come to its end: sketches by step and value, errors by kind and step."""

    label: str
    steps: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    reused: dict[str, dict[int, float]] = field(default_factory=dict)


class Recorder:
    """Watches runs, and adds each to a recording at its last step.

    Args:
        record: the model.
        sketch: makes sketches.

    Attributes:
        calls: what is watched.
        recording: what was recorded so far.
    """

    calls: ModelCalls

    def __init__(self, record: Record, sketch: Sketcher) -> None:
        self.recording = Recording(NOTHING)
        self._name, self._link = type(record.module).__name__, record.options.link
        self._sketch = sketch
        self._open: dict[tuple[int, str], _Open] = {}
        self._runs: dict[int, int] = {}

    def saw(self, call: Seen, slot: Slot, value: Tensor) -> None:
        """Take the sketch of a value."""
        self._values(call)[int(slot.site)] = self._sketch(value)

    def ended(self, call: Seen, results: Sequence[Any], tried: Callable[[], Mapping[str, Sequence[Any]]]) -> None:
        """Take the sketches of output and latent; after the last step the context becomes a trace."""
        values = self._values(call)
        output = _first(results)
        values[_OUTPUT] = self._sketch(output)
        values[_LATENT] = self._sketch(output if call.latent is None else call.latent)
        reused = self._open[call.generation, call.context].reused
        for kind, outputs in tried().items():
            wrong = (_first(outputs) - output).float().norm() / output.float().norm()
            reused.setdefault(kind, {})[call.step] = float(wrong)
        if call.step + 1 == call.schedule.steps:
            self._close(call)

    def check(self) -> None:
        """Raise if nothing was recorded; say what was left out.

        Raises:
            InvalidRecording: no run came from its first step to its last.
        """
        if self._open:
            log.warning("%d contexts that did not run at every step of the schedule are not recorded", len(self._open))
        if not self.recording.traces:
            raise InvalidRecording(
                f"no run of {self._name} was recorded",
                where="dicompile.calibrate",
                why="none called it at every step of the schedule",
                fix="sample inside of the with, from noise to the last step",
            )

    def _values(self, call: Seen) -> dict[int, Tensor]:
        open_ = self._open.setdefault((call.generation, call.context), _Open(call.context))
        return open_.steps.setdefault(call.step, {})

    def _sigmas(self, steps: int) -> tuple[float, ...]:
        """Of the scheduler, if every step goes from one to the next."""
        sigmas = getattr(self._link.source, "sigmas", ())
        return tuple(float(sigma) for sigma in sigmas) if len(sigmas) == steps + 1 else ()

    def _close(self, call: Seen) -> None:
        open_ = self._open[call.generation, call.context]
        if len(open_.steps) < call.schedule.steps:
            return
        del self._open[call.generation, call.context]
        structure = self.calls.frames[-1].structure
        latent = () if call.latent is None else tuple(call.latent.shape)
        facts = facts_of(self._name, structure, call.schedule, latent, self._sigmas(call.schedule.steps))
        numbers = [*_recorded(structure), _OUTPUT, _LATENT]
        if any(set(values) != set(numbers) for values in open_.steps.values()):
            raise InvalidRecording(
                f"calls of one run go through {self._name} in different ways",
                where="dicompile.calibrate",
                why="not every step has the same branches",
                fix="calibrate without the guidance or setting that skips some",
            )
        rows = [torch.stack([open_.steps[step][i] for step in range(call.schedule.steps)]) for i in numbers]
        run = self._runs.setdefault(call.generation, len(self._runs))
        gram = torch.cat([gram_of(row[None]) for row in rows])
        steps = range(call.schedule.steps)
        reused = [[open_.reused.get(level, {}).get(step, 0.0) for step in steps] for level in facts.levels]
        trace = Trace(run, open_.label or "-", gram, torch.tensor(reused, dtype=torch.float64))
        known = self.recording
        if known.facts is NOTHING:
            known.facts = facts
        elif why := known.facts.why_not(facts):
            raise InvalidRecording(
                "the runs of one calibration differ", where=self._name, why=why, fix="calibrate each by itself"
            )
        known.traces = (*known.traces, trace)


def _first(results: Sequence[Any]) -> Tensor:
    """The model's output."""
    return next(result for result in results if isinstance(result, Tensor))


_OUTPUT, _LATENT = -1, -2
NOTHING = Facts(model="", sites=(), steps=1, full_flops=0, site_flops=0, stack_flops=0, site_bytes=0, stack_bytes=0)
"""Before the first run has come to its end."""


def facts_of(
    name: str,
    structure: ModelStructure,
    schedule: TimestepSchedule,
    latent: tuple[int, ...],
    sigmas: tuple[float, ...] = (),
) -> Facts:
    """What a recording says of a model and a sampler; costs are those of the plans that will use it."""
    spans = tuple(span.label for span in structure.stack)
    site = reusing_plan(structure, "site")
    stack = reusing_plan(structure, "stack") if spans else site
    return Facts(
        model=name,
        sites=tuple(s.label for s in structure.sites),
        spans=spans,
        timesteps=schedule.timesteps,
        steps=schedule.steps,
        sigmas=sigmas,
        latent=latent,
        full_flops=structure.flops,
        site_flops=site.steps[1].flops,
        stack_flops=stack.steps[1].flops,
        site_bytes=site.cache_bytes,
        stack_bytes=stack.cache_bytes,
    )


def _recorded(structure: ModelStructure) -> list[int]:
    """Numbers of the sites, and of the spans of the stack."""
    return [int(site.id) for site in structure.everything if site.kind is not SiteKind.BLOCK]
