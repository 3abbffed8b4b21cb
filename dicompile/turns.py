"""Who may run while something is captured, rewritten or compiled: nobody.

torch.fx and Dynamo trace with global state: a thread that calls a compiled module while another one traces breaks both.
Calls that find everything compiled share their turn; a call that does not takes a turn alone from there to its end, so
that what it compiled also runs for the first time alone (Triton measures kernels then).

Calls enter one by one: Dynamo's guards remember what they have seen of a call until they are through, and fail if two
threads ask them at once (torch 2.13).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Turns:
    """A lock that running calls hold together and a compiling one holds alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._running: dict[int, int] = {}
        """Calls that each thread is in: nested where one optimized model calls another."""
        self._waiting = 0
        self._alone: int | None = None
        self._entering: int | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run a call; beside others as soon as it has `entered`, unless it turns out that it has to compile."""
        me = threading.get_ident()
        with self._changed:
            is_nested = me in self._running  # whoever waits to compile waits for this thread
            self._changed.wait_for(
                lambda: self._entering is None and (is_nested or (self._alone is None and not self._waiting))
            )
            self._entering, self._running[me] = me, self._running.get(me, 0) + 1
        try:
            yield
        finally:
            self._leave(me)

    def entered(self) -> None:
        """This thread's call knows which compiled code serves it: let the next one enter."""
        with self._changed:
            if self._entering == threading.get_ident():
                self._entering = None
                self._changed.notify_all()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Wait until no other call runs, and let none begin: to the end of this thread's call, or of the block."""
        me = threading.get_ident()
        self.entered()
        with self._changed:
            calls = self._running.pop(me, 0)  # waiting, it does nothing: others may compile meanwhile
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._alone in (None, me) and not self._running)
                self._alone, calls = me, calls + 1
            finally:  # an interrupt may end the waiting
                self._waiting -= 1
                if calls:
                    self._running[me] = calls
                self._changed.notify_all()
        try:
            yield
        finally:
            self._leave(me)

    def _leave(self, me: int) -> None:
        self.entered()
        with self._changed:
            self._running[me] -= 1
            if not self._running[me]:
                del self._running[me]
                self._alone = None if self._alone == me else self._alone
                self._changed.notify_all()


TURNS = Turns()
"""Those of this process: the state that tracing shares is global."""


class TracesAlone:
    """What Dynamo calls when it has no code for a frame yet, in a turn of its own.

    Args:
        callback: what Dynamo would call.
    """

    def __init__(self, callback: Callable[..., Any]) -> None:
        # Dynamo finds the backend, by which it keeps compiled code, behind this attribute of every wrapper.
        self._torchdynamo_orig_backend = callback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Trace a frame."""
        with TURNS.compiling():
            return self._torchdynamo_orig_backend(*args, **kwargs)
