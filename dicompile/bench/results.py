"""What was measured, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """Steps of one kind.

    Attributes:
        name: "full", "reuse", "partial", ...; of other caches the share of the operations.
        count: steps of this kind in a generation.
        milliseconds: median of one step.
    """

    name: str
    count: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a process from its first call to the end of its first generation.

    Attributes:
        wall: on the clock.
        cpu: of processors, with compilers and workers that it started.
    """

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a generation needs beside weights and inputs.

    Attributes:
        planned: that the plan says the cache holds at most; None without a plan.
        held: that the cache held at most, as the runtime counted.
        hoisted: held of what is computed outside of the steps.
        peak: allocated at most on a GPU, activations included; None on a CPU.
    """

    planned: int | None = None
    held: int | None = None
    hoisted: int | None = None
    peak: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A contestant.

    Attributes:
        name: of the contestant.
        kinds: its kinds of steps.
        flop_speedup: operations of an uncached generation over its own.
        speedup: time of the baseline's generation over its own.
        memory: see `Memory`.
        cold: what it cost with empty caches; None if that was not measured.
        warm: and in the process after.
        setting: what was chosen for it, where something had to be.
    """

    name: str
    kinds: tuple[Kind, ...]
    flop_speedup: float
    speedup: float
    memory: Memory = Memory()
    cold: Cost | None = None
    warm: Cost | None = None
    setting: str = ""

    @property
    def milliseconds(self) -> float:
        """Of a generation, from the medians of its steps."""
        return generation(self.kinds)

    @property
    def arrival(self) -> float:
        """Share of the saved operations that is saved as time: 1 if half of the operations take half of the time."""
        return self.speedup / self.flop_speedup


@dataclass(frozen=True, slots=True)
class Result:
    """A model.

    Attributes:
        model: its title.
        size: what was built.
        baseline: contestant that speedups are relative to.
        rows: contestants, in the order in which they took turns.
        refused: names of those that do not fit, and why.
    """

    model: str
    size: str
    baseline: str
    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CompileRow:
    """What compiling a model cost one contestant.

    Attributes:
        model: name of the model and its depth.
        name: of the contestant.
        cost: with empty caches.
        whole: CPU seconds over those of ``torch.compile`` of the uncached model; None if either was not measured.
        blocks: over those of ``compile_repeated_blocks``.
        most_whole: what `whole` ought to be at most; None for opponents.
        most_blocks: and `blocks`.
    """

    model: str
    name: str
    cost: Cost
    whole: float | None = None
    blocks: float | None = None
    most_whole: float | None = None
    most_blocks: float | None = None


def generation(kinds: Sequence[Kind]) -> float:
    """Milliseconds of a generation."""
    return sum(kind.count * kind.milliseconds for kind in kinds)


def by_kind(kinds: Sequence[str], rounds: Sequence[Sequence[float]]) -> tuple[Kind, ...]:
    """Median time of every kind of step.

    Args:
        kinds: of every step of a generation.
        rounds: seconds of every step, one entry for each generation.
    """
    times: dict[str, list[float]] = {}
    for seconds in rounds:
        for kind, one in zip(kinds, seconds, strict=True):
            times.setdefault(kind, []).append(1e3 * one)
    return tuple(Kind(name, kinds.count(name), statistics.median(found)) for name, found in times.items())


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Medians of several processes."""
    return Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs))


def compile_rows(
    model: str, costs: Mapping[str, Cost], *, whole: str, blocks: str, most_whole: float, most_blocks: float
) -> list[CompileRow]:
    """Costs of all contestants for one model, with ratios of CPU seconds, and targets for those of dicompile.

    Args:
        model: its name and depth.
        costs: by contestant.
        whole: the contestant that compiles the uncached model whole.
        blocks: the one that compiles its repeated blocks.
        most_whole: what a caching contestant may cost at most, relative to `whole`.
        most_blocks: and relative to `blocks`.
    """
    rows = []
    for name, cost in costs.items():
        ratios = [cost.cpu / costs[other].cpu if other in costs else None for other in (whole, blocks)]
        most = (None, None) if name in (whole, blocks) else (most_whole, most_blocks)
        rows.append(CompileRow(model, name, cost, *ratios, *most))
    return rows
