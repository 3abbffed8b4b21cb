"""How little has to go wrong for how much compute, or time: what `auto` chooses from.

For every number of full steps the best ones are searched (`dicompile.learn.search`) and the error of the last latent is
predicted: from a step's forecast to the model's output by its sensitivity, from there to the latent by how far the
sampler moves at that step, and from there to the last one by how errors of that step have grown where they were probed
(`dicompile.learn.probe`); else they count as if they stayed what they are.

Where several denoisers take over from each other, none knows what another has stored. So each has its own best steps
for every number of them, what is wrong in the end adds up, and so do costs: every split of the full steps is tried.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dicompile.errors import InvalidSetting
from dicompile.html import fragment
from dicompile.html import table as html_table
from dicompile.learn.search import (
    RIDGE,
    RIDGES,
    Array,
    Choice,
    choose_steps,
    fit,
    histories,
    joined,
    sensitivity,
    squared_error,
    step_errors,
)
from dicompile.learn.trace import EXTRAS, Facts, Growth, Trace, pooled
from dicompile.plan import FULL, MOST_STORED, Cadence, Fitted, Level, Origin, Policy, Rule, Timing, WhatName, kind_name
from dicompile.text import plain_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOUBT = {"site": 1.0, "stack": 2.0}
"""Factors of expected errors.

In two trained models (docs/benchmarks.md) forecasts of the stack were 0.9 to 2.2 times as wrong as steps by themselves
tell, those of branches 0.8 to 1.5 times: an update is added to the stream of another latent.
"""
HEADINGS = ("full steps", "compute", "time", "speedup", "forecast", "cache", "expected error", "fewer steps, uncached")
"""Of the columns of the frontier as a table; the time is left out where none was measured."""
COUNTED = "operations are counted; dicompile.measure(pipe) times steps on your machine"
"""What costs are where nothing was timed."""
UNPROBED = "early errors may grow until the end: dicompile.probe(pipe, run, recording) finds out, for better plans"
"""What is said of expected errors where nothing was probed."""
LITTLE = 0.85
"""Share of the cost from which on caching is of no use, whatever it costs in quality."""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan that could be chosen.

    Attributes:
        level: forecast are single branches, which are gated anew, or the whole stack.
        full: numbers of the steps that compute everything.
        compute: operations of the run over those without caching.
        time: of the run in the denoiser, over that without caching; None where nothing was timed.
        seconds: of the same, for one guidance context.
        error: relative L2 error that is expected of the last latent.
        cache_bytes: what one guidance context holds at most.
        stored: values that a forecast takes at most.
        fewer_steps: error that is expected of fewer steps without caching, for the same cost or a little more.
        split: how many of the full steps every denoiser has.
    """

    level: Level
    full: tuple[int, ...]
    compute: float
    error: float
    cache_bytes: int
    stored: int
    fewer_steps: float
    split: tuple[int, ...]
    time: float | None = None
    seconds: float | None = None

    @property
    def counts(self) -> str:
        """The number of full steps in words: that of every denoiser, where there are several."""
        return f"{len(self.full)}" + (f" ({' + '.join(map(str, self.split))})" if len(self.split) > 1 else "")

    @property
    def cost(self) -> float:
        """Time where it was measured, and else compute."""
        return self.compute if self.time is None else self.time

    def __str__(self) -> str:
        how = "branch by branch" if self.level == "site" else "as a whole stack"
        return (
            f"{self.counts} full steps, the others forecast {how}: {self.compute:.1%} of the compute, "
            + ("" if self.time is None else f"{self.time:.1%} of the time ({self.seconds:.2f} s), ")
            + f"expected error {self.error:.2g}, cache {size_text(self.cache_bytes)}"
        )


class Frontier:
    """The plans of which none is better in both cost and error, by falling cost.

    Args:
        facts: of the recording.
        traces: at least one.
        max_bytes: of one guidance context; None for no limit.
        timing: what was timed; None if operations are the cost.
        growth: what was probed; nothing if errors count as if they stayed what they are.
    """

    def __init__(
        self,
        facts: Facts,
        traces: Sequence[Trace],
        max_bytes: int | None = None,
        timing: Timing | None = None,
        growth: Sequence[Growth] = (),
    ) -> None:
        self.facts, self.traces, self.max_bytes, self.timing, self.growth = facts, traces, max_bytes, timing, growth
        self._output, self._latent = (facts.values.index(name) for name in EXTRAS)
        self._shares = facts.shares
        self._firsts = tuple(steps.start for steps, _ in facts.shares)

    @functools.cached_property
    def points(self) -> tuple[Point, ...]:
        """From everything computed to one full step.

        Raises:
            InvalidSetting: memory does not hold one value of anything.
        """
        best: list[Point] = []
        for point in sorted(self.candidates(), key=lambda point: (point.cost, point.error)):
            if not best or point.error < best[-1].error:
                best.append(point)
        if not best:
            sizes = {level: size_text(self._bytes(level)) for level in self.facts.levels}
            raise InvalidSetting(
                f"{size_text(self.max_bytes or 0)} do not hold anything that could be forecast",
                where="max_cache_bytes",
                why=", ".join(f"one value of every {level} takes {size}" for level, size in sizes.items()),
                fix="allow more, or sample in fewer steps",
            )
        return tuple(reversed(best))

    def candidates(self) -> Iterator[Point]:
        """For both levels the best plan of every number of full steps, as far as memory allows it."""
        for level in self.facts.levels:
            held = self._bytes(level)
            if self.max_bytes is None or held <= self.max_bytes:
                yield from self._candidates(level)

    def _candidates(self, level: Level) -> Iterator[Point]:
        steps, size = self.facts.steps, self._bytes(level)
        for choices in itertools.product(*self._choices(level)):
            choice, split = joined(choices, self._firsts), tuple(len(each.full) for each in choices)
            stored = min(MOST_STORED, max(split))
            if self.max_bytes is not None:
                stored = min(stored, self.max_bytes // max(size, 1))
            compute = self._operations(level, split) / self.facts.full_run
            time, seconds = self._time(level, choice.full, stored)
            cost = compute if time is None else time
            held = [
                min(stored, number) * costs.stored_bytes(level) * (number < len(part))
                for number, (part, costs) in zip(split, self._shares, strict=True)
            ]
            yield Point(
                level=level,
                full=choice.full,
                compute=compute,
                error=DOUBT[level] * choice.error,
                cache_bytes=max(held),
                stored=stored,
                fewer_steps=float(self._fewer_steps[min(math.ceil(cost * steps - 1e-9), steps) - 1]),
                split=split,
                time=time,
                seconds=seconds,
            )

    def _operations(self, level: Level, split: Sequence[int]) -> int:
        """Operations of a run in which every denoiser has so many full steps."""
        return sum(
            number * costs.full_flops + (len(part) - number) * costs.recalled_flops(level)
            for number, (part, costs) in zip(split, self._shares, strict=True)
        )

    def _time(self, level: Level, full: Sequence[int], stored: int) -> tuple[float, float] | tuple[None, None]:
        """Time of a run over that without caching, and in seconds; None where nothing was timed."""
        if self.timing is None:
            return None, None
        recalled = self._histories(full, stored)
        kinds = {step: kind_name(level, len(history)) for step, history in recalled.items()}
        seconds = whole = 0.0
        for component, (part, _) in zip(self.facts.components, self._shares, strict=True):
            timing = self.timing.of(component)
            seconds += sum(timing.seconds(kinds.get(step, FULL)) for step in part)
            whole += len(part) * timing.seconds(FULL)
        return seconds / whole, seconds

    def _histories(self, full: Sequence[int], stored: int) -> dict[int, tuple[int, ...]]:
        """Full steps of the same denoiser, from which every other step is forecast."""
        return histories(full, self.facts.steps, stored - 1, self._firsts)

    def _bytes(self, level: Level) -> int:
        """What remembering one value of everything takes, of the denoiser that needs most."""
        return max(costs.stored_bytes(level) for _, costs in self._shares)

    def point(
        self, *, budget: float | None = None, speedup: float | None = None, max_error: float | None = None
    ) -> Point:
        """The plan for one goal; see `dicompile.learn.recording.Recording.policy`.

        Raises:
            InvalidSetting: not one goal is given, or it cannot be reached.
        """
        goals = {"budget": budget, "speedup": speedup, "max_error": max_error}
        given = {name: value for name, value in goals.items() if value is not None}
        if len(given) != 1 or any(value <= 0 for value in given.values()):
            raise InvalidSetting(
                f"auto needs one goal above 0, and got {given or 'none'}",
                where="auto",
                fix="give budget=0.34 (share of the compute), speedup=3, or max_error=0.02",
            )
        if max_error is not None:
            return min((p for p in self.points if p.error <= max_error), key=lambda point: point.cost)
        share = 1 / speedup if speedup is not None else budget or 1.0
        within = [point for point in self.points if point.cost <= share + 1e-9]
        if not within:
            least = self.points[-1]
            raise InvalidSetting(
                f"{share:.1%} of the {self._what} are not enough",
                where="auto",
                why=f"one full step of {self.facts.steps} and forecasts take {least.cost:.1%}",
                fix="sample in fewer steps, or ask for less",
            )
        return min(within, key=lambda point: point.error)

    def policy(self, point: Point) -> Policy:
        """The plan as a policy: explicit full steps, and weights for every branch or span.

        Args:
            point: one of the frontier's.
        """
        rules = (self._rule(point.level, point.full, point.stored),) if len(point.full) < self.facts.steps else ()
        return Policy(
            name=f"auto-{len(point.full)}", cadence=Cadence(at=point.full), rules=rules, stints=self.facts.stints
        )

    def fitted(self, cadence: Cadence, order: int, level: Level) -> Policy:
        """A policy for full steps that somebody else has chosen; see `dicompile.learn.recording.Recording.fitted`."""
        runs = [cadence.moments(self.facts.steps, part.start)[: len(part)] for part, _ in self._shares]
        full = tuple(moment.step for moment in itertools.chain(*runs) if moment.others)
        rule = self._rule(level, full, order + 1)
        return Policy(
            name=f"fitted-{cadence.interval}-{order}", cadence=cadence, rules=(rule,), stints=self.facts.stints
        )

    def _rule(self, level: Level, full: Sequence[int], stored: int) -> Rule:
        facts = self.facts
        origin = Origin(
            file=f"the calibration of {facts.model}",
            sites=facts.sites if level == "site" else facts.spans,
            timesteps=facts.timesteps,
        )
        what: WhatName = "core" if level == "site" else "update"
        recall = Fitted(weights=self._weights(level, full, stored), what=what, origin=origin)
        return Rule(sites=() if level == "site" else ("stack",), do=recall)

    @property
    def verdict(self) -> str:
        """One line about whether caching is expected to gain anything."""
        useful = [point for point in self.points if point.cost <= LITTLE]
        better = [point for point in useful if point.error < point.fewer_steps]
        if not better:
            return "no gain expected: fewer steps are better here" if useful else "no gain expected: there is no plan"
        least, most = better[-1].cost, better[0].cost
        return f"better than fewer steps between {least:.0%} and {most:.0%} of the {self._what}"

    @property
    def clock(self) -> str:
        """What costs are, in words."""
        return COUNTED if self.timing is None else self.timing.clock

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of it, in lines: the verdict, what costs are, and what is not known."""
        return (self.verdict, self.clock, *(() if self.growth else (UNPROBED,)))

    @property
    def _what(self) -> str:
        return "compute" if self.timing is None else "time"

    @property
    def _headings(self) -> tuple[str, ...]:
        return tuple(heading for heading in HEADINGS if heading != "time" or self.timing is not None)

    def _cells(self, rows: int) -> list[tuple[str, ...]]:
        """The frontier at about as many costs, as text."""
        wanted = np.linspace(0, len(self.points) - 1, min(rows, len(self.points))).round().astype(int)
        return [
            (
                point.counts,
                f"{point.compute:.1%}",
                *([] if point.time is None else [f"{point.time:.1%}"]),
                f"{1 / point.cost:.2f}x",
                "branches" if point.level == "site" else "stack",
                size_text(point.cache_bytes),
                f"{point.error:.2g}",
                f"{point.fewer_steps:.2g}",
            )
            for point in (self.points[number] for number in wanted)
        ]

    @property
    def _title(self) -> str:
        served = f": {', '.join(map(str, self.facts.stints))}" if self.facts.stints else ""
        return f"{self.facts.model}, {self.facts.steps} steps{served}"

    def table(self, rows: int = 12) -> Table:
        """The frontier for the terminal, at about as many costs."""
        table = Table(title=self._title, caption="\n".join(self.notes), box=SIMPLE_HEAD)
        for heading in self._headings:
            table.add_column(heading, justify="right")
        for cells in self._cells(rows):
            table.add_row(*cells)
        return table

    def _repr_html_(self) -> str:
        """The frontier in a notebook."""
        return fragment(
            f"<p>{escape(self._title)}</p>",
            html_table(self._headings, self._cells(12), numbers=len(self._headings)),
            *(f"<p>{escape(note)}</p>" for note in self.notes),
        )

    def plot(self) -> Figure:
        """Expected error against cost, of these plans and of fewer steps; needs matplotlib (extra "demo")."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        drawn = [point for point in self.points if point.error and point.fewer_steps]
        costs = [point.cost for point in drawn]
        axes.plot(costs, [point.error for point in drawn], marker=".", label="auto")
        axes.plot(costs, [point.fewer_steps for point in drawn], marker=".", label="fewer steps")
        axes.set(xlabel=self._what, ylabel="expected relative error", yscale="log", title=self.verdict)
        axes.legend()
        return figure

    def __str__(self) -> str:
        return plain_text(self.table(), width=110)

    @functools.cached_property
    def _reach(self) -> Array:
        """What a relative error of 1 in the model's output at a step is in the last latent, relative to it; [steps]."""
        reach: Array = self._moves * self._growth
        return reach

    @functools.cached_property
    def _growth(self) -> Array:
        """By which factor an error in the latent after each step ends; [steps]. Between probes its logarithm is linear.

        What the last two steps do is the last thing that happens to the last latent that is seen: it does not grow.
        """
        steps, ends = self.facts.steps, (max(self.facts.steps - 2, 0), self.facts.steps - 1)
        logs: dict[int, list[float]] = {step: [0.0] for step in ends} if self.growth else {0: [0.0]}
        for each in self.growth:
            logs.setdefault(each.step, []).append(math.log(each.factor))
        known = sorted(logs)
        factors: Array = np.exp(np.interp(np.arange(steps), known, [float(np.mean(logs[step])) for step in known]))
        return factors

    @functools.cached_property
    def _moves(self) -> Array:
        """How far the latent moves at every step, relative to its norm at the end; [steps]."""
        grams = np.stack([trace.gram[self._latent].numpy() for trace in self.traces])
        size = np.diagonal(grams, axis1=1, axis2=2)
        following = np.diagonal(grams, offset=1, axis1=1, axis2=2)
        squared = np.maximum(size[:, 1:] + size[:, :-1] - 2 * following, 0.0) / size[:, -1:]
        moves = np.sqrt(squared.mean(0))
        if not len(moves):
            return np.ones(1)
        last = moves[-1]  # where the last step leads, no call of the model sees
        if self.facts.sigmas:
            before, at = np.abs(np.diff(self.facts.sigmas))[-2:]
            last *= at / before if before else 1.0
        return np.append(moves, last)

    @functools.cached_property
    def grams(self) -> dict[Level, Array]:
        """Inner products of what can be forecast, [values, steps, steps], pooled over the traces."""
        return {level: _pooled(self.traces, self._values(level)) for level in self.facts.levels}

    def _values(self, level: Level) -> range:
        """Numbers of the values that are forecast."""
        sites, spans = len(self.facts.sites), len(self.facts.spans)
        return range(sites) if level == "site" else range(sites, sites + spans)

    @functools.cached_property
    def output_gram(self) -> Array:
        """Inner products of what the model returns, [steps, steps], pooled over the traces."""
        gram: Array = _pooled(self.traces, [self._output])[0]
        return gram

    def effect(self, level: Level) -> Array:
        """What a relative error of 1 in all values at a step does to the last latent, relative to it; [steps]."""
        number = self.facts.levels.index(level)
        reused = np.sqrt(np.mean([trace.reused[number].square().numpy() for trace in self.traces], axis=0))
        arrives = [sensitivity(gram, reused[part.start : part.stop]) for part, gram in self._grams_by_part(level)]
        effect: Array = self._reach * np.concatenate(arrives)
        return effect

    def _grams_by_part(self, level: Level) -> list[tuple[range, Array]]:
        """Inner products of what every denoiser has computed itself."""
        parts, gram = [part for part, _ in self._shares], self.grams[level]
        return [(part, gram[:, part.start : part.stop, part.start : part.stop]) for part in parts]

    def _choices(self, level: Level) -> list[tuple[Choice, ...]]:
        """Of every denoiser the best steps of every number, counted from its first one."""
        effect = self.effect(level)
        return [
            choose_steps(step_errors(gram, order=1) * effect[part.start : part.stop])
            for part, gram in self._grams_by_part(level)
        ]

    @functools.cached_property
    def _fewer_steps(self) -> Array:
        """Error expected of 1, 2, ... evenly spaced steps: each goes on with the output of its first one."""
        steps = self.facts.steps
        reuse = np.sqrt(np.maximum(_reuse_errors(self.output_gram), 0.0)) * self._reach
        errors = np.zeros(steps)
        for number in range(1, steps):
            full = [round(k * steps / number) for k in range(number)]
            ends = [*full[1:], steps]
            errors[number - 1] = np.sqrt(sum(reuse[j, j + 1 : k].sum() ** 2 for j, k in zip(full, ends, strict=True)))
        return errors

    def _weights(self, level: Level, full: Sequence[int], stored: int) -> tuple[tuple[tuple[float, ...], ...], ...]:
        histories_of = self._histories(full, stored)
        ridge = self._ridge(level, histories_of)
        rows = {step: fit(self.grams[level], step, history, ridge) for step, history in histories_of.items()}
        return tuple(
            tuple(tuple(float(f"{weight:.7g}") for weight in row) for row in rows[step].tolist())
            if step in rows
            else ()
            for step in range(self.facts.steps)
        )

    def _ridge(self, level: Level, stored: dict[int, tuple[int, ...]]) -> float:
        """The ridge whose weights are best on traces that they were not fitted to."""
        if len(self.traces) < 2:
            return RIDGE
        totals = np.zeros(len(RIDGES))
        for held_out in range(len(self.traces)):
            others = [trace for number, trace in enumerate(self.traces) if number != held_out]
            known = _pooled(others, self._values(level))
            unseen = _pooled([self.traces[held_out]], self._values(level))
            for number, ridge in enumerate(RIDGES):
                for step, history in stored.items():
                    totals[number] += squared_error(unseen, step, history, fit(known, step, history, ridge)).mean()
        return RIDGES[int(np.argmin(totals))]


def _pooled(traces: Sequence[Trace], values: Sequence[int]) -> Array:
    return np.asarray(pooled(traces, values).numpy())


def _reuse_errors(gram: Array) -> Array:
    """Squared relative error of the value at one step in the place of that at another, [stored, wanted]."""
    size = np.diag(gram)
    return (size[:, None] + size[None, :] - 2 * gram) / np.maximum(size[None, :], np.finfo(np.float64).tiny)
