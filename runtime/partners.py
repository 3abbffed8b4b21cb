"""Which of the calls at the step before does this call continue?

Guidance partners are called at the same steps, in contexts with names or without. A name tells, as long as it was used
once. Without one, the order of the calls could tell, but only where every step has the same calls: guidance may begin
or end in the middle of a run, and a run may have been left between two partners. So a call continues the one that had
the same conditioning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Given:
    """An input as a call got it.

    Attributes:
        tensor: the input itself, not a copy; as long as it is held, nothing else is written where it lies.
        version: counts the writes to it.
    """

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Given:
        """An input of the call that is being made."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def is_same(self, other: Given) -> bool:
        """True if both were equal in every bit; waits for the device only if they lie at different places."""
        first, second = self.tensor, other.tensor
        if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
            return False
        if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
            return self.version == other.version
        return Given.of(first).version == self.version and bool(torch.equal(first, second))


Conditioning = Mapping[int, Given]
"""By position among the model's inputs."""


@dataclass
class Partners:
    """What a generation has learnt about its conditioning.

    An input that, for all calls of a step, differed from all calls of the step before says nothing about partners (a
    second timestep, a control signal), and is not compared from then on.

    Attributes:
        varying: positions of such inputs.
        unmet: positions of inputs for which no call of this step had an equal one; None before a call asked.
    """

    varying: set[int] = field(default_factory=set)
    unmet: set[int] | None = None

    def next_step(self) -> None:
        """A new step begins."""
        self.varying |= self.unmet or set()
        self.unmet = None

    def continued(self, given: Conditioning, before: Iterable[tuple[str, Conditioning]]) -> str | None:
        """Label of the context that a call continues; None if it continues none.

        Args:
            given: its conditioning.
            before: label and conditioning of the calls that it may continue.
        """
        before = list(before)
        if not before:
            return None
        asked = given.keys() - self.varying
        self.unmet = set(asked) if self.unmet is None else self.unmet
        found = None
        for label, old in before:
            equal = {position for position in asked if position in old and old[position].is_same(given[position])}
            self.unmet -= equal
            found = label if found is None and equal == asked else found
        return found


def new_label(name: str, taken: Iterable[str]) -> str:
    """The name of a context, or with a number where one of that name is there."""
    taken = set(taken)
    free = (name if not number else f"{name}#{number}" for number in range(len(taken) + 1))
    return next(label for label in free if label not in taken)
