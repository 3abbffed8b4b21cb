"""Contestants take turns: one generation each, again and again, so that a machine that drifts drifts for all."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import dicompile
from dicompile.bench.contestants import (
    COMPILED,
    FEWER,
    Contestant,
    DoesNotFit,
    fewer_steps,
    prepare_policy,
    warm_up,
)
from dicompile.bench.models import Subject
from dicompile.bench.results import Cost, Memory, Result, Row, by_kind, generation
from dicompile.bench.rivals import prepare
from dicompile.bench.workload import Workload

Tick = Callable[[str], object]
"""Called with what comes next."""
Costs = dict[str, tuple[Cost, Cost]]
"""Cold and warm cost of compiling, by contestant."""


@dataclass(frozen=True)
class Options:
    """What all models are measured with.

    Attributes:
        policies: of dicompile, names or files.
        against: opponents.
        steps: calls of a generation.
        rounds: turns of every contestant.
        device: "cpu" or "cuda".
        dtype: of weights and latents.
        size: "full", "reduced" or "quick".
        backend: "inductor", or "eager" to compile nothing.
    """

    policies: tuple[str, ...]
    against: tuple[str, ...]
    steps: int
    rounds: int
    device: str
    dtype: torch.dtype
    size: str
    backend: str = "inductor"


def measure(subject: Subject, options: Options, costs: Costs, tick: Tick) -> Result:
    """Time every contestant on one model.

    Args:
        subject: the model.
        options: how.
        costs: of compiling, measured before.
        tick: called before every warm-up and every turn.
    """
    forget()
    size = subject.size(options.size)
    workload = Workload.of(subject, size, options.steps, options.device, options.dtype)
    contestants, refused = ready(workload, options, tick)
    rounds: list[list[list[float]]] = [[] for _ in contestants]
    for number in range(options.rounds):
        for contestant, found in zip(contestants, rounds, strict=True):
            tick(f"{subject.name}: {contestant.name}, round {number + 1}")
            found.append(contestant.run(workload))
    kinds = [by_kind(c.kinds, found) for c, found in zip(contestants, rounds, strict=True)]
    baseline = next((i for i, c in enumerate(contestants) if c.name == COMPILED), 0)
    rows = []
    for contestant, measured in zip(contestants, kinds, strict=True):
        speedup = generation(kinds[baseline]) / generation(measured)
        flops, memory = contestant.flop_speedup(options.steps), memory_of(contestant, workload)
        cold, warm = costs.get(contestant.name, (None, None))
        rows.append(Row(contestant.name, measured, flops, speedup, memory, cold, warm, contestant.setting))
    return Result(subject.title, subject.describe(size), contestants[baseline].name, tuple(rows), tuple(refused))


def ready(workload: Workload, options: Options, tick: Tick) -> tuple[list[Contestant], list[tuple[str, str]]]:
    """All contestants, warm, and those that do not fit, with the reason."""
    contestants: list[Contestant] = []
    refused: list[tuple[str, str]] = []

    def add(name: str, make: Callable[[], Contestant]) -> None:
        tick(f"{workload.subject.name}: {name}, first generation")
        try:
            contestant = make()
            warm_up(contestant, workload)
            contestants.append(contestant)
        except DoesNotFit as reason:
            refused.append((name, str(reason)))

    for name in options.against:
        if name != FEWER:
            add(name, functools.partial(prepare, name, workload, options.backend))
    for policy in options.policies:
        add(f"dicompile {policy}", functools.partial(prepare_policy, policy, workload, options.backend))
    if FEWER in options.against:
        contestants += _with_fewer_steps(contestants, refused)
    return contestants, refused


def _with_fewer_steps(contestants: Sequence[Contestant], refused: list[tuple[str, str]]) -> list[Contestant]:
    compiled = next((one for one in contestants if one.name == COMPILED), None)
    if compiled is None:
        refused.append((FEWER, f"needs {COMPILED}, which did not run"))
        return []
    return fewer_steps(compiled, [one.flop_speedup(compiled.steps) for one in contestants])


def forget() -> None:
    """Drop what was compiled for an earlier model, and its weights."""
    torch.compiler.reset()
    dicompile.reset()
    gc.collect()
    torch.cuda.empty_cache()


def memory_of(contestant: Contestant, workload: Workload) -> Memory:
    """What one more generation needs."""
    peak = None
    if workload.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workload.device)
        before = torch.cuda.memory_allocated(workload.device)
        contestant.run(workload)
        peak = torch.cuda.max_memory_allocated(workload.device) - before
    if contestant.plan is None:
        return Memory(peak=peak)
    report = dicompile.report(contestant.model)
    return Memory(contestant.plan.cache_bytes, report.peak_cache_bytes, report.hoisted_bytes, peak)
