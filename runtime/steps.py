"""What is run at one step, worked out of its plan and its code before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dicompile.errors import StaleRead
from dicompile.lower import Constant, GatedProgram, Program, Verification
from dicompile.plan import HISTORIC, Aligned, Gate, Plan, Slot, SlotKind, StepPlan, TimestepSchedule
from dicompile.runtime.report import RECALLED
from dicompile.same import Same


@dataclass(frozen=True)
class Step:
    """A step, ready to run: slots are numbered, and where everything goes is known.

    Attributes:
        plan: the whole run.
        index: of the step in it.
        planned: what the plan says about it.
        program: what runs.
        slots: every slot of the plan, in the order of their numbers.
        reads: number of a slot, register, and whether its content stays for later steps.
        moves: for every slot number: where its content comes from, the number of a slot or ``~register``; None if
            nothing is held there after the step.
        held: bytes that are held after the step.
        results: register of every output and whether it has to be copied, or the output itself if it is no tensor.
        stored_copies: registers that are stored, and have to be copied since somebody else may write to them.
        loads: name and register of what is put there before the first call, besides inputs, slots and numbers.
        key: equal for steps of which one recording will do, but for numbers and places in memory.
        anchors: number of a slot, and register, of what the gate compares from full step to full step: the probe, and
            the model's output. Empty where it compares nothing.
        verification: what tells, after the program, how far off what it has recalled is, if anything does.
    """

    plan: Plan
    index: int
    planned: StepPlan
    program: Program
    slots: tuple[Slot, ...]
    reads: tuple[tuple[int, int, bool], ...]
    moves: tuple[int | None, ...]
    held: int
    results: tuple[tuple[int, bool] | Constant, ...]
    stored_copies: tuple[int, ...]
    loads: tuple[tuple[Hashable, int], ...]
    key: Same
    anchors: tuple[tuple[int, int], ...] = ()
    verification: Verification | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        index: int,
        program: Program,
        planned: StepPlan | None = None,
        verification: Verification | None = None,
    ) -> Step:
        """Work out everything that does not depend on values.

        Args:
            plan: the whole run.
            index: of the step in it.
            program: what runs.
            planned: what the plan says about the step, where it says two things.
            verification: what tells how far off is what the program recalls.

        Raises:
            StaleRead: the plan reads what it never holds.
        """
        planned, slots = planned or plan.steps[index], plan.slots
        number = {slot: i for i, slot in enumerate(slots)}
        for slot, _ in program.reads:
            if slot not in number:
                raise not_written(slot)
        contents = _contents_after(planned, program)
        outlasting = {source for source in contents.values() if isinstance(source, Slot)}
        moves: list[int | None] = [None] * len(slots)
        for slot, source in contents.items():
            moves[number[slot]] = number[source] if isinstance(source, Slot) else ~source
        return cls(
            plan=plan,
            index=index,
            planned=planned,
            program=program,
            slots=slots,
            reads=tuple((number[slot], register, slot in outlasting) for slot, register in program.reads),
            moves=tuple(moves),
            held=sum(plan.slot_bytes[slot] for slot in contents),
            results=tuple(r if isinstance(r, Constant) else (r, r in program.shared_results) for r in program.results),
            stored_copies=tuple(sorted(program.shared_writes.intersection(~m for m in moves if m is not None))),
            loads=(
                *((("invariant", name), register) for name, register in program.invariants),
                *((("noise", item.site), item.register) for item in program.noise),
                *((("weights", item.site), item.register) for item in program.weights),
                *((("predicted", item.block), item.register) for item in program.predicted),
            ),
            key=Same((program, tuple(moves), slots)),
            anchors=tuple(
                (number[slot], register)
                for slot, register in sorted(program.writes, key=lambda write: write[0].site != plan.probe)
                if slot.kind is SlotKind.ANCHOR
            ),
            verification=verification,
        )

    @property
    def is_led(self) -> bool:
        """True if a guidance partner may wait for what it returns."""
        return self.plan.gate is not None and bool(self.plan.gate.leads)

    @property
    def has_both(self) -> bool:
        """True if one call has the guidance partner that leads, and the one that follows."""
        return self.is_led and self.plan.gate is not None and bool(self.plan.gate.halves)

    @property
    def moved(self) -> frozenset[int]:
        """Slots that hold after the step what another one held before."""
        return frozenset(n for n, source in enumerate(self.moves) if source is not None and source != n)

    @property
    def is_recall(self) -> bool:
        """True if it does what a gated step does where the probe has drifted little."""
        return self.planned.full is not None

    @property
    def kind(self) -> str:
        """What it does, in one word, for display."""
        return RECALLED if self.is_recall else self.planned.kind

    def weights(self, site: int, number: int, full: Sequence[int]) -> tuple[float, ...]:
        """Factors of a site's action; where a gate recalls, they follow from the steps that really were full.

        Args:
            site: its number.
            number: of this step in the whole schedule.
            full: numbers of the full steps before it, the latest first.
        """
        planned = self.planned.sites[site].action
        if not self.is_recall:
            return planned.factors
        action = self.plan.recalls[site].action(full[: len(planned.weights) - 1], number)
        padded = (*action.weights, *(0.0,) * (len(planned.weights) - len(action.weights)))
        return replace(action, weights=padded).factors

    @functools.cached_property
    def does(self) -> Hashable:
        """Equal for steps, of all plans of one model, that compute the same function of inputs and slots."""
        ints = [(item, self.planned.sites[item.site]) for item in self.program.ints]
        counts = tuple(
            site.action.tokens.count if item.is_count and site.action.tokens else site.clock for item, site in ints
        )
        return Same((self.planned.signature, counts))

    @functools.cached_property
    def is_repeatable(self) -> bool:
        """True if it takes no slot's content for the last time, so that running it twice holds no more memory."""
        return all(stays for _, _, stays in self.reads)

    def outputs(self, registers: Sequence[Any]) -> list[Any]:
        """What the model returns; copies where slots may lie in the same memory."""
        return [
            r.value if isinstance(r, Constant) else registers[r[0]].clone() if r[1] else registers[r[0]]
            for r in self.results
        ]

    def chosen(self, registers: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Tokens that sites refreshed."""
        return {int(site): registers[register] for site, register in self.program.chosen}

    def contents(self, registers: list[Any], old: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Slots after the step: fresh tensors are the new entries, and what no later step reads is dropped."""
        for register in self.stored_copies:
            registers[register] = registers[register].clone()
        return [None if source is None else registers[~source] if source < 0 else old[source] for source in self.moves]


@dataclass(frozen=True)
class GatedStep:
    """A step of which a gate decides in the middle what it does; both ways go on with the same registers.

    Attributes:
        program: what runs before the gate decides.
        recalled: how it goes on where the probe has drifted little.
        full: how it goes on otherwise.
        probe: number of the slot of the probe, and the register of its value; None where none is watched.
        trace: numbers of the slots of a trace, newest first, and the register of its value, where values are recalled
            by it.
        aligned: how.
    """

    program: Program
    recalled: Step
    full: Step
    probe: tuple[int, int] | None
    trace: tuple[tuple[int, ...], int] = ((), 0)
    aligned: Aligned | None = None

    @classmethod
    def of(cls, plan: Plan, index: int, programs: GatedProgram) -> GatedStep:
        """Work out everything that does not depend on values."""
        planned, watched = plan.steps[index], programs.watched
        recalled = Step.of(plan, index, programs.recalled, verification=programs.verification)
        full = Step.of(plan, index, programs.full, planned.full)
        number = {slot: i for i, slot in enumerate(plan.slots)}
        probe = next(((number[slot], register) for slot, register in watched[:1]), None)
        trace = next(
            ((tuple(number[read] for read in planned.sites[slot.site].reads), value) for slot, value in watched[1:]),
            ((), 0),
        )
        aligned = next((recall for recall in plan.recalls.values() if isinstance(recall, Aligned)), None)
        return cls(programs.before, recalled, full, probe, trace, aligned)


class StepSource(Protocol):
    """Plans and steps by schedule; made on demand."""

    def plan(self, schedule: TimestepSchedule) -> Plan:
        """The plan for a schedule."""
        ...

    def step(self, schedule: TimestepSchedule, index: int) -> Step | GatedStep:
        """What to run at a step."""
        ...

    def planned_for_others(self, plan: Plan, index: int) -> Step | GatedStep:
        """What to run at a step that was planned for the same model with other sizes."""
        ...

    @property
    def trials(self) -> Mapping[str, Step]:
        """What is tried beside every step that is watched, by kind of reuse."""
        ...


class Warmup(Protocol):
    """What runs while steps are compiled."""

    @property
    def uncached(self) -> Step:
        """A step that computes everything and stores nothing."""
        ...

    def is_ready(self, schedule: TimestepSchedule) -> bool:
        """True if every step of a run is compiled; asks for it otherwise."""
        ...


def gate_of(step: Step | GatedStep) -> Gate | None:
    """The gate that decides about a step, or stores for the one that will; None if the policy has none."""
    return (step.full if isinstance(step, GatedStep) else step).plan.gate


def not_written(slot: Slot) -> StaleRead:
    """The error where a slot is read that holds nothing."""
    return StaleRead(f"slot {slot} was not written", where="runtime", fix="report this")


def _contents_after(planned: StepPlan, program: Program) -> dict[Slot, Slot | int]:
    """For every slot that the plan keeps after a step: the slot that has its content before, or the register."""
    contents: dict[Slot, Slot | int] = {slot: slot for slot in planned.live}
    for slot, register in program.writes:
        if slot.kind in HISTORIC:
            for age in range(planned.sites[slot.site].history, 0, -1):
                contents[Slot.of(slot.site, slot.kind, age)] = Slot.of(slot.site, slot.kind, age - 1)
        contents[slot] = register
    return {slot: source for slot, source in contents.items() if slot in planned.live}
