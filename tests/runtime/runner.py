"""A captured plain DiT that runs operator by operator, one call at a time, with the real executor."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dicompile.capture import Role
from dicompile.compiler import Programs
from dicompile.plan import Plan
from dicompile.runtime import Executor, Graphs, Owner, SchedulerLink, Signature, StepSource, current_session
from dicompile.runtime.contexts import ContextState
from dicompile.runtime.graphs import Recorder
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
    """The latent of a step, a bit further on than that of the one before; other seeds are other trajectories."""
    first, other = (
        torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1000 * seed + draw)) for draw in (999, step)
    )
    return first + 0.2 * other


def uncached(timestep: float, x: Tensor, labels: Tensor = LABELS) -> Tensor:
    """What the model itself returns."""
    with torch.no_grad():
        return model().sample.model(x, torch.full((len(x),), timestep), labels)


def signature() -> Signature:
    """What the inputs of the captured plain DiT are."""
    inputs, position = model().capture.inputs, model().capture.input_position
    conditioning = tuple((item.name, i) for i, item in enumerate(inputs) if item.role is Role.CONDITIONING)
    return Signature(position(Role.TIMESTEP), position(Role.LATENT), conditioning, geometry="plain DiT")


class Runner:
    """An executor with everything that belongs to a call.

    Args:
        policy: name of a policy, or programs of another plan.
        schedule: where the steps come from.
        seed: of random scores.
        offload: whether slots go to host memory.
        recorder: records steps, or None.
        changes: of the signature.

    Attributes:
        others: tensors in the place of parameters of the model, by name.
    """

    def __init__(
        self, policy: str | StepSource = "toca", schedule: Any = SCHEDULE, seed: int = 0, *, offload: bool = False,
        recorder: Recorder | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        current_session().keep_chosen = True
        self.source = programs(policy) if isinstance(policy, str) else policy
        self.link = SchedulerLink(schedule)
        self.owner = Owner(self.link)
        self.signature = replace(signature(), **changes)
        given = [i for i, item in enumerate(model().capture.inputs) if item.role.is_given]
        own = [i for i, item in enumerate(model().capture.inputs) if not item.role.is_given]
        graphs = None if recorder is None else functools.partial(Graphs, recorder, given, own)
        self.others: dict[str, Tensor] = {}
        self.executor = Executor(
            self.source, self.signature, seed=seed, offload=offload, check=True, graphs=graphs
        )  # fmt: skip

    def __call__(self, timestep: float | Tensor, x: Tensor, labels: Tensor = LABELS) -> Tensor:
        """One call of the model, as front ends make it: without gradients."""
        time = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), timestep)
        arguments = model().arguments(x=x, t=time.expand(len(x)), y=labels, **self.others)
        with torch.no_grad():
            output: Tensor = self.executor.run(self.owner, arguments)[0]
        return output

    def run(self, seed: int = 0, steps: Iterable[int] = range(STEPS), labels: Tensor = LABELS) -> list[Tensor]:
        """Some steps of a run, with latents that do not depend on what the model returned."""
        times: Sequence[float] = self.link.schedule.timesteps
        return [self(times[step], latent(step, seed), labels) for step in steps]

    @property
    def state(self) -> ModelState:
        """What the current session remembers."""
        return current_session().state_of(self.owner)

    @property
    def context(self) -> ContextState:
        """The only context of the run."""
        (context,) = self.state.contexts.values()
        return context

    @property
    def plan(self) -> Plan:
        """The plan for the schedule as it is now."""
        return self.plan_from(0)

    def plan_from(self, step: int) -> Plan:
        """The plan of a context that begins at a step."""
        return self.source.plan(self.link.schedule.rest(step))

    def kinds_from(self, step: int, end: int | None = None) -> Counter[str]:
        """Kinds of the calls of a context that begins at a step, up to another one."""
        return Counter(planned.kind for planned in self.plan_from(step).steps[: None if end is None else end - step])


def held(context: ContextState) -> list[Tensor]:
    """Tensors of all slots that hold something."""
    return [tensor for tensor in context.store if tensor is not None]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """True if two runs agree in every bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
