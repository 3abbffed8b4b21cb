"""Calibration by the user's own runs: whatever scheduler, guidance, adapters and shapes they have is what is recorded.

A run may go through several denoisers, one after the other: what is recorded of it is one thing all the same, and who
had which steps.

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
from dicompile.errors import InvalidRecording, UnsupportedModel
from dicompile.learn.recording import Recording
from dicompile.learn.sketch import Sketcher, gram_of
from dicompile.learn.trace import Facts, Part, Trace
from dicompile.learn.watch import followed, output_of, watch
from dicompile.model import ModelCalls
from dicompile.plan import Slot, Stint, reusing_plan
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
        components: of a pipeline that is not optimized: the denoisers to record, if not all of them.
        backend: "eager" runs the captured graph operator by operator; "inductor" compiles it. By default that of an
            optimized model, else "eager": a calibration is a few runs.
        seed: of the sketches.

    Yields:
        The recording, to which every run is added at its last step.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
        UnsupportedModel: several denoisers with other branches than each other.
        InvalidRecording: no run was recorded from its first step to its last; or several denoisers run at one step.

    Example:
        >>> with dicompile.calibrate(pipe) as recording:
        ...     pipe(prompt, num_inference_steps=50)
        >>> pipe = dicompile.optimize(pipe, recording.policy(speedup=3))
    """
    with followed(model, components, backend or "eager") as found:
        recorder = Recorder({name: record_of(cached) for name, cached in found.items()}, Sketcher(seed))
        for name, cached in found.items():
            watch(cached, Listener(recorder, name), backend)
        yield recorder.recording
    recorder.check()


@dataclass
class _Open:
    """A context of a run that has not come to its end: by step who ran, sketches by value, and errors by kind."""

    label: str
    schedule_token: object
    served: dict[int, str] = field(default_factory=dict)
    steps: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    reused: dict[str, dict[int, float]] = field(default_factory=dict)


class Listener:
    """Watches one denoiser for a recorder.

    Args:
        recorder: what records.
        name: of the denoiser in its pipeline.

    Attributes:
        calls: what is watched.
    """

    calls: ModelCalls

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def saw(self, call: Seen, slot: Slot, value: Tensor) -> None:
        """Take the sketch of a value."""
        self._recorder.saw(self._name, call, slot, value)

    def ended(self, call: Seen, results: Sequence[Any], tried: Callable[[], Mapping[str, Sequence[Any]]]) -> None:
        """Take the sketches of output and latent; after the last step the context becomes a trace."""
        self._recorder.structures[self._name] = self.calls.frames[-1].structure
        self._recorder.ended(self._name, call, results, tried)


class Recorder:
    """Watches runs, and adds each to a recording at its last step.

    Args:
        records: the denoisers by component.
        sketch: makes sketches.

    Attributes:
        recording: what was recorded so far.
        structures: of the denoisers that ran.
    """

    def __init__(self, records: Mapping[str, Record], sketch: Sketcher) -> None:
        self.recording = Recording(NOTHING)
        self.structures: dict[str, ModelStructure] = {}
        self._names = {name: type(record.module).__name__ for name, record in records.items()}
        self._link = next(iter(records.values())).options.link
        self._sketch = sketch
        self._open: dict[tuple[str, int, str], _Open] = {}
        self._left: dict[tuple[str, int, str], str] = {}
        self._runs: dict[int, int] = {}

    def saw(self, name: str, call: Seen, slot: Slot, value: Tensor) -> None:
        """Take the sketch of a value of a denoiser."""
        self._values(name, call)[int(slot.site)] = self._sketch(value)

    def ended(
        self, name: str, call: Seen, results: Sequence[Any], tried: Callable[[], Mapping[str, Sequence[Any]]]
    ) -> None:
        """Take the sketches of output and latent; after the last step the context becomes a trace."""
        values = self._values(name, call)
        output = output_of(results)
        values[_OUTPUT] = self._sketch(output)
        values[_LATENT] = self._sketch(output if call.latent is None else call.latent)
        reused = self._open[name, call.generation, call.context].reused
        for kind, outputs in tried().items():
            wrong = (output_of(outputs) - output).float().norm() / output.float().norm()
            reused.setdefault(kind, {})[call.step] = float(wrong)
        if call.step + 1 == call.schedule.steps:
            self._close(name, call)

    def check(self) -> None:
        """Raise if nothing was recorded; say what was left out.

        Raises:
            InvalidRecording: no run came from its first step to its last.
        """
        if self._open:
            log.warning("%d contexts that did not run at every step of the schedule are not recorded", len(self._open))
        if not self.recording.traces:
            raise InvalidRecording(
                f"no run of {' and '.join(dict.fromkeys(self._names.values()))} was recorded",
                where="dicompile.calibrate",
                why="none called it at every step of the schedule",
                fix="sample inside of the with, from noise to the last step",
            )

    def _values(self, name: str, call: Seen) -> dict[int, Tensor]:
        key = name, call.generation, call.context
        if key in self._left:
            raise self._beside(name, self._left[key])
        if key not in self._open:
            self._open[key] = self._taken_over(name, call) or _Open(call.context, self._link.token)
        open_ = self._open[key]
        open_.served[call.step] = name
        return open_.steps.setdefault(call.step, {})

    def _taken_over(self, name: str, call: Seen) -> _Open | None:
        """The context of this run that another denoiser has brought to this step, if there is one."""
        for key, open_ in self._open.items():
            is_ours = open_.label == call.context and open_.schedule_token is self._link.token
            if is_ours and key[0] != name and max(open_.steps) + 1 == call.step:
                self._left[key] = name
                return self._open.pop(key)
        return None

    @staticmethod
    def _beside(first: str, second: str) -> InvalidRecording:
        return InvalidRecording(
            f"{first} and {second} run side by side",
            where="dicompile.calibrate",
            why="a run can be shared between denoisers that take over from each other, each once",
            fix=f"calibrate and optimize one of them: components=[{first!r}]",
        )

    def _sigmas(self, steps: int) -> tuple[float, ...]:
        """Of the scheduler, if every step goes from one to the next."""
        sigmas = getattr(self._link.source, "sigmas", ())
        return tuple(float(sigma) for sigma in sigmas) if len(sigmas) == steps + 1 else ()

    def _close(self, name: str, call: Seen) -> None:
        open_ = self._open[name, call.generation, call.context]
        if len(open_.steps) < call.schedule.steps:
            return
        del self._open[name, call.generation, call.context]
        facts = self._facts(open_, call)
        numbers = [*_recorded(self.structures[name]), _OUTPUT, _LATENT]
        if any(set(values) != set(numbers) for values in open_.steps.values()):
            raise InvalidRecording(
                f"calls of one run go through {self._names[name]} in different ways",
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
        elif not set(known.facts.components) & set(facts.components):
            raise self._beside(known.facts.components[0], facts.components[0])
        elif why := known.facts.why_not(facts):
            raise InvalidRecording(
                "the runs of one calibration differ", where=facts.model, why=why, fix="calibrate each by itself"
            )
        known.traces = (*known.traces, trace)

    def _facts(self, open_: _Open, call: Seen) -> Facts:
        """What is known of a run: of its first denoiser, and, in a pipeline with several, who had which steps."""
        steps, structures = call.schedule.steps, {name: self.structures[name] for name in open_.served.values()}
        (first, structure), *others = structures.items()
        for name, other in others:
            if labels_of(other) != labels_of(structure):
                raise UnsupportedModel(
                    f"{first} and {name} have other branches than each other",
                    where="dicompile.calibrate",
                    why="one policy is made for the whole run",
                    fix="use a published policy, such as dicompile.TaylorSeer(interval=3)",
                )
        costs = {name: costs_of(self._names[name], each) for name, each in structures.items()}
        served = list(open_.served.values())
        stints = [Stint(component=n, first=served.index(n), end=served.index(n) + served.count(n)) for n in structures]
        return Facts(
            **costs[first],
            sites=labels_of(structure)[0],
            spans=labels_of(structure)[1],
            timesteps=call.schedule.timesteps,
            steps=steps,
            sigmas=self._sigmas(steps),
            latent=() if call.latent is None else tuple(call.latent.shape),
            parts=tuple(Part(**costs[s.component], stint=s) for s in stints) if len(self._names) > 1 else (),
        )


_OUTPUT, _LATENT = -1, -2
NOTHING = Facts(model="", sites=(), steps=1, full_flops=0, site_flops=0, stack_flops=0, site_bytes=0, stack_bytes=0)
"""Before the first run has come to its end."""


def labels_of(structure: ModelStructure) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of the sites, and of the spans of the stack."""
    return tuple(site.label for site in structure.sites), tuple(span.label for span in structure.stack)


def costs_of(model: str, structure: ModelStructure) -> dict[str, Any]:
    """Fields of `Costs`: those of the plans that will use a recording."""
    site = reusing_plan(structure, "site")
    stack = reusing_plan(structure, "stack") if structure.stack else site
    return {
        "model": model,
        "full_flops": structure.flops,
        "site_flops": site.steps[1].flops,
        "stack_flops": stack.steps[1].flops,
        "site_bytes": site.cache_bytes,
        "stack_bytes": stack.cache_bytes,
    }


def _recorded(structure: ModelStructure) -> list[int]:
    """Numbers of the sites, and of the spans of the stack."""
    return [int(site.id) for site in structure.everything if site.kind is not SiteKind.BLOCK]
