"""One request: what it remembers, what it may remember, and its end, which comes from any thread."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dicompile.batch import input_of, with_timesteps
from dicompile.capture import Arguments, Role, ambient
from dicompile.capture.ambient import DEVICES
from dicompile.compiler import CompiledFrame
from dicompile.errors import CacheTooLarge, CannotBatch, RequestEnded, RequestTimedOut
from dicompile.model import Found, Frame, ModelCalls
from dicompile.ops.collectives import groups_of
from dicompile.plan import Plan
from dicompile.runtime import Owner, RunReport, SchedulerLink, Session, Step, session, streams
from dicompile.runtime.given import Given
from dicompile.serve.together import Call
from dicompile.text import size_text
from dicompile.wrapper import CachedModel

if TYPE_CHECKING:
    from dicompile.serve.batcher import Batcher


class _Calls:
    """What the model of a request does when it is called."""

    def __init__(self, request: Request, tier: ModelCalls, owner: Owner) -> None:
        self._request, self._tier, self.owner = request, tier, owner

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled that requests of the same policy keep."""
        return self._tier.frames

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._request.call(self.owner, args, kwargs)


class Request:
    """What one user has of a `Batcher`: a model that remembers this user's generation only. See `Batcher.request`.

    Use it as a context manager, or close it. It makes one call at a time.

    Attributes:
        model: called like the original, in its place in a loop or pipeline.
        session: what is remembered.
    """

    def __init__(
        self, batcher: Batcher, tier: ModelCalls, link: SchedulerLink, contexts: int, timeout: float | None
    ) -> None:
        self._batcher, self._tier, self._contexts = batcher, tier, contexts
        self._timeout = timeout
        self.session = Session(run_step=self._run_step)
        calls = _Calls(self, tier, Owner(link))
        self._owner = calls.owner
        self.model: nn.Module = CachedModel(batcher.module, tier.options, calls)
        self._running: tuple[Frame, Arguments] | None = None
        self._texts: dict[int, tuple[Given, str]] = {}
        self._reserved: int | None = None
        self._ended = ""
        self._ending, self._calling = threading.Lock(), threading.Lock()
        self._timer = None if timeout is None else threading.Timer(timeout, self._end, ["timed out"])
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    @property
    def report(self) -> RunReport:
        """What its last generation did."""
        return self.session.state_of(self._owner).report

    def cancel(self) -> None:
        """End it, from any thread: what it remembers is released, and its thread raises `RequestEnded`.

        Where it is part of a batch that runs just now, that goes to its end first.
        """
        self._end("cancelled")

    def close(self) -> None:
        """End it when it is done; nothing happens where it has ended."""
        self._end("finished")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end("finished" if error is None else "failed")

    def check(self) -> None:
        """Raise if it has ended.

        Raises:
            RequestTimedOut: it took too long.
            RequestEnded: it was cancelled or closed.
        """
        if not self._ended:
            return
        if self._ended == "timed out":
            raise RequestTimedOut(
                f"the request took longer than {self._timeout:g} s",
                where="dicompile.serve",
                fix="a longer timeout, fewer requests at once, or a policy that computes less",
            )
        raise RequestEnded(
            f"the request has ended ({self._ended}), and its model was called",
            where="dicompile.serve",
            fix="open another one: batcher.request(...)",
        )

    def call(self, owner: Owner, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call of the model, when it is its turn."""
        try:
            with self._calling, session(self.session):
                self.check()
                arguments, found = self._found(args, kwargs)
                self._admit(found[0].compiled, owner)
                self._running = found[0], arguments
                result = self._tier.run(owner, arguments, found)
                self.check()
                self._check_held(owner)
                return result
        finally:
            self._running = None
            if self._ended:
                self._free()

    def _found(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Arguments, Found]:
        """Arguments of a call, with a timestep for every row, and the code for them."""
        if any(torch.is_autocast_enabled(kind) for kind in DEVICES):
            raise self._cannot("autocast is on", "every thread has a state of its own", "cast the model: .to(dtype)")
        arguments, found = with_timesteps(self._tier, self._tier.arguments(args, kwargs))
        if groups_of(found[0].known.capture.graph):
            raise self._cannot(
                "it exchanges values with other ranks", "ranks would batch other requests", "no enable_parallelism"
            )
        if found[0].pins.homes:
            raise self._cannot(
                "its weights are brought part by part", "every request would bring its own",
                "keep the whole model on its device: no sequential or group offloading, no fully_shard",
            )  # fmt: skip
        reads = found[0].captured.reads
        if reads and max(self._batcher.turns.sizes) > 1:
            raise self._cannot("its code reads values of its inputs", f"{reads}", "Batcher(..., sizes=(1,))")
        latent = input_of(found[0], found[2], Role.LATENT)
        assert latent is not None
        self._batcher.settle(found[0].compiled, latent)
        return arguments, found

    def _cannot(self, what: str, why: str, fix: str) -> CannotBatch:
        name = type(self._batcher.module).__name__
        return CannotBatch(f"{name} cannot serve several requests: {what}", where="dicompile.serve", why=why, fix=fix)

    def _admit(self, compiled: CompiledFrame, owner: Owner) -> None:
        """Wait until there is memory for what the request remembers."""
        if self._reserved is not None:
            return
        plan: Plan = compiled.programs.plan(owner.link.schedule)
        wanted = plan.cache_bytes * self._contexts
        self._batcher.turns.look_again(-1)  # nobody waits for a call of it meanwhile
        try:
            self._batcher.budget.take(wanted, self.check)
        finally:
            self._batcher.turns.look_again(1)
        self._reserved = wanted

    def _check_held(self, owner: Owner) -> None:
        held = self.session.state_of(owner).cache_bytes
        if held > (self._reserved or 0):
            raise CacheTooLarge(
                f"a request remembers {size_text(held)}, and its plan says {size_text(self._reserved or 0)}",
                where="dicompile.serve",
                why=f"it makes more than {self._contexts} calls a step, or a second generation of more steps",
                fix=f"contexts={self._contexts + 1} for so many calls a step, and a request for every generation",
            )

    def _run_step(self, step: Step, registers: list[Any]) -> None:
        """Run a step with those of other requests; a gate has decided by then, about this request alone."""
        assert self._running is not None
        frame, arguments = self._running
        position = frame.known.capture.input_position(Role.LATENT)
        assert position is not None
        latent = registers[position]
        call = Call(step, registers, frame, arguments, len(latent), self._tier.options, streams.of(latent))
        shared = tuple(
            self._text(i, tensor)
            for i, (tensor, has_rows) in enumerate(zip(arguments.given, call.has_rows, strict=True))
            if not has_rows
        )
        # The code of batches has nobody's LoRA weights, and leaves nothing to verify.
        own = self if step.planned.is_adapted or step.verification is not None else None
        # Weights that follow from what gates have decided are in no plan; equal ones are one tensor.
        weights = tuple(id(registers[item.register]) for item in step.program.weights) if step.is_recall else ()
        does = step.does, weights
        alike = (frame.known.capture, call.options.policy.trunk, arguments.key, ambient(), does, shared, own)
        self._batcher.turns.take(call, alike, self.check)

    def _text(self, number: int, tensor: Tensor) -> str:
        """What tells the value of an input that all rows share; waits for the device when it is another one."""
        given, (known, text) = Given.of(tensor), self._texts.get(number, (None, ""))
        if (
            known is not None
            and known.tensor is tensor
            and known.version == given.version
            and not tensor.is_inference()
        ):
            return text
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        text = hashlib.sha256(content).hexdigest()
        self._texts[number] = given, text
        return text

    def _end(self, how: str) -> None:
        with self._ending:
            if self._ended:
                return
            self._ended = how
        if self._timer is not None:
            self._timer.cancel()
        self._batcher.ended(self, how)
        self._free()

    def _free(self) -> None:
        """Release everything, unless a call is going on, which does it when it ends."""
        if not self._calling.acquire(blocking=False):
            return
        try:
            self.session.clear()
            self._texts.clear()
            reserved, self._reserved = self._reserved, None
            if reserved is not None:
                self._batcher.budget.give(reserved)
        finally:
            self._calling.release()
