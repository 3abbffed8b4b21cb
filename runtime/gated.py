"""Steps of which a gate decides while they run: which way a call goes on, and what is noted for the next decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from dicompile.plan import SlotKind, What
from dicompile.runtime.contexts import Sample
from dicompile.runtime.gate import Anchors, Decision, decide
from dicompile.runtime.given import Given
from dicompile.runtime.rows import Group, picked
from dicompile.runtime.split import Split, grouped
from dicompile.runtime.steps import GatedStep, Step, gate_of, not_written
from dicompile.runtime.storage import run_calls
from dicompile.runtime.values import load_tables
from dicompile.runtime.work import Work


def way_of(work: Work, step: GatedStep, *, is_paired: bool) -> Step | Split:
    """How a call goes on, once what its gate watches has been computed; rows may go on in different ways.

    Args:
        work: the call.
        step: what it may do.
        is_paired: a guidance partner is there.
    """
    hoisted = None if step.probe is None else _run_to_probe(work, step)
    groups = _decided(work, step, is_paired=is_paired)
    if len(groups) > 1:
        return Split(step, groups, _hoisted(work, step) if hoisted is None else hoisted, is_paired)
    return step.recalled if groups[0].recalls else step.full


def _run_to_probe(work: Work, step: GatedStep) -> dict[str, Any]:
    """Run a step until what its gate watches is there; what it needs from outside of the steps, by name."""
    registers, invariants = work.registers, step.program.invariants
    doubt = load_tables(work, invariants, may_doubt=True)
    before = registers.copy()
    run_calls(step.program, registers, None, supply=work.supply)
    if doubt is not None and doubt.is_justified:
        registers[:] = before
        load_tables(work, invariants, is_again=True)
        before = registers.copy()
        run_calls(step.program, registers, None, supply=work.supply)
    return {name: before[number] for name, number in invariants}


def _hoisted(work: Work, step: GatedStep) -> dict[str, Any]:
    """What either way of a step needs from outside of the steps, by name, where nothing runs before its gate."""
    ways = dict((*step.recalled.program.invariants, *step.full.program.invariants))
    load_tables(work, tuple(ways.items()))
    return {name: work.registers[number] for name, number in ways.items()}


def _decided(work: Work, step: GatedStep, *, is_paired: bool) -> tuple[Group, ...]:
    """How the rows of a step go on, as its gate decides. This is the one place that waits for the device."""
    context = work.context
    assert context is not None
    gate, drifts = step.full.plan.gate, [sample.drift for sample in context.samples]
    assert gate is not None
    share = (work.place.step + 1) / step.full.plan.schedule.whole
    if step.probe is not None:
        decisions = _compared(work, step, share)
    elif gate.verifies:
        decisions = decide(gate, drifts, [drift.missed(gate) for drift in drifts], share)
    else:
        decisions = [drift.wait(gate, is_there=is_paired) for drift in drifts]
    for i, (drift, decision) in enumerate(zip(drifts, decisions, strict=True)):
        drift.take(decision)
        work.state.report.decide(decision if len(drifts) == 1 else replace(decision, sample=i))
    if gate.leads and gate.halves and decisions[0].recalls:
        assert work.batch is not None
        lead, other = map(tuple, gate.leading(work.batch.rows))
        return Group(context.samples, recalls=False, rows=lead), Group(context.samples, recalls=True, rows=other)
    return grouped(context.samples, [decision.recalls for decision in decisions], step, gate)


def _compared(work: Work, step: GatedStep, share: float) -> list[Decision]:
    """What a gate decides by what it watches; `share` of the run is over with this step."""
    context, state, number_of_step, gate = work.context, work.state, work.place.step, step.full.plan.gate
    assert context is not None
    assert gate is not None
    assert step.probe is not None
    number, register = step.probe
    samples, store, registers = context.samples, context.store, work.registers

    def rows(value: torch.Tensor | None, slot: int, sample: Sample) -> torch.Tensor:
        if value is None:
            raise not_written(step.full.slots[slot])
        return value if work.batch is None else work.batch.picked(value, sample.rows)

    known = state.decided_at(number_of_step) if gate.partners == "first" else None
    first = known if known is not None and len(known) == len(samples) else (None,) * len(samples)
    moved: list[torch.Tensor | Decision] = []
    for sample, one in zip(samples, first, strict=True):
        if work.code.check:
            sample.stamps.check([number, *step.trace[0]], store, step.full, state.generation)
        reference = rows(store[number] if store else None, number, sample)
        moved.append(sample.drift.moved(gate, rows(registers[register], number, sample), reference, one))
    decisions = decide(gate, [sample.drift for sample in samples], moved, share)
    state.decided = number_of_step, known or tuple(decisions)
    for sample, decision in zip(samples, decisions, strict=True):
        if decision.recalls and step.trace[0]:
            assert step.aligned is not None
            stored = [rows(store[n], n, sample) for n in step.trace[0]]
            sample.drift.align(step.aligned, rows(registers[step.trace[1]], step.trace[0][0], sample), stored)
    return decisions


def partner_of(work: Work, step: Step | GatedStep) -> torch.Tensor | None:
    """What the guidance partner after whom this call may recall has returned at this step, if it was there."""
    gate, place, context = gate_of(step), work.place, work.context
    if gate is None or not gate.leads or gate.halves or context is None or work.latent is None:
        return None
    latent, found = Given.of(work.latent), []
    for other in work.state.contexts.values():
        if other.name == gate.leads and other is not context and other.drift.result is not None:
            result, given = other.drift.result
            if other.step == place.step and other.drift.full[:1] == (place.step,) and given.is_same(latent):
                found.append(result)
    return found[0] if len(found) == 1 and context.name != gate.leads else None


def nobody(work: Work) -> torch.Tensor:
    """What stands in for the output of a partner who was not there; what is made of it is not recalled."""
    latent = work.code.signature.tensor(work.inputs, work.code.signature.latent)
    assert latent is not None
    return torch.zeros_like(latent)


def has_both(work: Work, step: Step | GatedStep) -> bool:
    """True if the call has both guidance halves, of the same latents; waits for the device where it may have."""
    gate = gate_of(step)
    if gate is None or not (gate.leads and gate.halves) or work.latent is None or work.context is None:
        return False
    return bool(torch.equal(*work.latent.chunk(2)))


def verify(work: Work, step: Step, group: Group) -> None:
    """Compare what some rows have recalled with what they would have computed, if that is due."""
    check, gate, registers = step.verification, step.plan.gate, work.registers
    drift = group.samples[0].drift
    if check is None or gate is None or not gate.is_verified(drift.run, drift.recalled):
        return
    run_calls(check.program, registers, None, supply=work.supply)
    for sample in group.samples:
        places, count = group.places(sample), group.count(work.batch)
        both = (registers[check.recalled], registers[check.computed])
        sample.drift.verify(*(value if places is None else picked(value, places, count) for value in both))


def measure(work: Work, step: Step, group: Group) -> None:
    """Compare a full step with the one before it, for a gate that wants to know how far the output moves."""
    context, batch = work.context, work.batch
    if context is None or len(step.anchors) < len(Anchors._fields):  # partners read the output alone
        return
    store, numbers = context.store, [number for number, _ in step.anchors]
    is_first = not store or store[numbers[0]] is None
    now = [work.registers[register] for _, register in step.anchors]
    before = [] if is_first else [cast("torch.Tensor", store[number]) for number in numbers]
    for sample in group.samples:
        if work.code.check and not is_first:
            sample.stamps.check(numbers, store, step, work.state.generation)
        own, old = now, before
        if batch is not None and sample.rows is not None:
            places, count = group.places(sample) or (), group.count(batch)
            own = [picked(value, places, count) for value in now]
            old = [picked(value, sample.rows, batch.rows) for value in before]
        sample.drift.measure(Anchors(*own), Anchors(*old) if old else None)


def leave_output(work: Work, step: Step) -> None:
    """Leave what the model returns to the guidance half that follows: in this call, or in one after it.

    Where one call has both halves, a difference takes the place of the whole output in their slots; rows of the half
    that leads have one as well, which nobody reads.

    Args:
        work: the call, whose slots hold what they do after it.
        step: what it did.
    """
    if not step.anchors or not step.is_led or work.context is None:
        return
    output, store = work.registers[step.anchors[0][1]], work.context.store
    if not step.has_both:
        if work.latent is not None:
            work.context.drift.result = output, Given.of(work.latent)
        return
    for number, slot in enumerate(step.slots):
        if slot.kind is SlotKind.VALUE and step.planned.sites[slot.site].action.what is What.DIFFERENCE:
            store[number] = None if store[number] is None else output - output.roll(len(output) // 2, 0)
