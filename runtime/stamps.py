"""The check that nothing stale is read: every slot carries who wrote it when, and every read is held against the plan.

It is for tests and for debugging (``DICOMPILE_CHECK=1``); without it no stamp is made. Stamps go the way of the
tensors; what they have to say follows from the plan alone, so that a mistake of one shows in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from dicompile.errors import StaleRead
from dicompile.plan import HISTORIC, Slot, StepPlan


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who wrote a slot.

    Attributes:
        generation: number of the generation, which belongs to one session and one model.
        context: label of the guidance context.
        step: at which it was written.
        shape: of the tensor.
        dtype: of the tensor.
        version: counts writes to the tensor.
    """

    generation: int
    context: str
    step: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    version: int

    @classmethod
    def on(cls, tensor: torch.Tensor, generation: int, context: str, step: int) -> Stamp:
        """Stamp of a tensor that is stored now."""
        version = 0 if tensor.is_inference() else tensor._version
        return cls(generation, context, step, tuple(tensor.shape), tensor.dtype, version)


@dataclass
class Stamps:
    """Stamps of the slots of one guidance context, and the step at which the plan says that each was written."""

    found: dict[Slot, Stamp] = field(default_factory=dict)
    planned: dict[Slot, int] = field(default_factory=dict)

    reads = 0
    """Checked so far, by all contexts."""

    def check(
        self, reads: Iterable[Slot], store: Mapping[Slot, torch.Tensor], generation: int, context: str, size: Sizes
    ) -> None:
        """Check what a step is about to read.

        Args:
            reads: slots.
            store: their tensors.
            generation: the current one.
            context: label of the current guidance context.
            size: bytes of every slot, by the plan.

        Raises:
            StaleRead: a slot is not what the plan says.
        """
        for slot in reads:
            Stamps.reads += 1
            stamp, tensor = self.found.get(slot), store[slot]
            step = self.planned.get(slot, -1)
            expected = Stamp.on(tensor, generation, context, step)
            size_now = tensor.numel() * tensor.element_size()
            if stamp != expected or size_now != size[slot]:
                raise StaleRead(
                    f"slot {slot} is not what the plan says",
                    where=f"runtime, context {context!r}",
                    why=f"found {stamp}, {size_now} bytes; expected {expected}, {size[slot]} bytes",
                    fix="report this",
                )

    def advance(
        self,
        contents: Mapping[Slot, Slot | int],
        store: Mapping[Slot, torch.Tensor],
        planned: StepPlan,
        made: tuple[int, str, int],
    ) -> None:
        """Follow a step.

        Args:
            contents: for every slot, which slot had its content before the step; a number if it is new.
            store: tensors after the step.
            planned: what the plan says about the step.
            made: generation, context and step.
        """
        old = self.found
        self.found = {}
        for slot, tensor in store.items():
            source = contents[slot]
            self.found[slot] = Stamp.on(tensor, *made) if isinstance(source, int) else old[source]
        for site in planned.sites:
            for slot in site.writes:
                self._write(slot, site.history, made[2])
        self.planned = {slot: step for slot, step in self.planned.items() if slot in planned.live}

    def _write(self, slot: Slot, history: int, step: int) -> None:
        for age in range(history if slot.kind in HISTORIC else 0, 0, -1):
            moved = self.planned.pop(Slot.of(slot.site, slot.kind, age - 1), None)
            if moved is not None:
                self.planned[Slot.of(slot.site, slot.kind, age)] = moved
        self.planned[slot] = step


Sizes = Mapping[Slot, int]
