"""What two processes of a gloo group do with compiled code, each case by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

import dicompile
from dicompile import FORA, Policy
from dicompile.lower import inductor
from tests.parallel.ranks import LOCAL, STEPS, cached, counted, do, split
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
    with mock.patch.dict(os.environ):
        if rank == 1:
            dicompile.reset()
            os.environ.update({"DICOMPILE_CACHE_DIR": "off", "TORCHINDUCTOR_CACHE_DIR": os.environ["EMPTY_FOLDER"]})
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


AGAIN = ["flux", "wan"]
"""Pipelines that other processes run after these."""
CASES: dict[str, Callable[[int], Any]] = {
    **{f"{name}, {policy}": of_tokens(name, POLICIES[policy])
       for name in ("flux", "wan", "qwen image") for policy in POLICIES},
    "prepared": prepared,
    "cold": after_a_cold_rank,
}  # fmt: skip


def work(rank: int, folder: str, names: Sequence[str]) -> None:
    """Run cases on one rank; the folders of compiled code are those of the tests, and shared by the ranks."""
    os.environ["EMPTY_FOLDER"] = str(Path(folder) / f"cache of rank {rank}")
    do(rank, folder, {name: CASES[name] for name in names})


def work_again(rank: int, folder: str, names: Sequence[str]) -> None:
    """The same in a process that finds what others have left, and how often Inductor was asked for code."""
    do(rank, folder, {name: lambda _, name=name: compilations(compiled(name, FORA(interval=2))) for name in names})
