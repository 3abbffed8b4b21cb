"""A captured plain DiT that runs operator by operator, one call at a time, with the real executor."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dicompile.capture import Role
from dicompile.compiler import Programs
from dicompile.plan import Plan
from dicompile.runtime import Executor, ProgramSource, SchedulerLink, current_session
from dicompile.runtime.session import ModelState
from tests.lower.captured import Captured, captured
from tests.models import plain_dit, timesteps

STEPS, LAYERS = 8, 2
SCHEDULE = tuple(timesteps(STEPS))
LABELS = torch.tensor([1, 2, 3, 4])
OTHER_LABELS = torch.tensor([7, 8, 9, 10])


@functools.cache
def programs(policy: str) -> Programs:
    """Programs of the plain DiT under a policy; shared, since they remember nothing of a run."""
    return model().programs(policy)


def model() -> Captured:
    """The plain DiT itself."""
    return captured(plain_dit, LAYERS)


def latent(step: int, seed: int = 0) -> Tensor:
    """The latent of a step; runs with the same seed can be compared step by step."""
    return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1000 * seed + step))


def uncached(timestep: float, x: Tensor, labels: Tensor = LABELS) -> Tensor:
    """What the model itself returns."""
    with torch.no_grad():
        return model().sample.model(x, torch.full((len(x),), timestep), labels)


class Runner:
    """An executor with everything that belongs to a call.

    Args:
        policy: name of a policy, or programs of another plan.
        schedule: where the steps come from.
        seed: of random scores.
    """

    def __init__(self, policy: str | ProgramSource = "toca", schedule: Any = SCHEDULE, seed: int = 0) -> None:
        current_session().keep_chosen = True
        self.source = programs(policy) if isinstance(policy, str) else policy
        self.link = SchedulerLink(schedule)
        position = model().capture.input_position
        conditioning = [i for i, item in enumerate(model().capture.inputs) if item.role is Role.CONDITIONING]
        self.executor = Executor(
            self.source, self.link, position(Role.TIMESTEP), position(Role.LATENT), seed, conditioning=conditioning
        )
        self.executor.check = True

    def __call__(self, timestep: float | Tensor, x: Tensor, labels: Tensor = LABELS) -> Tensor:
        """One call of the model."""
        time = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), timestep)
        output: Tensor = self.executor(*model().arguments(x=x, t=time.expand(len(x)), y=labels))[0]
        return output

    def run(self, seed: int = 0, steps: Iterable[int] = range(STEPS), labels: Tensor = LABELS) -> list[Tensor]:
        """Some steps of a run, with latents that do not depend on what the model returned."""
        times: Sequence[float] = self.link.schedule.timesteps
        return [self(times[step], latent(step, seed), labels) for step in steps]

    @property
    def state(self) -> ModelState:
        """What the current session remembers."""
        return current_session().state_of(self.executor)

    @property
    def plan(self) -> Plan:
        """The plan for the schedule as it is now."""
        return self.source.plan(self.link.schedule)


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """True if two runs agree in every bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
