"""Which step, and which context of it, is this call?"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dicompile.runtime.clock import OutsideSchedule, SchedulerLink, find_step
from dicompile.runtime.contexts import Call, ContextState
from dicompile.runtime.given import Given
from dicompile.runtime.owner import Owner
from dicompile.runtime.rows import Batch
from dicompile.runtime.session import Count, Lead, ModelState, Session, current_context

log = logging.getLogger("dicompile")


@dataclass(frozen=True)
class Signature:
    """What the inputs of compiled code are, as far as they tell one call from another.

    Attributes:
        timestep: position of the timestep, or None.
        latent: position of the latent, or None.
        conditioning: positions of the inputs that tell guidance partners apart, by name.
        signals: names of those among them that change with the step for everybody.
        geometry: shapes of the inputs, and the structure that they lead to.
        way: see `Call`.
        remembers: whether anything is remembered at all.
        counts_calls: the user said that every call is a step.
    """

    timestep: int | None = None
    latent: int | None = None
    conditioning: tuple[tuple[str, int], ...] = ()
    signals: frozenset[str] = frozenset()
    geometry: object = None
    way: object = None
    remembers: bool = True
    counts_calls: bool = False

    def tensor(self, inputs: Sequence[Any], position: int | None) -> torch.Tensor | None:
        """The tensor at a position, if there is one."""
        value = None if position is None else inputs[position]
        return value if isinstance(value, torch.Tensor) else None

    def call(self, inputs: Sequence[Any]) -> Call:
        """What tells this call apart."""
        given = {name: Given.of(inputs[i]) for name, i in self.conditioning if isinstance(inputs[i], torch.Tensor)}
        latent = self.tensor(inputs, self.latent)
        return Call(current_context(), self.geometry, self.way, given, self.signals, latent)


@dataclass
class Place:
    """Where a call stands.

    Attributes:
        call: what tells it apart.
        step: of the whole schedule.
        context: that it continues or opens; None where nothing may be remembered of it.
        is_last: it is at the last step of the schedule.
        batch: its rows, where the policy tells them apart.
    """

    call: Call
    step: int
    context: ContextState | None
    is_last: bool = False
    batch: Batch | None = None


def identify(signature: Signature, owner: Owner, session: Session, inputs: Sequence[Any]) -> Place:
    """Find the place of a call; begins new generations, and releases what no later call can continue.

    Args:
        signature: of the compiled code.
        owner: the model.
        session: whose call it is.
        inputs: of the compiled code.

    Raises:
        CallOutsideSchedule: the timestep is not on the schedule, there are more steps than it has, or this step is
            another denoiser's.
    """
    state = session.state_of(owner)
    call = signature.call(inputs)
    lead = session.leads.get(owner.link) if signature.timestep is None else None
    if lead is not None and lead.owner() is not owner:
        return _follow(state, session, owner, call, lead)
    try:
        step = _step(signature, state, owner, session, call, inputs)
    except OutsideSchedule as outside:
        state.contexts.forget()
        if not state.report.outside and signature.remembers:
            log.warning("computed whole, and nothing is remembered: %s", outside)
        state.report.outside += signature.remembers
        return Place(call, 0 if state.step is None else state.step, None)
    owner.link.check_served(step)
    is_last = step + 1 >= owner.link.schedule.steps
    if step != state.step:
        _advance(state, session, owner.link, step)
    if not signature.remembers:
        return Place(call, step, None, is_last)
    state.calls.add(call.name)
    context = state.contexts.find(call, step) or _opened(state, owner.link, call, step)
    if signature.timestep is not None and context is not None:
        label = state.contexts.label_of(context)
        session.leads[owner.link] = Lead(weakref.ref(owner), state.generation, step, label, state.schedule_token)
    return Place(call, step, context, is_last)


def _step(
    signature: Signature, state: ModelState, owner: Owner, session: Session, call: Call, inputs: Sequence[Any]
) -> int:
    link = owner.link
    if signature.timestep is None and owner.has_time and signature in owner.constant:
        step = owner.constant[signature]
        if state.step is not None and step < state.step:
            state.begin(link.token)
        state.timestep = None
        return step
    count = session.counts.get(link)
    ahead = count if count is not None and count.owner() is not owner else None
    time = None if signature.timestep is None else inputs[signature.timestep]
    step = find_step(state, link, time, call.name, call.latent, ahead)
    if signature.timestep is None:
        may_have_one = signature.remembers and signature.conditioning and not signature.counts_calls
        if may_have_one and not (owner.constant or owner.has_time):
            log.warning("no input of this graph is known to be its timestep: every call counts as a step")
        owner.constant[signature] = step
    else:
        owner.has_time = True
    if state.timestep is not None and not link.schedule.timesteps:
        session.counts[link] = Count(weakref.ref(owner), step, state.timestep, state.direction)
    return step


def _opened(state: ModelState, link: SchedulerLink, call: Call, step: int) -> ContextState | None:
    if step != state.first_step:
        why = state.contexts.why_new(call, step)
        state.report.start_cold(step, why)
        log.info("step %d computes everything: nothing is stored for it in this run: %s", step, why)
    return state.contexts.open(call, step, link.rest(step))


def _follow(state: ModelState, session: Session, owner: Owner, call: Call, lead: Lead) -> Place:
    """Place of a call that is part of one whose step is known."""
    if state.generation != lead.generation:
        state.begin(lead.schedule_token)
        state.generation = lead.generation
    if state.step != lead.step:
        _advance(state, session, None, lead.step)
    label = lead.next_label(owner)
    context = state.contexts.get(label)
    if context is None or context.step != lead.step - 1 or context.geometry != call.geometry:
        if context is not None:
            context.forget()
        context = ContextState(call.name, call.geometry, owner.link.rest(lead.step))
        state.contexts[label] = context
    return Place(call, lead.step, context, lead.step + 1 >= owner.link.schedule.steps)


def _advance(state: ModelState, session: Session, link: SchedulerLink | None, step: int) -> None:
    state.calls.clear()
    if state.step is None:
        state.first_step = state.report.began = step
    state.contexts.next_step(step - 1)
    state.report.hold(state.cache_bytes)
    if link is not None and link.is_live:
        session.leave(state.schedule_token, step - 1)
    state.step = step
