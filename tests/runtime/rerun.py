"""Records steps where no GPU is: what is replayed runs once more, on the memory that it was recorded with."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dicompile.runtime.graphs import Outcome


class Rerun:
    """Like a CUDA graph, it leaves its results at the same addresses every time, until anything of its pool runs.

    Args:
        outcome_of: what was recorded.
        pool: recordings of the pool.
    """

    def __init__(self, outcome_of: Callable[[], Outcome], pool: weakref.WeakSet[Rerun]) -> None:
        self._outcome_of, self._pool, self._outcome = outcome_of, pool, Outcome([], {}, [])
        pool.add(self)

    def replay(self) -> Outcome:
        for other in self._pool:
            for tensor in other.tensors():
                tensor.view(torch.uint8).fill_(255)  # not a number, in every dtype of floats
        made, kept = self._outcome_of(), self._outcome
        if kept.results:
            for old, new in zip(self.tensors(), Rerun._tensors(made), strict=True):
                old.copy_(new)
            assert [address(a) for a in made.store] == [address(b) for b in kept.store]
        else:
            self._outcome = made
        return self._outcome

    def tensors(self) -> list[Tensor]:
        """What it leaves, but for slots."""
        return Rerun._tensors(self._outcome)

    @staticmethod
    def _tensors(outcome: Outcome) -> list[Tensor]:
        return [*(result for result in outcome.results if isinstance(result, Tensor)), *outcome.chosen.values()]


class Recorder:
    """Records by keeping functions."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_open = False
        self.recorded = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            self.is_open = True
            try:
                yield
            finally:
                self.is_open = False

    def new_pool(self) -> Any:
        return weakref.WeakSet[Rerun]()

    def record(self, compute: Callable[[], Outcome], pool: Any) -> Rerun:
        assert self.is_open
        self.recorded += 1
        return Rerun(compute, pool)

    def give(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def bytes_of(self, pool: Any) -> int:
        return sum(tensor.nbytes for recording in pool for tensor in recording.tensors())

    def release(self) -> None:
        """Nothing to do: memory of a CPU is free at once."""


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies."""
    return None if tensor is None else tensor.data_ptr()
