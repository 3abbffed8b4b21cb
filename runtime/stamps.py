"""The check that nothing stale is read: every slot carries who wrote it when, and every read is held against the plan.

It is for tests and for debugging (``DICOMPILE_CHECK=1``); without it no stamp is made. What a slot should hold does not
come from the moves that brought it there, but from the rows of the plan: the value of age k that a step weighs was
computed at the k-th step before it that computed anything, and is of the kind that the step reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from dicompile.errors import StaleRead
from dicompile.plan import HISTORIC, Plan, Slot, SlotKind, StepPlan, What

if TYPE_CHECKING:
    Store = Sequence[torch.Tensor | None]


class Stepped(Protocol):
    """What the check has to know of a step; see `dicompile.runtime.steps.Step`."""

    @property
    def plan(self) -> Plan:
        """The whole run."""
        ...

    @property
    def index(self) -> int:
        """Of the step in it."""
        ...

    @property
    def planned(self) -> StepPlan:
        """What the plan says about it."""
        ...

    @property
    def slots(self) -> tuple[Slot, ...]:
        """By their numbers."""
        ...

    @property
    def moves(self) -> tuple[int | None, ...]:
        """Where the content of every slot comes from."""
        ...


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who wrote a slot.

    Attributes:
        generation: number of the generation, which belongs to one session and one model.
        step: of the plan, at which it was written.
        what: which value of its site it is.
        shape: of the tensor.
        dtype: of the tensor.
        version: counts writes to the tensor.
    """

    generation: int
    step: int
    what: What
    shape: tuple[int, ...]
    dtype: torch.dtype
    version: int

    @classmethod
    def on(cls, tensor: torch.Tensor, generation: int, step: int, what: What) -> Stamp:
        """Stamp of a tensor that is stored now."""
        return cls(generation, step, what, tuple(tensor.shape), tensor.dtype, _version(tensor))


@dataclass
class Stamps:
    """Stamps of the slots of one context, by their numbers.

    A context has stamps of its own, so that those of another one never come into question.

    Attributes:
        found: the stamps.
        full: gated steps of the plan that computed everything, as their gate has decided.
    """

    found: list[Stamp | None] = field(default_factory=list)
    full: set[int] = field(default_factory=set)

    reads = 0
    """Checked so far, by all contexts."""

    def check(self, reads: Iterable[int], store: Store, step: Stepped, generation: int) -> None:
        """Check what a step is about to read.

        Args:
            reads: numbers of slots.
            store: the tensors of all slots.
            step: the step.
            generation: the current one.

        Raises:
            StaleRead: a slot is not what the plan says.
        """
        for number in reads:
            Stamps.reads += 1
            slot = step.slots[number]
            stamp = self.found[number] if number < len(self.found) else None
            tensor = store[number] if number < len(store) else None
            written = written_at(step.plan, step.index, slot, self.full)
            if tensor is None or stamp is None or written is None:
                raise _stale(slot, stamp, f"a value of step {written}")
            expected = Stamp.on(tensor, generation, written, _what(step, slot))
            size, planned = tensor.numel() * tensor.element_size(), step.plan.slot_bytes[slot]
            if stamp != expected or size != planned:
                raise _stale(slot, f"{stamp}, {size} bytes", f"{expected}, {planned} bytes")

    def advance(self, step: Stepped, store: Store, generation: int, *, copied: Collection[int] = ()) -> None:
        """Follow a step: stamps go the way of the tensors.

        Args:
            step: the step.
            store: the tensors of all slots after it.
            generation: the current one.
            copied: slots into which what they hold was copied; the others have the tensor itself.
        """
        note = self.full.add if step.planned is step.plan.steps[step.index].full else self.full.discard
        note(step.index)
        old = self.found
        self.found = [
            None if source is None or tensor is None else old[source] if source >= 0
            else Stamp.on(tensor, generation, step.index, _what(step, slot))
            for slot, source, tensor in zip(step.slots, step.moves, store, strict=True)
        ]  # fmt: skip
        for number in copied:
            stamp, tensor = self.found[number], store[number]
            if stamp is not None and tensor is not None:
                self.found[number] = replace(stamp, version=_version(tensor))


def written_at(plan: Plan, index: int, slot: Slot, full: Collection[int] = ()) -> int | None:
    """Step at which what a step finds in a slot should have been computed, by the rows of the plan alone.

    Args:
        plan: the whole run.
        index: of the step in it.
        slot: what it reads.
        full: gated steps before it that computed everything.
    """
    age = slot.age
    for step in range(index - 1, -1, -1):
        planned = plan.steps[step]
        site = (planned.full if planned.full is not None and step in full else planned).sites[slot.site]
        is_whole = site.action.computes and site.action.tokens is None and slot.kind is SlotKind.VALUE
        is_whole = is_whole and slot.site not in (plan.probe, plan.trace)  # which are computed at every step
        if Slot.of(slot.site, slot.kind, age) in site.writes or (is_whole and age == 0):
            return step
        if is_whole or Slot.of(slot.site, slot.kind) in site.writes:
            age -= slot.kind in HISTORIC and site.action.tokens is None  # refreshed tokens do not make a value older
    return None


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _what(step: Stepped, slot: Slot) -> What:
    """Which value of its site a step reads from a slot, or writes to it; what attention gives has a slot of its own."""
    what = step.planned.sites[slot.site].action.what
    return what if slot.kind is SlotKind.VALUE and what is not What.ATTENTION else What.CORE


def _stale(slot: Slot, found: object, expected: str) -> StaleRead:
    return StaleRead(
        f"slot {slot} is not what the plan says",
        where="runtime",
        why=f"found {found}; expected {expected}",
        fix="report this",
    )
