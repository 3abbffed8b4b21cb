"""Which of the calls at the step before does this call continue?

Several calls of a step belong to several *contexts*: guidance partners, windows of a long film, tiles, micro-batches. A
call continues the context that had its shapes, its name where it has one, and its conditioning. Where several did, the
latent decides: it has come a step along its own trajectory, and nowhere near another's. What cannot be told starts a
context of its own, which computes everything: a call never reads what another's trajectory has stored.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dicompile.plan import TimestepSchedule
from dicompile.runtime.gate import Drift
from dicompile.runtime.given import Given
from dicompile.runtime.graphs import Buffers
from dicompile.runtime.stamps import Stamps

log = logging.getLogger("dicompile")

NEAR = 0.7
"""Relative distance below which a latent may be a step further on; two draws of noise are 1.4 apart."""
MARGIN = 0.5
"""How much nearer than to any other context a latent has to be."""
MOST_TWINS = 4
"""Contexts of one step that nothing tells apart."""
MOST = 64
"""Contexts of one model in one session."""


Conditioning = Mapping[str, Given]
"""By name of the input."""


@dataclass
class Call:
    """What tells calls of one step apart.

    Attributes:
        name: of the guidance context; empty where the sampler gives none.
        geometry: shapes of the inputs, and the structure that they lead to.
        way: through the forward: Python arguments and settings of the module. Differs between partners that toggle a
            setting, and between the halves of a run in the middle of which one was changed.
        given: conditioning.
        signals: names in it of what changes with the step for everybody (control signals, second timesteps).
        latent: what is denoised, or None.
    """

    name: str
    geometry: object
    way: object
    given: Conditioning
    signals: Collection[str] = ()
    latent: torch.Tensor | None = None


@dataclass
class Sample:
    """What a context remembers of whoever decides for itself: all rows of its batch, or those of one picture.

    Attributes:
        rows: of the batch; None for all of them.
        drift: what its gate remembers, if the policy has one.
        stamps: what is known of its slots, where reads are checked.
    """

    rows: tuple[int, ...] | None = None
    drift: Drift = field(default_factory=Drift)
    stamps: Stamps = field(default_factory=Stamps)


@dataclass
class ContextState:
    """What one context remembers.

    Attributes:
        name: what the sampler calls it; several may have one name.
        geometry: see `Call`.
        schedule: what is planned in it: the schedule from the step at which it began.
        way: see `Call`; of its last call.
        step: the last step it ran, counted in the whole schedule.
        is_new: that was its first one.
        is_uncached: it runs uncached: it began, or went on, before its code was compiled.
        given: its conditioning at that step.
        latent: copy of its latent at that step.
        store: its slots, numbered by its plan.
        held: bytes of them.
        chosen: tokens that sites refreshed at that step; kept only in a session that was told to.
        buffers: memory in which its slots lie, where steps are recorded as CUDA graphs.
        samples: who decides; one, unless a gate has every sample decide for itself.
    """

    name: str
    geometry: object
    schedule: TimestepSchedule
    way: object = None
    step: int | None = None
    is_new: bool = True
    is_uncached: bool = False
    given: Conditioning = field(default_factory=dict)
    latent: torch.Tensor | None = None
    store: list[torch.Tensor | None] = field(default_factory=list)
    held: int = 0
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    buffers: Buffers | None = None
    samples: tuple[Sample, ...] = field(default_factory=lambda: (Sample(),))

    @property
    def drift(self) -> Drift:
        """What its gate remembers, where one decision holds for all rows; else that of the first sample."""
        return self.samples[0].drift

    @property
    def stamps(self) -> Stamps:
        """What is known of its slots, as `drift`."""
        return self.samples[0].stamps

    def split(self, rows: int, unit: int) -> None:
        """Let every picture decide for itself, from the first step on.

        Args:
            rows: of the batch.
            unit: rows of each picture; those of one lie as far apart as there are pictures.
        """
        count = rows // unit
        if count > 1 and self.samples[0].rows is None:
            self.samples = tuple(Sample(tuple(range(i, rows, count))) for i in range(count))

    def forget(self) -> None:
        """Release everything."""
        self.given, self.latent, self.held, self.buffers = {}, None, 0, None
        for sample in self.samples:
            sample.drift = Drift()
        self.store.clear()
        self.chosen.clear()

    def follow(self, call: Call, step: int) -> None:
        """A call of this context is done."""
        self.is_new = self.step is None
        self.step, self.way, self.given = step, call.way, call.given
        self.latent = None if call.latent is None else call.latent.clone()


class Contexts(dict[str, ContextState]):
    """The contexts of one run, by name, with a number where one of that name is there.

    Attributes:
        varying: names of inputs that, for all calls of a step, differed from all calls of the step before. They
            say nothing about partners.
    """

    def __init__(self) -> None:
        super().__init__()
        self.varying: set[str] = set()
        self._unmet: set[str] | None = None
        self._is_full = False

    def next_step(self, before: int) -> None:
        """A new step begins; what was not called since `before` starts anew, and its slots are released."""
        self.varying |= self._unmet or set()
        self._unmet = None
        self.leave(before)

    def leave(self, before: int) -> None:
        """Release the contexts that were not called since a step."""
        for label in [label for label, c in self.items() if c.step is None or c.step < before]:
            self.pop(label).forget()

    def forget(self) -> None:
        """Release all of them."""
        for context in self.values():
            context.forget()
        self.clear()

    def find(self, call: Call, step: int) -> ContextState | None:
        """The context that a call continues; None if none can be told for sure."""
        alike = [
            context for context in self.values()
            if context.name == call.name and context.geometry == call.geometry
            and (context.step == step - 1 or (context.step == step and not context.is_new))
        ]  # fmt: skip
        if len(alike) > 1:
            alike = [context for context in alike if context.way == call.way] or alike
        if not (call.name and len(alike) == 1):
            alike = self._of_conditioning(call, alike)
        open_ = [context for context in alike if context.step == step - 1]
        if not open_:
            return None
        if len(alike) == 1:
            return None if _rows_part(call.latent, open_[0].latent) else open_[0]
        exact = [context for context in alike if is_equal(call.given, context.given, call.given)]
        if len(exact) == 1:
            return exact[0] if exact[0].step == step - 1 else None
        repeated = [c for c in alike if c.step == step and _is_repeated(call, c)]
        return _nearest(call.latent, open_, are_all=len(open_) == len(alike) or bool(repeated))

    def why_new(self, call: Call, step: int) -> str:
        """Why a call continues no context, in words."""
        named = [context for context in self.values() if context.name == call.name]
        if not any(context.step == step - 1 for context in named):
            who = f"context {call.name!r}" if call.name else "another context"
            return f"{who} begins here, or was not called at the step before"
        if not any(context.geometry == call.geometry for context in named):
            return "its shapes are not those of the step before"
        return "which context it continues cannot be told: neither name, conditioning nor latent says so"

    def _of_conditioning(self, call: Call, alike: Sequence[ContextState]) -> list[ContextState]:
        """Those that had the conditioning of a call."""
        if not alike:
            return []
        asked = set(call.given) - set(call.signals) - self.varying
        self._unmet = set(asked) if self._unmet is None else self._unmet
        found = []
        for context in alike:
            equal = {n for n in asked if n in context.given and context.given[n].is_same(call.given[n])}
            self._unmet -= equal
            if equal == asked:
                found.append(context)
        return found

    def open(self, call: Call, step: int, schedule: TimestepSchedule) -> ContextState | None:
        """A context for a call that continues none; None where there are too many already."""
        twins = [
            context for context in self.values()
            if (context.name, context.geometry, context.way, context.step) == (call.name, call.geometry, call.way, step)
            and _is_repeated(call, context)
        ]  # fmt: skip
        if len(twins) >= MOST_TWINS:
            twins[0].forget()
            twins[0].step, twins[0].schedule = None, schedule
            return twins[0]
        if len(self) >= MOST:
            if not self._is_full:
                log.warning("more than %d calls of one step: the others compute everything and remember nothing", MOST)
            self._is_full = True
            return None
        made = ContextState(call.name, call.geometry, schedule)
        self[new_label(call.name, self)] = made
        return made

    def label_of(self, context: ContextState) -> str:
        """Label of one of them."""
        return next(label for label, known in self.items() if known is context)


def is_equal(first: Conditioning, second: Conditioning, names: Iterable[str]) -> bool:
    """True if two calls had the same inputs of some names."""
    return all(name in first and name in second and first[name].is_same(second[name]) for name in names)


def is_same_latent(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """True if two latents are the same picture."""
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and bool(torch.equal(first, second))


def is_near(latent: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    """True if a latent may be another one a step further on."""
    if latent is None or before is None or latent.shape != before.shape:
        return False
    return float(_distances(latent, before).max()) < NEAR


def _distances(latent: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """How far every sample of a latent is from what it was, relative to it; [b]."""
    old, new = before.flatten(1).float(), latent.flatten(1).float()
    distances: torch.Tensor = (new - old).norm(dim=1) / old.norm(dim=1).clamp_min(1e-12)
    return distances


def _rows_part(latent: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    """True if some samples of a batch went a step on, and others are something else: a row was given to another."""
    if latent is None or before is None or latent.shape != before.shape or latent.ndim < 2 or len(latent) < 2:
        return False
    if latent.device.type != "cpu":
        return False  # it would wait for the device at every step
    distances = _distances(latent, before)
    return float(distances.min()) < MARGIN < 1.0 < float(distances.max())


def _is_repeated(call: Call, context: ContextState) -> bool:
    """True if a call is the last one of a context over again."""
    return is_same_latent(call.latent, context.latent) and is_equal(call.given, context.given, call.given)


def _nearest(latent: torch.Tensor | None, contexts: Sequence[ContextState], *, are_all: bool) -> ContextState | None:
    """The context whose latent a latent clearly is a step on from; of equal ones any.

    Args:
        latent: of the call.
        contexts: that were not called at this step.
        are_all: no other one could be meant; of contexts that nothing tells apart, any will do.
    """
    if latent is None or any(context.latent is None or context.latent.shape != latent.shape for context in contexts):
        return None
    distances = [float(_distances(latent, context.latent).max()) for context in contexts if context.latent is not None]
    best = min(range(len(contexts)), key=distances.__getitem__)
    rivals = [
        distance for distance, context in zip(distances, contexts, strict=True)
        if not is_same_latent(context.latent, contexts[best].latent)
    ]  # fmt: skip
    is_clear = distances[best] < NEAR and distances[best] <= MARGIN * min(rivals, default=float("inf"))
    return contexts[best] if is_clear or (are_all and not rivals and _are_twins(contexts)) else None


def _are_twins(contexts: Sequence[ContextState]) -> bool:
    """True if nothing tells these contexts apart, so that any may go on with what another stored."""
    first = contexts[0]
    return all(
        (context.schedule, context.way) == (first.schedule, first.way)
        and is_equal(context.given, first.given, {*context.given, *first.given})
        for context in contexts
    )


def new_label(name: str, taken: Iterable[str]) -> str:
    """The name of a context, or with a number where one of that name is there."""
    taken = set(taken)
    free = (name if not number else f"{name}#{number}" for number in range(len(taken) + 1))
    return next(label for label in free if label not in taken)
