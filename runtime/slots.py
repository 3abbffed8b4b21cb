"""Slots at one call: what a step reads out of them, and what they hold after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dicompile.runtime.contexts import ContextState, Sample
from dicompile.runtime.gate import Drift
from dicompile.runtime.steps import Step, not_written
from dicompile.runtime.work import Work


def load_slots(work: Work, step: Step) -> None:
    """Put the contents of slots that a step reads into registers; those that nobody reads later let go of theirs."""
    context = work.context
    if context is None:
        return
    for number, register, content, stays in read_slots(work, step, context.samples, step.reads):
        work.registers[register] = content
        if not stays:
            context.store[number] = None


def read_slots(
    work: Work, step: Step, samples: Sequence[Sample], reads: Sequence[tuple[int, int, bool]]
) -> list[tuple[int, int, torch.Tensor, bool]]:
    """What a step reads, as `Step.reads`, with the contents of the slots, for all rows.

    Args:
        work: the call.
        step: as it is planned.
        samples: that do it.
        reads: of the code that runs.

    Raises:
        StaleRead: a slot holds nothing, or something else than the plan says.
    """
    context = work.context
    assert context is not None
    store, found = context.store, []
    missing = _newer(context, step, samples[0].drift) if step.is_recall and store else {}
    for sample in samples if work.code.check else ():
        sample.stamps.check([n for n, _, _ in reads if n not in missing], store, step, work.state.generation)
    for number, register, stays in reads:
        content = missing[number] if number in missing else store[number] if store else None
        if content is None:
            raise not_written(step.slots[number])
        found.append((number, register, content, stays))
    return found


def _newer(context: ContextState, step: Step, drift: Drift) -> dict[int, torch.Tensor | None]:
    """What stands in for values that no full step has stored yet, and that have no weight: the newest ones."""
    store, full = context.store, len(drift.full)
    newest = {
        (slot.site, slot.kind): store[number] for number, _, _ in step.reads if not (slot := step.slots[number]).age
    }
    return {
        number: newest.get((slot.site, slot.kind))
        for number, _, _ in step.reads
        if (slot := step.slots[number]).age >= full > 0
    }


def keep(
    work: Work, done: Sequence[tuple[Sample, Step]], *, is_paired: bool = False, copied: Collection[int] = ()
) -> None:
    """Note that a call is done, and what the slots of its context hold now.

    Args:
        work: the call.
        done: what every sample did.
        is_paired: a guidance partner was there.
        copied: see `Stamps.advance`.
    """
    context, place = work.context, work.place
    assert context is not None
    step = done[0][1]
    context.held = step.held
    if step.plan.gate is not None:  # which may have let less be stored than the plan has room for
        there = (slot for slot, value in zip(step.slots, context.store, strict=True) if value is not None)
        context.held = sum(step.plan.slot_bytes[slot] for slot in there)
    for sample, own in done:
        if own.plan.gate is not None:
            sample.drift.follow(place.step, recalls=own.is_recall)
            sample.drift.is_paired = is_paired
        if work.code.check:
            anew = copied if context.buffers is None else own.moved
            sample.stamps.advance(own, context.store, work.state.generation, copied=anew)
    context.follow(place.call, place.step)
    if place.is_last:
        context.forget()  # nothing goes on from here
