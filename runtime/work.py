"""One call of compiled code while it runs: what everybody who has a part in it reads and fills."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dicompile.lower import Program
from dicompile.parked import Parked
from dicompile.runtime.contexts import ContextState
from dicompile.runtime.identify import Place
from dicompile.runtime.owner import Owner
from dicompile.runtime.rows import Batch
from dicompile.runtime.session import ModelState, Session
from dicompile.runtime.steps import GatedStep, Step
from dicompile.runtime.storage import Lane, SharedSupply, Supply, lane_for, names_of, needed

if TYPE_CHECKING:
    from dicompile.runtime.execute import Executor


@dataclass
class Work:
    """A call, or some rows of one, while it runs.

    Attributes:
        code: what runs.
        owner: the model.
        session: whose call it is.
        state: what the session remembers of the model.
        place: where the call stands.
        inputs: of the code, its constants among them.
        registers: values by number, the inputs first.
        supply: what brings weights that lie elsewhere; None if all are there.
    """

    code: Executor
    owner: Owner
    session: Session
    state: ModelState
    place: Place
    inputs: Sequence[Any]
    registers: list[Any] = field(default_factory=list)
    supply: Supply | None = None

    @property
    def context(self) -> ContextState | None:
        """Whose slots it reads and writes; None where nothing may be remembered."""
        return self.place.context

    @property
    def batch(self) -> Batch | None:
        """Rows of the whole call, where the policy tells them apart."""
        return self.place.batch

    @property
    def latent(self) -> torch.Tensor | None:
        """Of the whole call, if it has one."""
        return self.place.call.latent

    @property
    def lane(self) -> Lane | None:
        """How slots go to host memory and back; None where they stay."""
        return None if not self.code.offload or self.latent is None else lane_of(self.latent.device)

    @property
    def fetched(self) -> int:
        """Bytes of weights that were brought for it."""
        return 0 if self.supply is None else self.supply.bytes

    def begin(self, step: Step | GatedStep) -> None:
        """Make room for what a step computes."""
        self.registers = self.registers_for(step.program)
        self.supply = _supply_of(self.registers, step)

    def registers_for(self, program: Program) -> list[Any]:
        """What a program begins with: the inputs, and room for what it computes."""
        return [*self.inputs, *[None] * (program.registers - len(self.inputs))]

    def end(self) -> None:
        """Let go of all values: the traceback of an error may hold on to frames that know this call."""
        self.registers.clear()


@functools.cache
def lane_of(device: torch.device) -> Lane | None:
    """How slots go from a device to host memory and back; None where they stay."""
    return lane_for(device)


def _supply_of(registers: Sequence[Any], step: Step | GatedStep) -> Supply | None:
    """What brings the weights among the inputs of a call that lie elsewhere; None if all are there."""
    if Parked not in map(type, registers):  # of thousands, at every call
        return None
    home = next(value.home for value in registers if isinstance(value, Parked))
    if home.sharding is None:
        return Supply(lane_of(home.device))
    assert isinstance(step, Step)  # no gate decides where weights are gathered
    kinds = " ".join(planned.kind for planned in step.plan.steps)
    reads = (names_of([registers[i] for i in call]) for call in needed(step.program, registers))
    told = f"this rank: step {step.index + 1} of {len(step.plan.steps)} of policy {step.plan.policy}"
    return SharedSupply(home.sharding, "\n".join([kinds, *reads]), told)
