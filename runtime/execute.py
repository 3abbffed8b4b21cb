"""One call of compiled code: find its place, run the program of that step, keep what the plan keeps.

The code is a pure function of inputs and slots; everything that is remembered lies in the session.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from dicompile.lazy import resolved
from dicompile.plan import TimestepSchedule
from dicompile.runtime.gated import has_both, leave_output, measure, nobody, partner_of, verify, way_of
from dicompile.runtime.graphs import Graphs, Outcome
from dicompile.runtime.identify import Signature, identify
from dicompile.runtime.invariants import Tables
from dicompile.runtime.observe import Observer, Seen, Watch
from dicompile.runtime.owner import Owner
from dicompile.runtime.parts import run_split
from dicompile.runtime.report import UNCACHED
from dicompile.runtime.rows import Batch, Group
from dicompile.runtime.session import ModelState, current_session
from dicompile.runtime.slots import keep, load_slots
from dicompile.runtime.split import Split
from dicompile.runtime.steps import GatedStep, Step, StepSource, Warmup, gate_of
from dicompile.runtime.storage import run_calls
from dicompile.runtime.values import load_tables, load_values
from dicompile.runtime.work import Work

log = logging.getLogger("dicompile")

TOGETHER = threading.RLock()
"""Held while a call gathers weights: what threads gather in turns, another rank would take for something else."""


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
        lazy: numbers of inputs whose memory does not hold their values, see `dicompile.lazy`.
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
        lazy: Sequence[int] = (),
    ) -> None:
        self.steps, self.signature, self.warmup = steps, signature, warmup
        self.graphs, self.observer = graphs, observer
        self.seed, self.predictor, self.offload, self.check = seed, predictor, offload, check
        self.constants, self.tables, self.adapters = tuple(constants), tables, adapters
        self.lazy = frozenset(lazy)

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
                if self.lazy:
                    inputs = tuple(resolved(v) if i in self.lazy else v for i, v in enumerate(inputs))
                work = Work(self, owner, session, state, place, inputs)
                found = self._run(work, self._step(work))
            if not isinstance(found, Split):
                return found
            assert batch is not None
            parts = [batch.part(group.rows or ()) for group in found.groups]  # code for calls like the caller's
            with torch.no_grad(), torch._C._DisableAutocast():
                results = run_split(work, found, parts)
            if place.is_last:
                _end(state, found.step.full.plan.policy)
            return results
        except BaseException:
            state.begin(None)
            raise

    def _step(self, work: Work) -> Step | GatedStep:
        """What the plan says about a call."""
        context, place = work.context, work.place
        if context is None:
            whole = work.owner.link.planned  # a run of one step computes everything and stores nothing
            schedule, index = whole.rest(whole.steps - 1), 0
        else:
            schedule, index = context.schedule, place.step - context.schedule.before
        if self.warmup is not None and _is_uncached(self.warmup, work, schedule):
            return self.warmup.uncached
        return self.steps.step(schedule, index)

    def _run(self, work: Work, step: Step | GatedStep) -> Sequence[Any] | Split:
        """Run a step: decide which way it goes, load what it reads, compute, keep what the plan keeps."""
        context, state = work.context, work.state
        try:
            work.begin(step)
            if work.batch is not None and context is not None and (gate := gate_of(step)) is not None:
                context.split(work.batch.rows, work.batch.rows if gate.leads else gate.unit)
            partner = partner_of(work, step)
            is_paired = partner is not None or has_both(work, step)
            if isinstance(step, GatedStep):
                way = way_of(work, step, is_paired=is_paired)
                if isinstance(way, Split):
                    return way
                step = way
            load_values(work, step, None if context is None else context.drift)
            for register in step.program.partners:
                work.registers[register] = nobody(work) if partner is None else partner
            watch = self._watch(work, step)
            is_uncached = self.warmup is not None and step is self.warmup.uncached
            if self.graphs is None or is_uncached:
                outcome = self._compute(work, step, watch)
            else:
                outcome = self._replay(work, step, self.graphs)
            if context is not None:
                keep(work, [(sample, step) for sample in context.samples], is_paired=is_paired)
                context.chosen = outcome.chosen
            state.report.count(UNCACHED if is_uncached else step.kind, state.cache_bytes, work.fetched)
            if self.signature.remembers and watch is None and work.place.is_last and step.planned.sites:
                _end(state, step.plan.policy)
            return outcome.results
        finally:
            work.end()

    def _compute(self, work: Work, step: Step, watch: Watch | None) -> Outcome:
        """Run a step call by call; once more, if its timestep was not the one that was foretold."""
        context, registers, supply, invariants = work.context, work.registers, work.supply, step.program.invariants
        load_slots(work, step)
        lane = work.lane
        needs_others = supply is not None and supply.needs_others
        with TOGETHER if needs_others else contextlib.nullcontext():
            doubt = load_tables(work, invariants, may_doubt=lane is None and step.is_repeatable and not needs_others)
            before = [] if doubt is None else registers.copy()
            if work.session.run_step is None:
                run_calls(step.program, registers, lane, watch, supply)
            else:
                work.session.run_step(step, registers)
            if doubt is not None and doubt.is_justified:
                registers[:] = before
                load_tables(work, invariants, is_again=True)
                run_calls(step.program, registers, lane, supply=supply)
        if context is not None:
            group = Group(context.samples)
            verify(work, step, group)
            measure(work, step, group)
        results, chosen = step.outputs(registers), step.chosen(registers) if work.session.keep_chosen else {}
        if watch is not None:
            results = watch.end(results)
        outcome = Outcome(results, chosen, [] if context is None else step.contents(registers, context.store))
        if context is not None:
            context.store = outcome.store
            leave_output(work, step)
        return outcome

    def _replay(self, work: Work, step: Step, make: Callable[[], Graphs]) -> Outcome:
        """Run a step as a whole, if it was recorded."""
        load_tables(work, step.program.invariants)  # a recording stores when it runs, so it cannot run twice
        graphs, context, given = work.owner.graphs_of(self, make), work.context, tuple(work.registers)
        with graphs.turn():
            load_slots(work, step)
            outcome, how = graphs.run(step, work.registers, context, keep_chosen=work.session.keep_chosen)
            if context is not None:
                context.store = outcome.store
        del given  # not before the caller's stream waits for what read it
        work.state.report.record(how, work.owner.graph_bytes)
        return outcome

    def _tried(self, work: Work, step: Step) -> dict[str, list[Any]]:
        """What the call would have returned, had it reused what the step before has stored, by kind of reuse."""
        context = work.context
        assert context is not None
        if not context.store:
            return {}
        stored, found = dict(zip(step.slots, context.store, strict=True)), {}
        for kind, trial in self.steps.trials.items():
            program = trial.program
            registers = work.registers_for(program)
            for slot, register in program.reads:
                registers[register] = stored[slot]
            load_values(replace(work, registers=registers), trial, context.drift)
            run_calls(program, registers, None, supply=work.supply)
            found[kind] = trial.outputs(registers)
        return found

    def _watch(self, work: Work, step: Step) -> Watch | None:
        """What shows this call to the observer, if there is one and the call belongs to a step."""
        if self.observer is None or work.context is None:
            return None
        state, place = work.state, work.place
        label, whole = state.contexts.label_of(work.context), work.owner.link.schedule
        call = Seen(state.generation, label, place.step, whole, work.latent)
        kept = frozenset(~source for source in step.moves if source is not None)
        return Watch(self.observer, call, step.program.writes, kept, functools.partial(self._tried, work, step))


def _is_uncached(warmup: Warmup, work: Work, schedule: TimestepSchedule) -> bool:
    """True while code is compiled, and from then on until the generation ends: a context goes on as it began."""
    context, state = work.context, work.state
    began = state if context is None or context.step is None else context
    if warmup.is_ready(schedule) and not began.is_uncached:
        return False
    state.is_uncached = True
    if context is not None:
        context.is_uncached = True
    return True


def _end(state: ModelState, policy: str) -> None:
    """A call of the last step is done: if nothing of the run could be reused, that is said, once."""
    was_told = bool(state.report.unapplied)
    state.report.end(policy)
    if state.report.unapplied and not was_told:
        log.warning("nothing was reused in a whole run: %s", state.report)
