"""Who remembers: sessions hold what models remember, one generation at a time, one store per context of its calls.

Every thread and every asyncio task has a session of its own, so that they never see each other's features. An opened
session (``with dicompile.session():``) separates generations that take turns in one thread; it goes where Python's
context goes, for example to the threads of ``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dicompile.runtime.contexts import Contexts
from dicompile.runtime.gate import Decision
from dicompile.runtime.invariants import Kept
from dicompile.runtime.owner import Owner
from dicompile.runtime.report import RunReport

_GENERATIONS = itertools.count(1)
_SESSION: contextvars.ContextVar[tuple[Session, ...]] = contextvars.ContextVar("dicompile_session", default=())
_CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("dicompile_context", default="")


@dataclass
class ModelState:
    """What a session remembers of one model: one run of it, with whatever shapes.

    Attributes:
        generation: number of the generation, counted over all models; 0 before the first one.
        step: the last step of the generation.
        timestep: timestep of that step, where it had to be read.
        times: the whole of the last call's, where it was read.
        is_in_part: since then only part of the latent went on, and the largest timestep, which counts, stayed.
        direction: sign of the changes of the timestep, 0 while unknown.
        position: where the scheduler stood at the last call, if it counts.
        is_foreign: the model receives something else than the scheduler's timesteps; only its position tells the step.
        schedule_token: identity of the scheduler's timesteps when the generation began.
        calls: names of the contexts of the calls so far at this step.
        first_step: the step at which the generation began.
        is_uncached: a call of it came before its code was compiled; contexts that begin from then on run uncached.
        decided: what a gate has decided first at a step, and which.
        contexts: of its calls.
        tables: what does not depend on the latent, by compiled code.
        report: what happened.
    """

    generation: int = 0
    step: int | None = None
    timestep: float | None = None
    times: torch.Tensor | None = None
    is_in_part: bool = False
    direction: int = 0
    position: int | None = None
    is_foreign: bool = False
    schedule_token: object = None
    calls: set[str] = field(default_factory=set)
    first_step: int | None = None
    is_uncached: bool = False
    decided: tuple[int, tuple[Decision, ...]] | None = None
    contexts: Contexts = field(default_factory=Contexts)
    tables: dict[object, Kept] = field(default_factory=dict)
    report: RunReport = field(default_factory=RunReport)

    def begin(self, schedule_token: object) -> None:
        """Forget everything: a new generation starts.

        Stores are emptied, not only dropped: the traceback of an error may hold on to them.
        """
        self.contexts.forget()
        self.tables.clear()
        self.__init__()  # type: ignore[misc]
        self.generation, self.schedule_token = next(_GENERATIONS), schedule_token

    def free(self) -> None:
        """Release the slots of a generation that was left; what it did stays in the report."""
        report = self.report
        self.begin(None)
        self.report = report
        report.hold(0)

    def leave(self, before: int) -> None:
        """Release what was stored before a step: contexts that were not called since then start anew."""
        self.contexts.leave(before)
        self.report.hold(self.cache_bytes)

    def decided_at(self, step: int) -> tuple[Decision, ...] | None:
        """What a gate has decided first at a step about every sample, if one has."""
        return self.decided[1] if self.decided is not None and self.decided[0] == step else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots held now, over all contexts."""
        return sum(context.held for context in list(self.contexts.values()))


@dataclass(frozen=True, slots=True)
class Count:
    """How far a model has come on a schedule of which only the number of steps is known.

    Attributes:
        owner: the model; weakly, as it has the link under which this is kept.
        step: of its last call.
        timestep: at that step.
        direction: see `ModelState`.
    """

    owner: weakref.ref[Owner]
    step: int
    timestep: float
    direction: int


@dataclass
class Lead:
    """A call whose step is known. Where Dynamo breaks a model into several graphs, later ones have no timestep to read.

    Attributes:
        owner: of the graph that was called; weakly, see `Count`.
        generation: its generation.
        step: of the call.
        label: its guidance context.
        schedule_token: see `ModelState`.
        calls: how often each model that follows was called since.
    """

    owner: weakref.ref[Owner]
    generation: int
    step: int
    label: str
    schedule_token: object
    calls: weakref.WeakKeyDictionary[Owner, int] = field(default_factory=weakref.WeakKeyDictionary)

    def next_label(self, owner: Owner) -> str:
        """Context of the next call of a graph that follows; blocks of one graph take turns in it."""
        count = self.calls[owner] = self.calls.get(owner, 0) + 1
        return self.label if count == 1 else f"{self.label}, call {count}"


class Session:
    """What models remember for one user of them.

    Args:
        keep_chosen: also remember which tokens the last step refreshed (`ContextState.chosen`), for whoever watches.
        links: remember only models with these links to their schedule, and leave all others to the session around.
        run_step: runs the program of a `Step` on its loaded registers in the place of the executor, as several requests
            in one forward do; it leaves there what the step returns, stores and has chosen.
    """

    def __init__(
        self,
        *,
        keep_chosen: bool = False,
        links: Iterable[Any] | None = None,
        run_step: Callable[[Any, list[Any]], None] | None = None,
    ) -> None:
        self.keep_chosen, self.run_step = keep_chosen, run_step
        self._links = None if links is None else weakref.WeakSet(links)
        self._states: weakref.WeakKeyDictionary[Owner, ModelState] = weakref.WeakKeyDictionary()
        self.leads: weakref.WeakKeyDictionary[Any, Lead] = weakref.WeakKeyDictionary()
        self.counts: weakref.WeakKeyDictionary[Any, Count] = weakref.WeakKeyDictionary()

    def state_of(self, owner: Owner) -> ModelState:
        """What is remembered of a model in this session."""
        states = self.serving(owner.link)._states
        state = states.get(owner)
        return states.setdefault(owner, ModelState()) if state is None else state

    def serving(self, link: Any) -> Session:
        """This session, or the one around it that remembers the model with this link to its schedule."""
        if self._links is None or link in self._links:
            return self
        opened = _SESSION.get()
        around = opened[: opened.index(self)] if self in opened else ()
        return around[-1].serving(link) if around else _own_session()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots held now, of all models."""
        return sum(state.cache_bytes for state in list(self._states.values()))

    def leave(self, schedule_token: object, before: int) -> None:
        """Release what the models of one run stored before a step.

        One that was not called since then never reads it: a guidance partner that pauses, or a pipeline's other
        denoiser, which had the steps so far.

        Args:
            schedule_token: the scheduler's timesteps, by which the models know their run.
            before: the step.
        """
        for state in list(self._states.values()):
            if state.schedule_token is schedule_token:
                state.leave(before)

    def free(self, owner: Owner) -> None:
        """Release what a generation of a model that was left has stored, and the memory of its recorded steps."""
        self.state_of(owner).free()
        owner.trim()

    def clear(self) -> None:
        """Forget everything, reports included."""
        for owner, state in list(self._states.items()):
            state.begin(None)
            owner.trim()
        self._states.clear()
        self.leads.clear()
        self.counts.clear()


_OWN: weakref.WeakKeyDictionary[object, Session] = weakref.WeakKeyDictionary()


def current_session() -> Session:
    """The session that was opened last, or that of this thread or task, made at first use."""
    opened = _SESSION.get()
    return opened[-1] if opened else _own_session()


def _own_session() -> Session:
    try:
        owner: object = asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop
        owner = threading.current_thread()
    return _OWN.setdefault(owner, Session())


@contextlib.contextmanager
def session(own: Session | None = None) -> Iterator[Session]:
    """Run what follows in a session of its own.

    Args:
        own: a session to continue; a new one by default.
    """
    chosen = own if own is not None else Session()
    token = _SESSION.set((*_SESSION.get(), chosen))
    try:
        yield chosen
    finally:
        _SESSION.reset(token)


@contextlib.contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Run what follows in the named guidance context ("cond", "uncond"), as diffusers pipelines ask for."""
    token = _CONTEXT.set(name)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def current_context() -> str:
    """Name of the guidance context; empty outside of any."""
    return _CONTEXT.get()
