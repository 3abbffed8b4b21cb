"""One call of compiled code: find its place, run the program of that step, keep what the plan keeps.

The code is a pure function of inputs and slots; everything that is remembered lies in the session.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch

from dicompile.parked import Parked
from dicompile.plan import SlotKind, TimestepSchedule, What
from dicompile.runtime.contexts import ContextState, Sample
from dicompile.runtime.gate import Anchors, Decision, Drift, decide
from dicompile.runtime.given import Given
from dicompile.runtime.graphs import Graphs, Outcome
from dicompile.runtime.identify import Place, Signature, identify
from dicompile.runtime.invariants import Doubt, Kept, Tables, laid_out
from dicompile.runtime.observe import Observer, Seen, Watch
from dicompile.runtime.owner import Owner
from dicompile.runtime.report import MIXED, RECALLED, UNCACHED
from dicompile.runtime.rows import Batch, Group, Part, picked, put_together
from dicompile.runtime.session import ModelState, Session, current_session
from dicompile.runtime.split import Ran, Split, grouped, slots_after
from dicompile.runtime.steps import GatedStep, Step, StepSource, Warmup, gate_of, not_written
from dicompile.runtime.storage import Lane, SharedSupply, Supply, lane_for, names_of, needed, run_calls

log = logging.getLogger("dicompile")

TOGETHER = threading.RLock()
"""Held while a call gathers weights: what threads gather in turns, another rank would take for something else."""

Load = Callable[..., Doubt | None]
"""Loads what is computed outside of the steps: with or without doubts, for the first time or again."""


class Executor:
    """Compiled code for one set of input shapes.

    Args:
        steps: where steps come from.
        signature: what its inputs are.
        seed: of random scores.
        predictor: importance of the tokens in every block at a step, from the model's inputs; float32, [b, n, blocks].
        constants: values of the last inputs, the same for every call.
        tables: of what is computed outside of the steps, or None.
        offload: whether slots are in host memory between the calls that use them.
        check: whether every read is held against the plan (see `dicompile.runtime.stamps`).
        warmup: what runs before steps are compiled; None if they are compiled when they are first wanted.
        graphs: makes a place for steps that are recorded as CUDA graphs; None if they are not.
        observer: who is shown what the steps write.
        adapters: LoRA weights that programs load, by name.
    """

    def __init__(  # noqa: PLR0913 - named one by one
        self,
        steps: StepSource,
        signature: Signature,
        *,
        seed: int = 0,
        predictor: Callable[[Sequence[Any], int], torch.Tensor] | None = None,
        constants: Sequence[torch.Tensor] = (),
        tables: Tables | None = None,
        offload: bool = False,
        check: bool = False,
        warmup: Warmup | None = None,
        graphs: Callable[[], Graphs] | None = None,
        observer: Observer | None = None,
        adapters: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.steps, self.signature, self.warmup = steps, signature, warmup
        self.graphs, self.observer = graphs, observer
        self.seed, self.predictor, self.offload, self.check = seed, predictor, offload, check
        self.constants, self.tables, self.adapters = tuple(constants), tables, adapters

    def run(self, owner: Owner, inputs: Sequence[Any], batch: Batch | None = None) -> Sequence[Any]:
        """Run one call of a model; returns its outputs.

        Args:
            owner: the model.
            inputs: of the code, but for its constants; `Parked` in the place of weights that lie elsewhere.
            batch: its rows, where the policy tells them apart.
        """
        inputs = (*inputs, *self.constants)
        session = current_session().serving(owner.link)
        state = session.state_of(owner)
        try:
            with torch.no_grad(), torch._C._DisableAutocast():  # its casts are part of the code
                place = identify(self.signature, owner, session, inputs)
                place.batch = batch
                step = self._step(state, owner, place)
                found = self._run(owner, state, place, step, inputs, session)
            if not isinstance(found, Split):
                return found
            assert batch is not None
            parts = [batch.part(group.rows or ()) for group in found.groups]  # code for calls like the caller's
            with torch.no_grad(), torch._C._DisableAutocast():
                return self._run_split(state, place, found, parts)
        except BaseException:
            state.begin(None)
            raise

    def _step(self, state: ModelState, owner: Owner, place: Place) -> Step | GatedStep:
        if place.context is None:
            whole = owner.link.planned  # a run of one step computes everything and stores nothing
            schedule, index = whole.rest(whole.steps - 1), 0
        else:
            schedule, index = place.context.schedule, place.step - place.context.schedule.before
        if self.warmup is not None and self._is_uncached(self.warmup, state, place.context, schedule):
            return self.warmup.uncached
        return self.steps.step(schedule, index)

    @staticmethod
    def _is_uncached(
        warmup: Warmup, state: ModelState, context: ContextState | None, schedule: TimestepSchedule
    ) -> bool:
        """True while code is compiled, and from then on until the generation ends: a context goes on as it began."""
        began = state if context is None or context.step is None else context
        if warmup.is_ready(schedule) and not began.is_uncached:
            return False
        state.is_uncached = True
        if context is not None:
            context.is_uncached = True
        return True

    def _run(
        self,
        owner: Owner,
        state: ModelState,
        place: Place,
        step: Step | GatedStep,
        inputs: Sequence[Any],
        session: Session,
    ) -> Sequence[Any] | Split:
        context, batch = place.context, place.batch
        registers: list[Any] = [*inputs, *[None] * (step.program.registers - len(inputs))]
        try:
            supply = _supply_of(registers, step)
            if batch is not None and context is not None and (gate := gate_of(step)) is not None:
                context.split(batch.rows, batch.rows if gate.leads else gate.unit)
            partner, call = self._partner(state, place, step), (owner, state, place)
            is_paired = partner is not None or self._has_both(place, step)
            if isinstance(step, GatedStep):
                hoisted = None if step.probe is None else self._run_to_probe(*call, step, registers, supply)
                groups = self._decided(state, place, step, registers, is_paired=is_paired)
                if len(groups) > 1:
                    if hoisted is None:
                        hoisted = self._hoisted(*call, step, registers, supply)
                    return Split(step, groups, hoisted, is_paired)
                step = step.recalled if groups[0].recalls else step.full
            drift = None if context is None else context.drift
            self._load(registers, step, inputs, place, drift)
            for register in step.program.partners:
                registers[register] = self._nobody(place) if partner is None else partner
            load = self._loading(state, owner, step.program.invariants, registers, place.step, supply)
            watch = self._watch(state, place, step, owner.link.schedule, inputs, supply)
            is_uncached = self.warmup is not None and step is self.warmup.uncached
            if self.graphs is None or is_uncached:
                outcome = self._compute(state, place, step, registers, load, watch, session, supply)
            else:
                load()  # a recording stores when it runs, so it cannot run twice
                graphs = owner.graphs_of(self, self.graphs)
                outcome, how = self._replay(graphs, state, context, step, registers, keep_chosen=session.keep_chosen)
                state.report.record(how, owner.graph_bytes)
            if context is not None:
                self._keep(state, place, context, [(sample, step) for sample in context.samples], is_paired=is_paired)
                context.chosen = outcome.chosen
            kind = UNCACHED if is_uncached else step.kind
            state.report.count(kind, state.cache_bytes, 0 if supply is None else supply.bytes)
            if self.signature.remembers and watch is None and place.is_last and step.planned.sites:
                _end(state, step.plan.policy)
            return outcome.results
        finally:
            registers.clear()  # the traceback of an error may hold on to this frame

    @staticmethod
    def _nobody(place: Place) -> torch.Tensor:
        """What stands in for the output of a partner who was not there; what is made of it is not recalled."""
        assert place.call.latent is not None
        return torch.zeros_like(place.call.latent)

    @staticmethod
    def _partner(state: ModelState, place: Place, step: Step | GatedStep) -> torch.Tensor | None:
        """What the guidance partner after whom this call may recall has returned at this step, if it was there."""
        gate = gate_of(step)
        if gate is None or not gate.leads or gate.halves or place.context is None or place.call.latent is None:
            return None
        latent, found = Given.of(place.call.latent), []
        for other in state.contexts.values():
            if other.name == gate.leads and other is not place.context and other.drift.result is not None:
                result, given = other.drift.result
                if other.step == place.step and other.drift.full[:1] == (place.step,) and given.is_same(latent):
                    found.append(result)
        return found[0] if len(found) == 1 and place.context.name != gate.leads else None

    def _decided(
        self, state: ModelState, place: Place, step: GatedStep, registers: list[Any], *, is_paired: bool
    ) -> tuple[Group, ...]:
        """How the rows of a step go on, as its gate decides. This is the one place that waits for the device."""
        context = place.context
        assert context is not None
        gate, drifts = step.full.plan.gate, [sample.drift for sample in context.samples]
        assert gate is not None
        share = (place.step + 1) / step.full.plan.schedule.whole
        if step.probe is not None:
            decisions = self._compared(state, place, step, registers)
        elif gate.verifies:
            decisions = decide(gate, drifts, [drift.missed(gate) for drift in drifts], share)
        else:
            decisions = [drift.wait(gate, is_there=is_paired) for drift in drifts]
        for i, (drift, decision) in enumerate(zip(drifts, decisions, strict=True)):
            drift.take(decision)
            state.report.decide(decision if len(drifts) == 1 else replace(decision, sample=i))
        if gate.leads and gate.halves and decisions[0].recalls:
            assert place.batch is not None
            lead, other = map(tuple, gate.leading(place.batch.rows))
            return Group(context.samples, recalls=False, rows=lead), Group(context.samples, recalls=True, rows=other)
        return grouped(context.samples, [decision.recalls for decision in decisions], step, gate)

    def _run_to_probe(
        self,
        owner: Owner,
        state: ModelState,
        place: Place,
        step: GatedStep,
        registers: list[Any],
        supply: Supply | None,
    ) -> dict[str, Any]:
        """Run a step until what its gate watches is there; what it needs from outside of the steps, by name."""
        invariants = step.program.invariants
        load = self._loading(state, owner, invariants, registers, place.step, supply)
        doubt = load(may_doubt=True)
        before = registers.copy()
        run_calls(step.program, registers, None, supply=supply)
        if doubt is not None and doubt.is_justified:
            registers[:] = before
            load(is_again=True)
            before = registers.copy()
            run_calls(step.program, registers, None, supply=supply)
        return {name: before[number] for name, number in invariants}

    def _compared(self, state: ModelState, place: Place, step: GatedStep, registers: list[Any]) -> list[Decision]:
        """What a gate decides by what it watches."""
        context, batch, gate = place.context, place.batch, step.full.plan.gate
        assert context is not None
        assert gate is not None
        assert step.probe is not None
        number, register = step.probe
        samples, store = context.samples, context.store

        def rows(value: torch.Tensor | None, slot: int, sample: Sample) -> torch.Tensor:
            if value is None:
                raise not_written(step.full.slots[slot])
            return value if batch is None else batch.picked(value, sample.rows)

        known = state.decided_at(place.step) if gate.partners == "first" else None
        first = known if known is not None and len(known) == len(samples) else (None,) * len(samples)
        moved: list[torch.Tensor | Decision] = []
        for sample, one in zip(samples, first, strict=True):
            if self.check:
                sample.stamps.check([number, *step.trace[0]], store, step.full, state.generation)
            reference = rows(store[number] if store else None, number, sample)
            moved.append(sample.drift.moved(gate, rows(registers[register], number, sample), reference, one))
        share = (place.step + 1) / step.full.plan.schedule.whole
        decisions = decide(gate, [sample.drift for sample in samples], moved, share)
        state.decided = place.step, known or tuple(decisions)
        for sample, decision in zip(samples, decisions, strict=True):
            if decision.recalls and step.trace[0]:
                assert step.aligned is not None
                stored = [rows(store[n], n, sample) for n in step.trace[0]]
                sample.drift.align(step.aligned, rows(registers[step.trace[1]], step.trace[0][0], sample), stored)
        return decisions

    @staticmethod
    def _has_both(place: Place, step: Step | GatedStep) -> bool:
        """True if the call has both guidance halves, of the same latents; waits for the device where it may have."""
        gate, latent = gate_of(step), place.call.latent
        if gate is None or not (gate.leads and gate.halves) or latent is None or place.context is None:
            return False
        return bool(torch.equal(*latent.chunk(2)))

    def _hoisted(
        self,
        owner: Owner,
        state: ModelState,
        place: Place,
        step: GatedStep,
        registers: list[Any],
        supply: Supply | None,
    ) -> dict[str, Any]:
        """What either way of a step needs from outside of the steps, by name, where nothing runs before its gate."""
        ways = dict((*step.recalled.program.invariants, *step.full.program.invariants))
        self._loading(state, owner, tuple(ways.items()), registers, place.step, supply)()
        return {name: registers[number] for name, number in ways.items()}

    def _run_split(self, state: ModelState, place: Place, split: Split, parts: Sequence[Part]) -> Sequence[Any]:
        """Run the groups of rows of a step, each as a call of its own, and put together what they leave."""
        context, batch, step = place.context, place.batch, split.step
        assert context is not None
        assert batch is not None
        ran: list[Ran] = []
        for group, part in zip(split.groups, parts, strict=True):
            ran.append(self._run_part(state, place, split, group, part, ran[0].left if ran else None))
        results = [
            put_together([(one.group.rows or (), value) for one, value in zip(ran, values, strict=True)], batch.rows)
            if isinstance(values[0], torch.Tensor) and values[0].ndim
            else values[0]
            for values in zip(*(one.results for one in ran), strict=True)
        ]
        if step.full.is_led:  # the half that leads stores nothing, and the other one recalls
            ended = [(sample, step.recalled) for sample in context.samples]
            context.store = [None if source is None else context.store[source] for source in step.recalled.moves]
            self._keep(state, place, context, ended, is_paired=split.is_paired)
        else:
            ended = [(sample, one.step) for one in ran for sample in one.group.samples]
            context.store, copied = slots_after(ran, context.store, batch)
            self._keep(state, place, context, ended, copied=copied)
        is_mixed = not step.full.is_led and len({one.group.recalls for one in ran}) > 1
        state.report.count(MIXED if is_mixed else RECALLED, state.cache_bytes, sum(one.fetched for one in ran))
        if place.is_last:
            _end(state, step.full.plan.policy)
        return results

    def _run_part(
        self,
        state: ModelState,
        place: Place,
        split: Split,
        group: Group,
        part: Part,
        led: torch.Tensor | None,
    ) -> Ran:
        """Run some rows of a step, from its beginning.

        Args:
            state: of the model.
            place: of the call.
            split: the step.
            group: the rows.
            part: the rows as a call of their own.
            led: what the guidance half that leads has returned, for the one that follows.
        """
        context, batch, executor, sample = place.context, place.batch, part.executor, group.samples[0]
        assert context is not None
        assert batch is not None
        whole = split.step.recalled if group.recalls else split.step.full
        gated = executor.steps.planned_for_others(whole.plan, whole.index)
        assert isinstance(gated, GatedStep)
        step = gated.recalled if group.recalls else gated.full
        inputs = (*part.inputs, *executor.constants)
        registers: list[Any] = [*inputs, *[None] * (gated.program.registers - len(inputs))]
        supply = _supply_of(registers, gated)
        rows = group.rows or ()
        try:
            for name, register in (*gated.program.invariants, *step.program.invariants):
                assert executor.tables is not None
                item, value = executor.tables.invariants[name], split.hoisted[name]
                is_shared = tuple(value.shape) == item.shape
                registers[register] = value if is_shared else laid_out(picked(value, rows, batch.rows), item)
            run_calls(gated.program, registers, None, supply=supply)
            executor._load(registers, step, inputs, place, sample.drift)
            for _, register, content, _ in self._read(state, context, whole, group.samples, step.reads):
                registers[register] = picked(content, rows, batch.rows)
            for register in step.program.partners:
                latent = executor.signature.tensor(inputs, executor.signature.latent)
                assert latent is not None
                registers[register] = torch.zeros_like(latent) if led is None else led
            run_calls(step.program, registers, None, supply=supply)
            self._verify(step, group, registers, batch, supply)
            if step.anchors and not step.is_led:
                self._measure(state, context, step, group, registers, batch)
            for register in step.stored_copies:
                registers[register] = registers[register].clone()
            return Ran(
                group,
                whole,
                step.outputs(registers),
                {i: registers[~source] for i, source in enumerate(step.moves) if source is not None and source < 0},
                registers[step.anchors[0][1]] if step.is_led and step.anchors else None,
                0 if supply is None else supply.bytes,
            )
        finally:
            registers.clear()  # as in `_run`

    def _loading(
        self,
        state: ModelState,
        owner: Owner,
        reads: Sequence[tuple[str, int]],
        registers: list[Any],
        number: int,
        supply: Supply | None,
    ) -> Load:
        """What loads values that are computed outside of the steps; see `Tables.load`."""

        def load(**how: bool) -> Doubt | None:
            if not reads:
                if supply is not None:
                    supply.agree(())
                return None
            assert self.tables is not None
            kept = state.tables.setdefault(self, Kept())
            doubt = self.tables.load(reads, registers, kept, owner.link.schedule, number, supply=supply, **how)
            state.report.hoist(sum(each.bytes for each in state.tables.values()))
            return doubt

        return load

    def _compute(
        self,
        state: ModelState,
        place: Place,
        step: Step,
        registers: list[Any],
        load: Load,
        watch: Watch | None,
        session: Session,
        supply: Supply | None,
    ) -> Outcome:
        """Run a step call by call; once more, if its timestep was not the one that was foretold."""
        context = place.context
        if context is not None:
            self._load_slots(state, context, step, registers)
        lane = self._lane(place.call.latent)
        needs_others = supply is not None and supply.needs_others
        with TOGETHER if needs_others else contextlib.nullcontext():
            doubt = load(may_doubt=lane is None and step.is_repeatable and not needs_others)
            before = [] if doubt is None else registers.copy()
            if session.run_step is None:
                run_calls(step.program, registers, lane, watch, supply)
            else:
                session.run_step(step, registers)
            if doubt is not None and doubt.is_justified:
                registers[:] = before
                load(is_again=True)
                run_calls(step.program, registers, lane, supply=supply)
        group = None if context is None else Group(context.samples)
        if group is not None:
            self._verify(step, group, registers, place.batch, supply)
        results, chosen = step.outputs(registers), step.chosen(registers) if session.keep_chosen else {}
        if watch is not None:
            results = watch.end(results)
        if context is not None and group is not None and step.anchors and not step.is_led:
            self._measure(state, context, step, group, registers, place.batch)
        outcome = Outcome(results, chosen, [] if context is None else step.contents(registers, context.store))
        if context is not None:
            context.store = outcome.store
            if step.anchors and step.has_both:
                _take_difference(step, context.store, registers[step.anchors[0][1]])
            elif step.anchors and step.is_led and place.call.latent is not None:
                context.drift.result = registers[step.anchors[0][1]], Given.of(place.call.latent)
        return outcome

    @staticmethod
    def _verify(step: Step, group: Group, registers: list[Any], batch: Batch | None, supply: Supply | None) -> None:
        """Compare what some rows have recalled with what they would have computed, if that is due."""
        check, gate = step.verification, step.plan.gate
        drift = group.samples[0].drift
        if check is None or gate is None or not gate.is_verified(drift.run, drift.recalled):
            return
        run_calls(check.program, registers, None, supply=supply)
        for sample in group.samples:
            places, count = group.places(sample), group.count(batch)
            both = (registers[check.recalled], registers[check.computed])
            sample.drift.verify(*(value if places is None else picked(value, places, count) for value in both))

    def _measure(
        self,
        state: ModelState,
        context: ContextState,
        step: Step,
        group: Group,
        registers: Sequence[Any],
        batch: Batch | None,
    ) -> None:
        """Compare a full step with the one before it, for a gate that wants to know how far the output moves."""
        store, numbers = context.store, [number for number, _ in step.anchors]
        is_first = not store or store[numbers[0]] is None
        now = [registers[register] for _, register in step.anchors]
        before = [] if is_first else [cast("torch.Tensor", store[number]) for number in numbers]
        for sample in group.samples:
            if self.check and not is_first:
                sample.stamps.check(numbers, store, step, state.generation)
            own, old = now, before
            if batch is not None and sample.rows is not None:
                places, count = group.places(sample) or (), group.count(batch)
                own = [picked(value, places, count) for value in now]
                old = [picked(value, sample.rows, batch.rows) for value in before]
            sample.drift.measure(Anchors(*own), Anchors(*old) if old else None)

    def _replay(
        self,
        graphs: Graphs,
        state: ModelState,
        context: ContextState | None,
        step: Step,
        registers: list[Any],
        *,
        keep_chosen: bool,
    ) -> tuple[Outcome, str]:
        """Run a step as a whole, if it was recorded; and how it ran."""
        given = tuple(registers)
        with graphs.turn():
            if context is not None:
                self._load_slots(state, context, step, registers)
            outcome, how = graphs.run(step, registers, context, keep_chosen=keep_chosen)
            if context is not None:
                context.store = outcome.store
        del given  # not before the caller's stream waits for what read it
        return outcome, how

    def _load_slots(self, state: ModelState, context: ContextState, step: Step, registers: list[Any]) -> None:
        for number, register, content, stays in self._read(state, context, step, context.samples, step.reads):
            registers[register] = content
            if not stays:
                context.store[number] = None

    def _read(
        self,
        state: ModelState,
        context: ContextState,
        step: Step,
        samples: Sequence[Sample],
        reads: Sequence[tuple[int, int, bool]],
    ) -> list[tuple[int, int, torch.Tensor, bool]]:
        """What a step reads, as `Step.reads`, with the contents of the slots, for all rows.

        Args:
            state: of the model.
            context: of the call.
            step: as it is planned.
            samples: that do it.
            reads: of the code that runs.
        """
        store, found = context.store, []
        missing = self._newer(context, step, samples[0].drift) if step.is_recall and store else {}
        for sample in samples if self.check else ():
            sample.stamps.check([n for n, _, _ in reads if n not in missing], store, step, state.generation)
        for number, register, stays in reads:
            content = missing[number] if number in missing else store[number] if store else None
            if content is None:
                raise not_written(step.slots[number])
            found.append((number, register, content, stays))
        return found

    @staticmethod
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

    def _keep(
        self,
        state: ModelState,
        place: Place,
        context: ContextState,
        done: Sequence[tuple[Sample, Step]],
        *,
        is_paired: bool = False,
        copied: Collection[int] = (),
    ) -> None:
        """Note that a call of a context is done, and what its slots hold now.

        Args:
            state: of the model.
            place: of the call.
            context: of the call.
            done: what every sample did.
            is_paired: a guidance partner was there.
            copied: see `Stamps.advance`.
        """
        step = done[0][1]
        context.held = step.held
        if step.plan.gate is not None:  # which may have let less be stored than the plan has room for
            there = (slot for slot, value in zip(step.slots, context.store, strict=True) if value is not None)
            context.held = sum(step.plan.slot_bytes[slot] for slot in there)
        for sample, own in done:
            if own.plan.gate is not None:
                sample.drift.follow(place.step, recalls=own.is_recall)
                sample.drift.is_paired = is_paired
            if self.check:
                anew = copied if context.buffers is None else own.moved
                sample.stamps.advance(own, context.store, state.generation, copied=anew)
        context.follow(place.call, place.step)
        if place.is_last:
            context.forget()  # nothing goes on from here

    def _load(self, registers: list[Any], step: Step, inputs: Sequence[Any], place: Place, drift: Drift | None) -> None:
        """Fill the registers of everything that no call computes and no slot holds."""
        program, sites, number = step.program, step.planned.sites, place.step
        full = drift.full if drift is not None and step.is_recall else ()
        for item in program.ints:
            site = sites[item.site]
            registers[item.register] = site.action.tokens.count if item.is_count and site.action.tokens else site.clock
        latent = self.signature.tensor(inputs, self.signature.latent)
        device = torch.device("cpu") if latent is None else latent.device
        for noise in program.noise:
            registers[noise.register] = self._noise(noise.shape, noise.share_guidance, number, int(noise.site), device)
        for weights in program.weights:
            if sites[weights.site].action.is_aligned:
                assert drift is not None
                registers[weights.register] = drift.weights
            else:
                registers[weights.register] = _on_device(step.weights(weights.site, number, full), device)
        for name, register in program.adapters:
            registers[register] = self.adapters[name]
        if program.predicted:
            assert self.predictor is not None
            importance = self.predictor(inputs, number)
            for predicted in program.predicted:
                registers[predicted.register] = importance[..., predicted.block].contiguous()

    def _tried(self, place: Place, step: Step, inputs: Sequence[Any], supply: Supply | None) -> dict[str, list[Any]]:
        """What the call would have returned, had it reused what the step before has stored, by kind of reuse."""
        assert place.context is not None
        if not place.context.store:
            return {}
        stored = dict(zip(step.slots, place.context.store, strict=True))
        found = {}
        for kind, trial in self.steps.trials.items():
            program = trial.program
            registers: list[Any] = [*inputs, *[None] * (program.registers - len(inputs))]
            for slot, register in program.reads:
                registers[register] = stored[slot]
            self._load(registers, trial, inputs, place, place.context.drift)
            run_calls(program, registers, None, supply=supply)
            found[kind] = trial.outputs(registers)
        return found

    def _watch(
        self,
        state: ModelState,
        place: Place,
        step: Step,
        whole: TimestepSchedule,
        inputs: Sequence[Any],
        supply: Supply | None,
    ) -> Watch | None:
        """What shows this call to the observer, if there is one and the call belongs to a step."""
        if self.observer is None or place.context is None:
            return None
        label = state.contexts.label_of(place.context)
        call = Seen(state.generation, label, place.step, whole, place.call.latent)
        kept = frozenset(~source for source in step.moves if source is not None)
        return Watch(
            self.observer, call, step.program.writes, kept, functools.partial(self._tried, place, step, inputs, supply)
        )

    def _lane(self, latent: torch.Tensor | None) -> Lane | None:
        """How slots go to host memory and back; None where they stay."""
        return None if not self.offload or latent is None else _lane_of(latent.device)

    def _noise(self, shape: tuple[int, int], share: bool, step: int, site: int, device: torch.device) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(hash((self.seed, step, site)) & 0x7FFFFFFF)
        batch, tokens = shape
        drawn = torch.rand(batch // 2 if share else batch, tokens, generator=generator, device=device)
        return torch.cat([drawn, drawn]) if share else drawn


def _end(state: ModelState, policy: str) -> None:
    """A call of the last step is done: if nothing of the run could be reused, that is said, once."""
    was_told = bool(state.report.unapplied)
    state.report.end(policy)
    if state.report.unapplied and not was_told:
        log.warning("nothing was reused in a whole run: %s", state.report)


def _take_difference(step: Step, store: list[torch.Tensor | None], output: torch.Tensor) -> None:
    """Store what one guidance half of an output differs by from the other, in the place of the whole output.

    Rows of the half that leads have a difference as well, which nobody reads.
    """
    for number, slot in enumerate(step.slots):
        if slot.kind is SlotKind.VALUE and step.planned.sites[slot.site].action.what is What.DIFFERENCE:
            store[number] = None if store[number] is None else output - output.roll(len(output) // 2, 0)


@functools.lru_cache(maxsize=1024)
def _on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights as a tensor, copied to the device once: every later generation finds them there."""
    with torch.inference_mode(mode=False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


@functools.cache
def _lane_of(device: torch.device) -> Lane | None:
    return lane_for(device)


def _supply_of(registers: Sequence[Any], step: Step | GatedStep) -> Supply | None:
    """What brings the weights among the inputs of a call that lie elsewhere; None if all are there."""
    if Parked not in map(type, registers):  # of thousands, at every call
        return None
    home = next(value.home for value in registers if isinstance(value, Parked))
    if home.sharding is None:
        return Supply(_lane_of(home.device))
    assert isinstance(step, Step)  # no gate decides where weights are gathered
    kinds = " ".join(planned.kind for planned in step.plan.steps)
    reads = (names_of([registers[i] for i in call]) for call in needed(step.program, registers))
    told = f"this rank: step {step.index + 1} of {len(step.plan.steps)} of policy {step.plan.policy}"
    return SharedSupply(home.sharding, "\n".join([kinds, *reads]), told)
