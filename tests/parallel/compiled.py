"""What two processes of a gloo group do with compiled code, each case by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from torch import Tensor

import dicompile
from dicompile import FORA, Policy
from dicompile.lower import inductor
from tests.parallel.ranks import LOCAL, STEPS, cached, counted, split
from tests.pipelines.pipes import PIPELINES, Sampler

POLICIES = {"fora": FORA(interval=2), "toca": LOCAL}


def compiled(name: str, policy: Policy, **options: Any) -> Sampler:
    sampler = split(PIPELINES[name]())
    dicompile.optimize(sampler.pipe, policy, **options)
    return sampler


def compilations(sampler: Sampler) -> tuple[Tensor, int]:
    """Latents of a run, and how often Inductor was asked for code meanwhile."""
    with mock.patch.object(inductor, "_compiled", wraps=inductor._compiled) as asked:
        return sampler(STEPS), asked.call_count


def of_tokens(name: str, policy: Policy) -> Callable[[int], Any]:
    """Operator by operator, and compiled; the second runs capture nothing that would count."""

    def case(_: int) -> Any:
        sampler = cached(split(PIPELINES[name]()), policy)
        sampler(STEPS)
        wanted, exchanged = counted(sampler)
        sampler = compiled(name, policy)
        first = sampler(STEPS)
        again, counts = counted(sampler)
        return first, again, counts, wanted, exchanged

    return case


def after_a_cold_rank(rank: int) -> Any:
    """Rank 0 has all code in memory; rank 1 has forgotten its own, finds none in a folder, and is awaited."""
    sampler = compiled("flux", FORA(interval=2))
    wanted = sampler(STEPS)
    with mock.patch.dict(os.environ), TemporaryDirectory() as empty:
        if rank == 1:
            dicompile.reset()
            os.environ.update({"DICOMPILE_CACHE_DIR": "off", "TORCHINDUCTOR_CACHE_DIR": empty})
        return wanted, *compilations(compiled("flux", FORA(interval=2)))


def prepared(_: int) -> Any:
    """One step of a run, then everything ahead: the next run compiles nothing."""
    sampler = compiled("flux", FORA(interval=2))

    def leave(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    sampler(STEPS, callback_on_step_end=leave)
    dicompile.prepare(sampler.pipe)
    return compilations(sampler)


def again(name: str) -> Callable[[int], Any]:
    """In a process that finds what others have left, how often Inductor is asked for code."""
    return lambda _: compilations(compiled(name, FORA(interval=2)))


AGAIN = ["flux", "wan"]
"""Pipelines that other processes run after these."""
CASES: dict[str, Callable[[int], Any]] = {
    **{f"{name}, {policy}": of_tokens(name, POLICIES[policy])
       for name in ("flux", "wan", "qwen image") for policy in POLICIES},
    "prepared": prepared,
    "cold": after_a_cold_rank,
    **{f"{name} again": again(name) for name in AGAIN},
}  # fmt: skip
