"""Recordings: what calibration runs have left, their file, and the policies that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dicompile import outside
from dicompile.errors import InvalidRecording, InvalidSetting, InvalidTiming
from dicompile.learn.frontier import Frontier
from dicompile.learn.trace import READABLE, Costs, Facts, Growth, Trace
from dicompile.plan import CacheOptions, Cadence, Level, Policy, Timing
from dicompile.store import save_tensors


class Recording:
    """What was recorded in calibration runs.

    Args:
        facts: see `Facts`.
        traces: see `Trace`.
        growth: what `dicompile.probe` has found.

    Example:
        >>> with dicompile.calibrate(pipe) as recording:
        ...     pipe(prompt, num_inference_steps=50)
        >>> print(recording.frontier())
        >>> pipe = dicompile.optimize(pipe, recording.policy(speedup=3))
    """

    def __init__(self, facts: Facts, traces: Sequence[Trace] = (), growth: Sequence[Growth] = ()) -> None:
        self.facts, self.traces, self.growth = facts, tuple(traces), tuple(growth)

    @property
    def runs(self) -> tuple[int, ...]:
        """Numbers of the runs."""
        return tuple(sorted({trace.run for trace in self.traces}))

    def of_runs(self, runs: Sequence[int]) -> Recording:
        """The part of some runs, so that others can be held out.

        Raises:
            InvalidRecording: none of them is there.
        """
        traces = [trace for trace in self.traces if trace.run in runs]
        if not traces:
            raise InvalidRecording(f"the recording has no run {list(runs)}", fix=f"choose of {list(self.runs)}")
        return Recording(self.facts, traces, self.growth)

    def __add__(self, other: Recording) -> Recording:
        """All runs of both.

        Raises:
            InvalidRecording: they are of different models, samplers or shapes.
        """
        why = self.facts.why_not(other.facts)
        if why:
            raise InvalidRecording(
                "two recordings do not add up",
                where=self.facts.model,
                why=why,
                fix="record both with the same model, number of steps, scheduler and size",
            )
        first = max(self.runs, default=-1) + 1 - min(other.runs, default=0)
        later = (replace(trace, run=trace.run + first) for trace in other.traces)
        return Recording(self.facts, (*self.traces, *later), (*self.growth, *other.growth))

    def frontier(self, max_cache_bytes: int | str | None = None, timing: Timing | None = None) -> Frontier:
        """The least error that is expected for every compute, or for every time.

        Args:
            max_cache_bytes: of one guidance context, as `dicompile.optimize` takes it.
            timing: what `measure` has timed; then plans are weighed by time, and else by operations.

        Raises:
            InvalidRecording: nothing was recorded.
            InvalidTiming: another model, or another size, was timed.
        """
        if not self.traces:
            raise InvalidRecording("nothing was recorded", where="Recording", fix="sample inside of the with")
        for component, (_, costs) in zip(self.facts.components, self.facts.shares, strict=True):
            if timing is not None:
                _check_timing(self.facts, costs, timing.of(component))
        return Frontier(self.facts, self.traces, CacheOptions.of(max_cache_bytes).max_bytes, timing, self.growth)

    def policy(
        self,
        *,
        budget: float | None = None,
        speedup: float | None = None,
        max_error: float | None = None,
        max_cache_bytes: int | str | None = None,
        timing: Timing | None = None,
    ) -> Policy:
        """The best policy that was found for one of three goals.

        Args:
            budget: operations of the run over those without caching, in (0, 1]; with `timing` its time in the denoiser.
            speedup: its inverse.
            max_error: relative L2 error of the last latent that is expected, unitless; the least cost that keeps it.
            max_cache_bytes: of one guidance context, as `dicompile.optimize` takes it.
            timing: what `measure` has timed.

        Raises:
            InvalidSetting: not one goal is given, or it cannot be reached.
            InvalidRecording: nothing was recorded.
            InvalidTiming: another model, or another size, was timed.
        """
        frontier = self.frontier(max_cache_bytes, timing)
        return frontier.policy(frontier.point(budget=budget, speedup=speedup, max_error=max_error))

    def fitted(self, cadence: Cadence, order: int = 2, level: Level = "site") -> Policy:
        """Weights for every branch, or for the stack, at full steps that are given.

        Args:
            cadence: which steps compute everything.
            order: stored values used besides the latest one.
            level: "site" forecasts every branch, "stack" what the whole stack adds.

        Raises:
            InvalidRecording: nothing was recorded.

        Reference:
            L2P, arXiv 2604.26365.
        """
        return self.frontier().fitted(cadence, order, level)

    def magnitudes(self) -> tuple[float, ...]:
        """By how much what the stack adds grows from every step to the next: the table of `MagCache` for this model.

        The published tables are means over tokens of the ratio of norms; these are ratios of the norm over all tokens,
        of all streams together, averaged over runs and contexts.

        Raises:
            InvalidRecording: the model has no stack of blocks.

        Reference:
            Ma et al., MagCache, arXiv 2506.09045, section 3.
        """
        spans = [self.facts.values.index(name) for name in self.facts.spans]
        if not spans or not self.traces:
            raise InvalidRecording(
                f"the recording of {self.facts.model} has no update of the stack",
                where="Recording.magnitudes",
                fix="use a policy for single branches",
            )
        grams = torch.stack([trace.gram[spans].sum(0) for trace in self.traces])
        norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
        return (1.0, *(norms[:, 1:] / norms[:, :-1]).mean(0).tolist())

    def drifts(self, lags: int = 3) -> dict[str, list[list[float]]]:
        """How far the values of every kind of branch are from what they are some steps later: for `smooth_schedule`.

        Relative L2 distances, averaged over branches of a kind, runs and contexts; the published ones are L1.

        Args:
            lags: most steps from one to the other.

        Returns:
            Per kind of site and lag, one for every step that is followed by so many.

        Reference:
            Liu et al., SmoothCache, arXiv 2411.10510, section 2.
        """
        kinds: dict[str, list[int]] = {}
        for number, label in enumerate(self.facts.sites):
            kinds.setdefault(label.partition(".")[2], []).append(number)
        return {kind: [self._drift(sites, lag) for lag in range(1, lags + 1)] for kind, sites in kinds.items()}

    def _drift(self, sites: Sequence[int], lag: int) -> list[float]:
        grams = torch.stack([trace.gram[list(sites)] for trace in self.traces]).flatten(0, 1)
        energy = grams.diagonal(dim1=-2, dim2=-1)
        between = grams.diagonal(lag, dim1=-2, dim2=-1)
        squares = (energy[:, :-lag] + energy[:, lag:] - 2 * between) / energy[:, lag:]
        return [float(value) for value in squares.clamp_min(0).sqrt().mean(0)]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: a Gram matrix for every run and context, the facts in its header."""
        tensors = {f"gram/{trace.run}/{trace.context}": trace.gram.contiguous() for trace in self.traces}
        tensors |= {f"reused/{trace.run}/{trace.context}": trace.reused.contiguous() for trace in self.traces}
        if self.growth:
            tensors["growth"] = torch.tensor([[each.step, each.factor] for each in self.growth], dtype=torch.float64)
        save_tensors(Path(path), tensors, {"dicompile.recording": self.facts.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            InvalidRecording: it is missing, damaged, or something else.
        """
        try:
            metadata, tensors = outside.read_safetensors(path)
            facts = Facts.from_json(metadata["dicompile.recording"], str(path))
            traces = [_trace(name, tensors) for name in tensors if name.startswith("gram/")]
            shapes = (len(facts.values), facts.steps, facts.steps), (len(facts.levels), facts.steps)
            wrong = [t for t in traces if (tuple(t.gram.shape), tuple(t.reused.shape)) != shapes]
            if wrong or facts.version not in READABLE or not facts.is_whole:
                shown = [list(trace.gram.shape) for trace in wrong]
                served = ", ".join(map(str, facts.stints))
                raise ValueError(f"format {facts.version}, {facts.steps} steps ({served}), matrices of shape {shown}")
            growth = _growth(tensors.get("growth", torch.empty(0, 2, dtype=torch.float64)), facts.steps)
        except (OSError, KeyError, ValueError) as error:  # ours among them
            raise InvalidRecording(
                f"{Path(path).name} is not a recording",
                where=str(path),
                why=str(error).partition("\n")[0],
                fix="make one: with dicompile.calibrate(pipe) as recording: ...; recording.save(file)",
            ) from None
        return cls(facts, sorted(traces, key=lambda trace: (trace.run, trace.context)), growth)

    def __str__(self) -> str:
        facts, contexts = self.facts, len({trace.context for trace in self.traces})
        served = f" ({', '.join(map(str, facts.stints))})" if facts.stints else ""
        return (
            f"{facts.model}: {len(self.runs)} runs of {facts.steps} steps{served}, {contexts} contexts, "
            f"{len(facts.sites)} branches" + (f", {len(self.growth)} probes" if self.growth else "")
        )


def _check_timing(facts: Facts, costs: Costs, timing: Timing) -> None:
    """Raise if times are of another model or size than a recording; the batch may be another one.

    Args:
        facts: of the recording.
        costs: the denoiser that was timed.
        timing: its times.

    Raises:
        InvalidTiming: they are.
    """
    timed = timing.facts
    timing.check_model(costs.model, "recording")
    pairs = (
        ("branches", len(timed.sites), len(facts.sites)),
        ("kinds of branch", timed.sites, facts.sites),
        ("streams", len(timed.spans), len(facts.spans)),
        ("latents of size", list(timed.latent[1:]), list(facts.latent[1:] or timed.latent[1:])),
    )
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise InvalidTiming(
                f"times are of {what} {mine}, the recording is of {theirs}",
                where=costs.model,
                fix="record and measure runs of the same model and size",
            )


def _trace(name: str, tensors: Mapping[str, Tensor]) -> Trace:
    """The trace whose Gram matrix has this name in a file."""
    _, run, context = name.split("/", 2)
    return Trace(int(run), context, tensors[name], tensors[f"reused/{run}/{context}"])


def _growth(rows: Tensor, steps: int) -> list[Growth]:
    """What was probed, out of a file.

    Raises:
        ValueError: it is something else.
    """
    if rows.dtype != torch.float64 or rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"probes of {rows.dtype} and shape {list(rows.shape)}")
    pairs = rows.tolist()
    if any(step not in range(steps) or not 0 < factor < float("inf") for step, factor in pairs):
        raise ValueError(f"probes {pairs}")
    return [Growth(int(step), factor) for step, factor in pairs]


class Goal:
    """What a user asks of "auto".

    Args:
        recording: or its file, if one is given.
        budget, speedup, max_error, max_cache_bytes: see `Recording.policy`.
        timing: what was timed, or its file, if anything was.
    """

    def __init__(
        self,
        recording: Recording | str | Path | None,
        budget: float | None,
        speedup: float | None,
        max_error: float | None,
        max_cache_bytes: int | str | None,
        timing: Timing | str | Path | None,
    ) -> None:
        self._goals = {"budget": budget, "speedup": speedup, "max_error": max_error}
        self._max_cache_bytes = max_cache_bytes
        self._recording = Recording.load(recording) if isinstance(recording, str | Path) else recording
        self.timing = Timing.load(timing) if isinstance(timing, str | Path) else timing

    @property
    def policy(self) -> Policy:
        """The best policy that was found.

        Raises:
            InvalidSetting: there is no recording, not one goal, or one that cannot be reached.
            InvalidTiming: another model, or another size, was timed than recorded.
        """
        if self._recording is None:
            raise InvalidSetting(
                "policy 'auto' needs a recording",
                where="dicompile.optimize",
                why="what can be left out follows from how the values of this model move",
                fix="with dicompile.calibrate(pipe) as recording: pipe(...); then optimize(pipe, 'auto', "
                "recording=recording, speedup=3)",
            )
        return self._recording.policy(max_cache_bytes=self._max_cache_bytes, timing=self.timing, **self._goals)

    def unused(self, policy: Policy) -> Policy:
        """Another policy, beside which nothing of "auto" may be given.

        Raises:
            InvalidSetting: something is.
        """
        given = [name for name, value in {"recording": self._recording, **self._goals}.items() if value is not None]
        if given:
            raise InvalidSetting(
                f"{', '.join(given)} is given, but the policy is {policy.name!r}",
                where="dicompile.optimize",
                fix="policy='auto', or leave it out",
            )
        return policy

    def timing_of(self, component: str) -> Timing | None:
        """What was timed of a denoiser; the empty name is a model by itself.

        Raises:
            InvalidTiming: others were timed.
        """
        return None if self.timing is None else self.timing.of(component)

    def check_components(self, names: Sequence[str]) -> None:
        """Raise if the recording is of a single denoiser, and a pipeline has several.

        Raises:
            InvalidRecording: it is.
        """
        if self._recording is not None and not self._recording.facts.stints and len(names) > 1:
            raise InvalidRecording(
                f"the recording is of one denoiser, and {' and '.join(names)} are to be optimized",
                where="dicompile.optimize",
                why="how a run is shared between several is not in it",
                fix=f"calibrate this pipeline, or optimize the one that was recorded: components=[{names[0]!r}]",
            )

    def check_model(self, module: nn.Module, component: str = "") -> None:
        """Raise if the recording, or what was timed, is of another model.

        Args:
            module: the model.
            component: its name in a pipeline.

        Raises:
            InvalidRecording, InvalidTiming: it is.
        """
        made_of = None if self._recording is None else self._recording.facts.model_of(component)
        original = getattr(module, "_orig_mod", module)
        if made_of is not None and made_of != type(original).__name__:
            raise InvalidRecording(
                f"the recording is of {made_of}, the model is {type(original).__name__}",
                where="dicompile.optimize",
                fix="calibrate this model",
            )
        timing = self.timing_of(component)
        if timing is not None:
            timing.check_model(type(original).__name__)
