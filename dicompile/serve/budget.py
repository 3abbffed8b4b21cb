"""How much requests may remember at once: who does not fit waits, first come first served."""

from __future__ import annotations

import threading
from collections.abc import Callable

from dicompile.errors import CacheTooLarge
from dicompile.text import size_text


class Budget:
    """Bytes that requests share.

    Args:
        limit: of all of them; None for no limit.

    Attributes:
        taken: bytes that requests have now.
        most: the most that they had at once.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.taken, self.most = limit, 0, 0
        self._queue: list[object] = []
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """So many requests wait for bytes."""
        return len(self._queue)

    def take(self, wanted: int, check: Callable[[], None]) -> None:
        """Take bytes, when they are there and it is the caller's turn.

        Args:
            wanted: bytes.
            check: raises where the caller shall wait no longer.

        Raises:
            CacheTooLarge: so many are never there.
        """
        if self.limit is not None and wanted > self.limit:
            raise CacheTooLarge(
                f"a request remembers {size_text(wanted)}, and all together may remember {size_text(self.limit)}",
                where="dicompile.serve, by the plan of its policy",
                fix="give the Batcher a larger max_cache_bytes, or a cache_dtype, or the request another policy",
            )
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or not self._has(wanted):
                    check()
                    self._changed.wait()
                self.taken += wanted
                self.most = max(self.most, self.taken)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def give(self, taken: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.taken -= taken
            self._changed.notify_all()

    def look_again(self) -> None:
        """Somebody may have to stop waiting."""
        with self._changed:
            self._changed.notify_all()

    def _has(self, wanted: int) -> bool:
        return self.limit is None or self.taken + wanted <= self.limit
