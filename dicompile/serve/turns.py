"""Whose turn it is: calls that wait, and which of them run as one.

There is no thread for it. While nothing runs, one of those that wait with the oldest call or one like it runs them all,
in its own thread: what threads have set for themselves, inference mode, say, is part of what makes calls alike. While
they run others arrive, so that groups form by themselves; where everybody else is at work elsewhere (decoding, or not
called yet), nobody is waited for longer than `patience`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A call that waits for its turn.

    Attributes:
        call: what it is.
        alike: calls of which this is equal can run as one.
        since: when it came, by `time.monotonic`.
        is_done: it has run, or failed.
        error: with which it failed.
    """

    call: T
    alike: Hashable
    since: float = field(default_factory=time.monotonic)
    is_done: bool = False
    error: BaseException | None = None


class Turns(Generic[T]):
    """Calls of many threads, one group at a time.

    Args:
        sizes: how many calls may run as one, 1 among them.
        patience: seconds that the oldest call waits for others.
        run: runs some calls that are alike.

    Attributes:
        callers: so many may call; where all of them wait there is nobody to wait for.
    """

    def __init__(self, sizes: Sequence[int], patience: float, run: Callable[[Sequence[T]], None]) -> None:
        self.sizes, self.patience, self.callers = tuple(sorted(sizes)), patience, 0
        self._run = run
        self._waiting: list[Waiting[T]] = []
        self._is_running = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """So many calls wait."""
        return len(self._waiting)

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """While open, calls wait so long for others."""
        before, self.patience = self.patience, seconds
        try:
            yield
        finally:
            self.patience = before
            self.look_again()

    def look_again(self, more: int = 0) -> None:
        """Something changed from outside: somebody may have to stop waiting; `more` may call than did."""
        with self._changed:
            self.callers += more
            self._changed.notify_all()

    def take(self, call: T, alike: Hashable, check: Callable[[], None]) -> None:
        """Run a call when it is its turn, alone or with others that are alike.

        Args:
            call: the call.
            alike: see `Waiting`.
            check: raises where the caller shall wait no longer.
        """
        own = Waiting(call, alike)
        with self._changed:
            self._waiting.append(own)
            self._changed.notify_all()  # it may have been the last one that was waited for
            while not own.is_done:
                group = [] if self._is_running else self._group()
                if own in group:
                    self._serve(group)
                    continue
                try:
                    check()
                except BaseException:
                    if own in self._waiting:  # else it runs just now, and is waited for
                        self._waiting.remove(own)
                        self._changed.notify_all()
                        raise
                self._changed.wait(threading.TIMEOUT_MAX if group else self._pause())  # one of the group runs it
        if own.error is not None:
            raise own.error

    def _group(self) -> list[Waiting[T]]:
        """The calls whose turn it is; nothing while others may still come along."""
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        alike = [waiting for waiting in self._waiting if waiting.alike == oldest.alike]
        is_complete = len(alike) >= self.sizes[-1] or len(self._waiting) >= self.callers
        if not is_complete and time.monotonic() - oldest.since < self.patience:
            return []
        return alike[: max(size for size in self.sizes if size <= len(alike))]

    def _pause(self) -> float:
        """Seconds after which to look again though nothing changed."""
        if self._is_running or not self._waiting:
            return threading.TIMEOUT_MAX
        return max(self._waiting[0].since + self.patience - time.monotonic(), 0.0)

    def _serve(self, group: Sequence[Waiting[T]]) -> None:
        """Run a group, while others come."""
        self._is_running = True
        self._waiting = [waiting for waiting in self._waiting if waiting not in group]
        self._changed.release()
        error: BaseException | None = None
        try:
            self._run([waiting.call for waiting in group])
        except BaseException as raised:
            error = raised
        finally:
            self._changed.acquire()
            self._is_running = False
            for waiting in group:
                waiting.is_done, waiting.error = True, error
            self._changed.notify_all()
