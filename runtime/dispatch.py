"""One call of the model: find the step, run its program, keep what the plan keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dicompile.errors import StaleRead
from dicompile.lower import Constant, Program
from dicompile.plan import HISTORIC, Plan, Slot, StepPlan, TimestepSchedule
from dicompile.runtime.clock import SchedulerLink, find_step, same_latent
from dicompile.runtime.partners import Conditioning, Given, new_label
from dicompile.runtime.session import ContextState, Lead, ModelState, Session, current_context, current_session
from dicompile.runtime.storage import Lane, lane_for, run_calls

log = logging.getLogger("dicompile")


class ProgramSource(Protocol):
    """Plans and programs by schedule and step; made on demand."""

    def plan(self, schedule: TimestepSchedule) -> Plan:
        """The plan for a schedule."""
        ...

    def step(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        """What to run at a step."""
        ...

    def cold(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        """What to run at a step when nothing is remembered."""
        ...


class Executor:
    """A compiled model for one set of input shapes.

    Args:
        programs: where programs come from.
        link: where the schedule comes from.
        timestep: position of the timestep among the inputs, or None.
        latent: position of the latent among the inputs, or None.
        seed: of random scores.
        predictor: importance of the tokens in every block at a step, from the model's inputs; float32, [b, n, blocks].
        offload: whether slots are in host memory between the calls that use them.
        conditioning: positions of the inputs that tell guidance partners apart.

    Attributes:
        check: whether every read is held against the plan (see `dicompile.runtime.stamps`).
    """

    def __init__(
        self,
        programs: ProgramSource,
        link: SchedulerLink,
        timestep: int | None,
        latent: int | None,
        seed: int = 0,
        predictor: Callable[[Sequence[Any], int], torch.Tensor] | None = None,
        offload: bool = False,
        *,
        conditioning: Sequence[int] = (),
    ) -> None:
        self.programs, self.link, self.seed, self.predictor = programs, link, seed, predictor
        self.offload = offload
        self.check = False
        self._timestep, self._latent, self._conditioning = timestep, latent, conditioning
        self._lanes: dict[torch.device, Lane | None] = {}
        self._weights: dict[tuple[tuple[float, ...], torch.device], torch.Tensor] = {}

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run one step on the model's inputs; returns its outputs."""
        session = current_session().serving(self.link)
        state = session.state_of(self)
        try:
            with torch.no_grad(), torch._C._DisableAutocast():  # its casts are part of the graph
                return self._run(session, state, inputs)
        except BaseException:
            state.begin(None)
            session.begin_others(self)
            raise

    def _run(self, session: Session, state: ModelState, inputs: Sequence[Any]) -> Sequence[Any]:
        name = current_context()
        latent = self._tensor(inputs, self._latent)
        lead = session.leads.get(self.link) if self._timestep is None else None
        given: Conditioning = {}
        if lead is not None:
            label, step = self._follow(session, state, lead), lead.step
        else:
            label, step, given = self._find(session, state, name, inputs, latent)
        context = state.contexts[label]
        schedule = self.schedule_of(state)
        planned, program = self.programs.step(schedule, step - schedule.before)
        if any(slot not in context.store for slot, _ in program.reads):
            planned, program = self.programs.cold(schedule, step - schedule.before)
            state.report.cold_starts.append(step)
            log.info("step %d computes everything: nothing is stored for it in this run", step)
        contents = _contents_after(planned, program)
        if self.check:
            sizes = self.programs.plan(schedule).slot_bytes
            context.stamps.check([slot for slot, _ in program.reads], context.store, state.generation, label, sizes)
        registers: list[Any] = [*inputs, *[None] * (program.registers - len(inputs))]
        try:
            outlasting = set(contents.values())
            for slot, register in program.reads:
                registers[register] = _take(context.store, slot, keep=slot in outlasting)
            self._load(registers, program, planned, inputs, step)
            run_calls(program, registers, self._lane(latent))
            _commit(context, contents, registers)
            context.step, context.given = step, given
            if self.check:
                context.stamps.advance(contents, context.store, planned, (state.generation, label, step))
            if session.keep_chosen:
                context.chosen = {int(site): registers[register] for site, register in program.chosen}
            state.report.kinds[planned.kind] += 1
            state.report.hold(state.cache_bytes)
            return [r.value if isinstance(r, Constant) else registers[r] for r in program.results]
        finally:
            registers.clear()  # the traceback of an error may hold on to this frame

    def _find(
        self, session: Session, state: ModelState, name: str, inputs: Sequence[Any], latent: torch.Tensor | None
    ) -> tuple[str, int, Conditioning]:
        """Guidance context, step and conditioning of a call that can tell them."""
        step = find_step(state, self.link, self._tensor(inputs, self._timestep), name, latent)
        if self._timestep is not None and session.goes_back(self.link, step):
            session.begin_others(self)
        given = {i: Given.of(inputs[i]) for i in self._conditioning if isinstance(inputs[i], torch.Tensor)}
        label = self._enter(session, state, name, step, latent, given)
        if self._timestep is not None:
            session.leads[self.link] = Lead(state.generation, step, label, state.schedule_token)
        return label, step, given

    def _follow(self, session: Session, state: ModelState, lead: Lead) -> str:
        """Guidance context of a call that is part of one whose step is known."""
        if state.generation != lead.generation:
            state.begin(lead.schedule_token)
            state.generation = lead.generation
        if state.step != lead.step:
            self._advance(session, state, lead.step, None)
        label = lead.next_label(self)
        state.contexts.setdefault(label, ContextState(label))
        return label

    def schedule_of(self, state: ModelState) -> TimestepSchedule:
        """What is planned in a generation: the schedule from the step at which it began, or all of it before."""
        whole = self.link.schedule
        is_its_own = state.schedule_token is self.link.token
        return whole.rest(state.first_step) if is_its_own and state.first_step else whole

    def _enter(
        self,
        session: Session,
        state: ModelState,
        name: str,
        step: int,
        latent: torch.Tensor | None,
        given: Conditioning,
    ) -> str:
        """Label of the guidance context of this call."""
        if step != state.step:
            self._advance(session, state, step, latent)
        elif name in state.calls and step == state.first_step and not same_latent(latent, state.latent):
            timestep, position, is_foreign = state.timestep, state.position, state.is_foreign
            state.begin(state.schedule_token)
            session.begin_others(self)
            state.timestep, state.position, state.is_foreign = timestep, position, is_foreign
            self._advance(session, state, step, latent)
        state.calls.add(name)
        before = {k: c.given for k, c in state.contexts.items() if (c.name, c.step) == (name, step - 1)}
        if name and len(before) == 1:
            return next(iter(before))
        label = state.partners.continued(given, before.items())
        if label is None:
            label = new_label(name, state.contexts)
            state.contexts[label] = ContextState(name)
        return label

    def _advance(self, session: Session, state: ModelState, step: int, latent: torch.Tensor | None) -> None:
        state.calls.clear()
        if state.step is None:
            state.first_step = state.report.began = step
        state.leave(step - 1)
        state.partners.next_step()
        if self.link.is_live:
            session.leave(state.schedule_token, step - 1)
        compared = step == state.first_step or (not self.link.is_live and self.link.schedule.is_repeated(step))
        state.latent = latent.clone() if compared and latent is not None else None
        state.step = step

    def _load(
        self, registers: list[Any], program: Program, planned: StepPlan, inputs: Sequence[Any], step: int
    ) -> None:
        """Fill the registers of everything that no call computes and no slot holds."""
        for item in program.ints:
            site = planned.sites[item.site]
            registers[item.register] = site.action.tokens.count if item.is_count and site.action.tokens else site.clock
        latent = self._tensor(inputs, self._latent)
        for noise in program.noise:
            registers[noise.register] = self._noise(noise.shape, noise.share_guidance, step, int(noise.site), latent)
        for weights in program.weights:
            registers[weights.register] = self._on_device(planned.sites[weights.site].action.weights, latent)
        if program.predicted:
            assert self.predictor is not None
            importance = self.predictor(inputs, step)
            for predicted in program.predicted:
                registers[predicted.register] = importance[..., predicted.block].contiguous()

    def _lane(self, latent: torch.Tensor | None) -> Lane | None:
        """How slots go to host memory and back; None where they stay."""
        if not self.offload or latent is None:
            return None
        if latent.device not in self._lanes:
            self._lanes[latent.device] = lane_for(latent.device)
        return self._lanes[latent.device]

    def _on_device(self, weights: tuple[float, ...], like: torch.Tensor | None) -> torch.Tensor:
        """Weights as a tensor, copied to the device once: every later generation finds them there."""
        key = weights, torch.device("cpu") if like is None else like.device
        if key not in self._weights:
            self._weights[key] = torch.tensor(weights, dtype=torch.float32, device=key[1])
        return self._weights[key]

    def _noise(
        self, shape: tuple[int, int], share: bool, step: int, site: int, like: torch.Tensor | None
    ) -> torch.Tensor:
        device = torch.device("cpu") if like is None else like.device
        generator = torch.Generator(device).manual_seed(hash((self.seed, step, site)) & 0x7FFFFFFF)
        batch, tokens = shape
        drawn = torch.rand(batch // 2 if share else batch, tokens, generator=generator, device=device)
        return torch.cat([drawn, drawn]) if share else drawn

    @staticmethod
    def _tensor(inputs: Sequence[Any], position: int | None) -> torch.Tensor | None:
        value = None if position is None else inputs[position]
        return value if isinstance(value, torch.Tensor) else None


def _contents_after(planned: StepPlan, program: Program) -> dict[Slot, Slot | int]:
    """For every slot that the plan keeps after a step: the slot that has its content before, or the register."""
    contents: dict[Slot, Slot | int] = {slot: slot for slot in planned.live}
    for slot, register in program.writes:
        if slot.kind in HISTORIC:
            for age in range(planned.sites[slot.site].history, 0, -1):
                contents[Slot.of(slot.site, slot.kind, age)] = Slot.of(slot.site, slot.kind, age - 1)
        contents[slot] = register
    return {slot: source for slot, source in contents.items() if slot in planned.live}


def _take(store: dict[Slot, torch.Tensor], slot: Slot, *, keep: bool) -> torch.Tensor:
    """Content of a slot; it leaves the store if nobody needs it after this step, so that a call can free it."""
    if slot not in store:
        raise StaleRead(f"slot {slot} was not written", where="runtime", fix="report this")
    return store[slot] if keep else store.pop(slot)


def _commit(context: ContextState, contents: dict[Slot, Slot | int], registers: Sequence[Any]) -> None:
    """Rebind slots: fresh tensors are the new entries, and what no later step reads is dropped."""
    old = context.store
    context.store = {
        slot: registers[source] if isinstance(source, int) else old[source]
        for slot, source in contents.items()
        if isinstance(source, int) or source in old
    }
