"""Many requests on one model: each in a thread of its own, with its own policy and scheduler, computed in batches.

Requests call the model when they come to it, so they are at different steps. What a step computes is known from the
plan; requests of which it is the same function run as one batch, each with its own latent, timestep and slots.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.analysis import Trunk
from dicompile.capture import Said, check_names
from dicompile.compiler import CompiledFrame, Options
from dicompile.errors import CannotBatch, InvalidSetting, UnsupportedModel
from dicompile.lower import Backend, Hoist
from dicompile.model import ModelCalls
from dicompile.offload import HOOK_ATTRIBUTES
from dicompile.pipelines import components_of
from dicompile.plan import CacheOptions, Policy
from dicompile.policies import NoCache, get_policy
from dicompile.runtime import Executor, SchedulerLink, run_calls, streams
from dicompile.serve.budget import Budget
from dicompile.serve.request import Request
from dicompile.serve.together import Call, Together
from dicompile.serve.turns import Turns
from dicompile.wrapper import find_optimized, without_compile

_WARMING_UP = 60.0
"""Seconds that a call waits for those that are to be one batch with it."""


@dataclass(frozen=True)
class Served:
    """What a `Batcher` has done so far, and what it does now.

    Attributes:
        open: requests that have not ended.
        waiting: calls that wait for their turn.
        queued: requests that wait until there is memory for them.
        finished: requests that were closed.
        cancelled: requests that were cancelled.
        timed_out: requests that took too long.
        failed: requests whose thread raised something else.
        cache_bytes: bytes of the slots that open requests hold.
        reserved_bytes: bytes that their plans may hold at most.
        most_reserved_bytes: the most of that so far.
        steps: steps of requests by kind: "full", "reuse" and so on; where a gate has decided, "full" or "recalled".
        batches: forwards by how many requests were in them.
        seconds: that forwards took.
        copied_bytes: of slots, into batches and out of them.
        captures: sizes of batches for which the model was captured.
    """

    open: int
    waiting: int
    queued: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    cache_bytes: int
    reserved_bytes: int
    most_reserved_bytes: int
    steps: Mapping[str, int]
    batches: Mapping[int, int]
    seconds: float
    copied_bytes: int
    captures: int


@dataclass
class _Counts:
    ended: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0


class Batcher:
    """One model for many requests at once.

    Every request has a thread (or a task that calls ``asyncio.to_thread``), in which an ordinary sampling loop or
    pipeline runs. Calls of the model that do the same at their steps, for inputs of the same shapes, are one batch,
    whatever their policies and however far each is. Gates decide for every request by itself, before it waits for
    others: those that compute are one batch then, and those that recall another. The result of a request is that of
    the request by itself: the same bits where kernels compute a row alike in batches of all sizes, and equal to
    rounding where they do not.

    Args:
        model: the module; its weights are shared by all requests. Not one that `dicompile.optimize` has returned.
        backend: "inductor" or "eager", see `dicompile.optimize`.
        sizes: how many requests may be one batch; each size is captured, and compiled, once.
        patience: seconds that a call waits for others which could come along, while nothing runs.
        max_cache_bytes: what all requests together may remember, by their plans: bytes, or text such as "8GiB". A
            request that does not fit waits in its first call. Activations are not in it.
        cache_dtype: see `dicompile.optimize`.
        timestep: argument of the forward that is its timestep, where that cannot be told.
        latent: argument that is denoised, where that cannot be told.

    Raises:
        InvalidSetting: a backend, size or budget that does not exist.
        UnsupportedModel: it is no module, is optimized already, or its weights or tokens are moved by hooks.
    """

    def __init__(
        self,
        model: Any,
        *,
        backend: str = "inductor",
        sizes: Sequence[int] = (1, 2, 4, 8),
        patience: float = 0.01,
        max_cache_bytes: int | str | None = None,
        cache_dtype: str | torch.dtype | None = None,
        timestep: str | None = None,
        latent: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or find_optimized(model) is not None:
            raise UnsupportedModel(
                f"a Batcher takes a module that is not optimized, and this is a {type(model).__name__}",
                where="dicompile.serve",
                fix="give the denoiser itself, pipe.transformer, before optimize or after restore",
            )
        if any(hasattr(model, name) for name in HOOK_ATTRIBUTES):
            raise UnsupportedModel(
                f"the weights of this {type(model).__name__} are moved by hooks, or its tokens",
                where="dicompile.serve",
                why="the hooks of one request would move what a batch of others reads",
                fix="keep the model on its device: no enable_model_cpu_offload, device_map or enable_parallelism",
            )
        if 1 not in sizes or min(sizes) < 1:
            raise InvalidSetting(
                f"sizes cannot be {sizes!r}",
                where="dicompile.serve",
                why="a request that no other one is like runs by itself",
                fix="1, and how many requests may be one batch: sizes=(1, 2, 4, 8)",
            )
        self.module = without_compile(model)
        said = Said(timestep, latent)
        check_names(self.module, said)
        limit = CacheOptions.of(max_cache_bytes, where="dicompile.serve").max_bytes
        self.budget = Budget(limit)
        self._options = Options(
            NoCache(),
            SchedulerLink(1),
            Backend.of(backend),
            cache=CacheOptions.of(cache_dtype=cache_dtype, where="dicompile.serve"),
            said=said,
            hoist=Hoist.NOTHING,
        )
        self.turns: Turns[Call] = Turns(sizes, patience, self._run)
        self._lock = threading.Lock()
        self._tiers: dict[Policy, ModelCalls] = {}
        self._together: dict[Trunk, Together] = {}
        self._settled: weakref.WeakSet[Executor] = weakref.WeakSet()
        self._open: set[Request] = set()
        self._counts = _Counts()

    def request(
        self,
        policy: Policy | str | dict[str, Any] = "none",
        *,
        schedule: Any,
        contexts: int = 1,
        timeout: float | None = None,
    ) -> Request:
        """Open a request; close it, or use it as a context manager.

        Args:
            policy: as `dicompile.optimize` takes it. Requests with different ones run as one batch where they do the
                same.
            schedule: what drives its sampling, and no other request's: a diffusers scheduler, a list of timesteps, or a
                number of steps.
            contexts: calls of the model at each step: 2 where guidance calls it for either half by itself.
            timeout: seconds after which it ends, in whatever it waits for then.

        Raises:
            UnknownPolicy, InvalidPolicy: the policy does not exist.
            CannotBatch: it tells rows of one call apart.
            InvalidSchedule: the schedule makes no sense.
        """
        chosen = get_policy(policy)
        if chosen.gate is not None and chosen.gate.tells_rows_apart:
            raise CannotBatch(
                f"policy {chosen.name!r} tells the rows of a request apart",
                where="dicompile.serve",
                why="requests decide for themselves, and the rows of each together",
                fix="leave decides='sample' and halves out; open a request for every picture, or one with contexts=2",
            )
        with self._lock:
            if chosen not in self._tiers:
                self._tiers[chosen] = ModelCalls(self.module, replace(self._options, policy=chosen))
            request = Request(self, self._tiers[chosen], SchedulerLink(schedule), contexts, timeout)
            self._open.add(request)
        self.turns.look_again(1)
        return request

    @contextlib.contextmanager
    def pipeline(
        self,
        pipe: Any,
        policy: Policy | str | dict[str, Any] = "none",
        *,
        contexts: int = 1,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """A pipeline for one request, to be called like the one that was given: a copy with a scheduler of its own.

        Everything but the scheduler is shared. A request that was cancelled or took too long raises in the pipeline.

        Args:
            pipe: a diffusers pipeline with the model of this batcher; it is not changed.
            policy: see `request`.
            contexts: see `request`.
            timeout: see `request`.

        Raises:
            UnsupportedModel: the model is no component of the pipeline.
        """
        names = [name for name, module in components_of(pipe).items() if without_compile(module) is self.module]
        if not names:
            raise UnsupportedModel(
                f"{type(pipe).__name__} does not have the model of this batcher",
                where="dicompile.serve",
                fix="Batcher(pipe.transformer)",
            )
        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        with self.request(policy, schedule=own, contexts=contexts, timeout=timeout) as request:
            for name in names:
                setattr(own, name, request.model)
            yield own

    def warm_up(self, opened: Callable[[int], Callable[[], object]]) -> None:
        """Run one batch of every size, so that no request has to wait for a capture.

        Args:
            opened: opens a request, the first one of number 0, and returns what runs it to its end and closes it. It is
                called for all requests of a batch before any of them runs, each then in a thread of its own. They
                have to do the same, as those of one policy and number of steps do.
        """
        for size in self.turns.sizes:
            with self.turns.patient(_WARMING_UP), ThreadPoolExecutor(size) as threads:
                runs = [opened(number) for number in range(size)]
                for done in [threads.submit(run) for run in runs]:
                    done.result()

    def served(self) -> Served:
        """What was done so far, and what is done now."""
        with self._lock:
            requests, together, counts = list(self._open), list(self._together.values()), copy.deepcopy(self._counts)
        return Served(
            open=len(requests),
            waiting=self.turns.waiting,
            queued=self.budget.waiting,
            finished=counts.ended["finished"],
            cancelled=counts.ended["cancelled"],
            timed_out=counts.ended["timed out"],
            failed=counts.ended["failed"],
            cache_bytes=sum(request.session.cache_bytes for request in requests),
            reserved_bytes=self.budget.taken,
            most_reserved_bytes=self.budget.most,
            steps=dict(counts.steps),
            batches=dict(counts.batches),
            seconds=counts.seconds,
            copied_bytes=sum(each.copied for each in together),
            captures=sum(each.captures for each in together),
        )

    def _run(self, calls: Sequence[Call]) -> None:
        """Run what is alike, as `Turns` asks for it."""
        start = time.perf_counter()
        if len(calls) == 1:
            run_calls(calls[0].step.program, calls[0].registers, None)
        else:
            self._runs(calls[0]).run(calls)
        with self._lock:
            self._counts.seconds += time.perf_counter() - start
            self._counts.batches[len(calls)] += 1
            self._counts.steps.update(call.step.kind for call in calls)

    def _runs(self, call: Call) -> Together:
        """What runs several calls, for all policies for which a model is cut into the same pieces."""
        trunk = call.options.policy.trunk
        with self._lock:
            if trunk not in self._together:
                self._together[trunk] = Together(self.module, call.options)
            return self._together[trunk]

    def settle(self, compiled: CompiledFrame, latent: Tensor) -> None:
        """Wait, once, for what a capture has put on the device, on the stream of whichever thread came first."""
        if compiled.run not in self._settled:
            streams.settle(streams.of(latent))
            self._settled.add(compiled.run)

    def ended(self, request: Request, how: str) -> None:
        """A request has ended."""
        with self._lock:
            if request not in self._open:
                return
            self._open.remove(request)
            self._counts.ended[how] += 1
        self.turns.look_again(-1)
        self.budget.look_again()
