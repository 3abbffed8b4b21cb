"""Whoever watches calls: gets the values that a step computes, piece by piece, before they are dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dicompile.plan import Slot, TimestepSchedule


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A call that is watched.

    Attributes:
        generation: its number, counted over all models.
        context: label of its guidance context.
        step: of the whole schedule.
        schedule: the whole schedule.
        latent: what is denoised, or None where that is not known.
    """

    generation: int
    context: str
    step: int
    schedule: TimestepSchedule
    latent: torch.Tensor | None


class Observer(Protocol):
    """Watches calls. It must not write to what it is shown, but may have a call return something else."""

    def saw(self, call: Seen, slot: Slot, value: torch.Tensor) -> None:
        """A value that the step writes; nothing else holds it afterwards unless a later step reads it."""
        ...

    def ended(
        self, call: Seen, results: Sequence[Any], tried: Callable[[], Mapping[str, Sequence[Any]]]
    ) -> Sequence[Any] | None:
        """The call is done.

        Args:
            call: what was watched.
            results: the outputs of the model.
            tried: computes what they would have been, had the step reused what the one before has stored, by kind of
                reuse (see `dicompile.plan.reusing_plan`); none at the first step of a context.

        Returns:
            What the model is to return instead, if anything.
        """
        ...


class Watch:
    """One call under the eyes of an observer.

    Args:
        observer: who watches.
        call: what is watched.
        writes: slots that the program writes, with their registers.
        kept: registers that the plan keeps; all others are dropped when they were seen.
        trying: gives what the model would have returned, see `Observer.ended`.
    """

    def __init__(
        self,
        observer: Observer,
        call: Seen,
        writes: Sequence[tuple[Slot, int]],
        kept: frozenset[int],
        trying: Callable[[], Mapping[str, Sequence[Any]]],
    ) -> None:
        self._observer, self._call, self._kept, self._trying = observer, call, kept, trying
        self._slots = {register: slot for slot, register in writes}

    def after(self, outputs: Sequence[int], registers: list[Any]) -> None:
        """Show what a segment has written."""
        for register in outputs:
            slot = self._slots.get(register)
            if slot is None:
                continue
            self._observer.saw(self._call, slot, registers[register])
            if register not in self._kept:
                registers[register] = None

    def end(self, results: list[Any]) -> list[Any]:
        """Show what the model returns, and let the observer ask what it would have returned; what it does return."""
        instead = self._observer.ended(self._call, results, self._trying)
        return results if instead is None else list(instead)
