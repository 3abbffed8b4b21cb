"""A contestant: a model made ready to run in one of many ways, and what each of its steps is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import dicompile
from dicompile.bench.workload import Workload
from dicompile.errors import CacheTooLarge, DicompileError, PolicyDoesNotFit
from dicompile.plan import Plan
from dicompile.policies import get_policy

EAGER, COMPILED, BLOCKS, FEWER = "eager", "torch.compile", "compile-blocks", "fewer-steps"
AGAINST = (EAGER, COMPILED, BLOCKS, FEWER)
"""Opponents by default; the others are named by `dicompile.bench.rivals.RIVALS`."""
POLICIES = ("none", "fora", "toca")
"""Policies by default."""


class DoesNotFit(Exception):
    """A contestant cannot run a model, or saves nothing there; the table says so."""


@dataclass
class Contestant:
    """A model made ready to run; compiled by its first generation.

    Attributes:
        name: in the table.
        model: called like the module.
        steps: calls of a generation.
        setting: what was chosen for it, where something had to be.
        flops: operations of every step as counted, for caches that decide while they run.
        restart: called before every generation.
        context: open around every generation.
    """

    name: str
    model: Callable[..., Any]
    steps: int
    setting: str = ""
    flops: tuple[int, ...] = ()
    restart: Callable[[], object] = lambda: None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)

    @property
    def plan(self) -> Plan | None:
        """What dicompile does at every step; known after a generation."""
        return dicompile.plan_of(self.model) if isinstance(self.model, dicompile.CachedModel) else None

    @property
    def kinds(self) -> list[str]:
        """Kind of every step: dicompile's, or the share of the operations that a step takes."""
        if self.plan is not None:
            return [step.kind for step in self.plan.steps]
        return [_share(flops / max(self.flops)) for flops in self.flops] or ["full"] * self.steps

    def flop_speedup(self, steps: int) -> float:
        """Operations of a plain generation over those of this one."""
        if self.plan is not None:
            return self.plan.flop_speedup
        return len(self.flops) * max(self.flops) / sum(self.flops) if self.flops else steps / self.steps

    def run(self, workload: Workload) -> list[float]:
        """Seconds of every step of a generation."""
        self.restart()
        with self.context():
            return list(workload.calls(self.model, self.steps))


def prepare_policy(policy: str, workload: Workload, backend: str = "inductor") -> Contestant:
    """Our own contestant, with a policy: a name, or a file.

    Raises:
        UnknownPolicy: there is none.
    """
    chosen = get_policy(policy)
    model = dicompile.optimize(workload.copy(), chosen, schedule=workload.schedule(workload.steps), backend=backend)
    return Contestant(f"dicompile {policy}", model, workload.steps)


def warm_up(contestant: Contestant, workload: Workload) -> None:
    """Run a generation, which compiles everything.

    Raises:
        DoesNotFit: the policy asks for what this model cannot do, or the library of an opponent fails.
    """
    try:
        contestant.run(workload)
    except (PolicyDoesNotFit, CacheTooLarge) as error:
        raise DoesNotFit(error.why or error.what) from error
    except DicompileError:
        raise
    except Exception as error:
        if isinstance(contestant.model, dicompile.CachedModel):
            raise
        raise DoesNotFit(said(error)) from error


def fewer_steps(compiled: Contestant, flop_speedups: Sequence[float]) -> list[Contestant]:
    """The uncached model with as many steps as cost what others cost; numbers at least two apart.

    Args:
        compiled: the uncached model.
        flop_speedups: of the others.
    """
    return [
        Contestant(f"{count} steps", compiled.model, count)
        for count in steps_of_equal_work(compiled.steps, flop_speedups)
    ]


def steps_of_equal_work(steps: int, flop_speedups: Sequence[float]) -> list[int]:
    """Numbers of steps that cost what others cost, from many to few; at least two apart, without the full number.

    Args:
        steps: of the uncached run.
        flop_speedups: operations of the uncached run over those of the others.
    """
    nearest = {max(1, round(steps / speedup)) for speedup in flop_speedups}
    counts: list[int] = []
    for count in sorted(nearest - {steps}, reverse=True):
        if not counts or counts[-1] - count >= 2:
            counts.append(count)
    return counts


def _share(share: float) -> str:
    return "full" if share > 0.995 else f"{share:.0%}"


def said(error: Exception) -> str:
    """What a library has to say, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
