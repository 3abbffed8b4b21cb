"""Bytes that requests share: nobody overtakes, and who stops waiting holds nobody up."""

import contextlib
import threading
import time
from collections.abc import Callable

import pytest

from dicompile.errors import CacheTooLarge
from dicompile.serve.budget import Budget


def taking(budget: Budget, wanted: int, check: Callable[[], None] = lambda: None) -> threading.Thread:
    """A thread that takes bytes, once it waits or has them."""
    before = budget.waiting, budget.taken

    def take() -> None:
        with contextlib.suppress(InterruptedError):
            budget.take(wanted, check)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    while (budget.waiting, budget.taken) == before:
        time.sleep(0.001)
    return thread


def test_who_would_fit_waits_for_who_came_before() -> None:
    budget = Budget(10)
    budget.take(8, lambda: None)
    large, small = taking(budget, 5), taking(budget, 2)
    assert (budget.waiting, budget.taken) == (2, 8)
    budget.give(8)
    for thread in (large, small):
        thread.join(timeout=10)
    assert (budget.waiting, budget.taken, budget.most) == (0, 7, 8)


def test_who_stops_waiting_lets_the_next_one_have_it() -> None:
    budget, has_ended = Budget(10), threading.Event()
    budget.take(8, lambda: None)

    def check() -> None:
        if has_ended.is_set():
            raise InterruptedError

    large, small = taking(budget, 5, check), taking(budget, 2)
    has_ended.set()
    budget.look_again()
    for thread in (large, small):
        thread.join(timeout=10)
    assert (budget.waiting, budget.taken) == (0, 10)


def test_what_is_never_there_is_refused_at_once() -> None:
    budget = Budget(10)
    with pytest.raises(CacheTooLarge):
        budget.take(11, lambda: None)
    assert (budget.waiting, budget.taken) == (0, 0)
