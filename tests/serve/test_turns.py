"""Whose turn it is: groups of what is alike, the oldest first, and nobody is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from dicompile.serve.turns import Turns
from tests.serve.clients import at_once

FOREVER = 60.0


def never() -> None:
    """Nobody stops waiting."""


def turns_of(sizes: Sequence[int], callers: int, patience: float = FOREVER) -> tuple[Turns[str], list[list[str]]]:
    ran: list[list[str]] = []
    turns: Turns[str] = Turns(sizes, patience, lambda calls: ran.append(sorted(calls)))
    turns.look_again(callers)
    return turns, ran


def take(turns: Turns[str], name: str, alike: str) -> None:
    """A caller with one call."""
    turns.take(name, alike, never)
    turns.look_again(-1)


def test_what_is_alike_runs_together_when_everybody_waits() -> None:
    turns, ran = turns_of((1, 2, 4), callers=5)
    at_once(*[lambda name=name: take(turns, name, name[0]) for name in ("a1", "a2", "b1", "a3", "b2")])
    assert sorted(name for group in ran for name in group) == ["a1", "a2", "a3", "b1", "b2"]
    assert all(len({name[0] for name in group}) == 1 for group in ran)
    assert len(ran[0]) == 2  # of three that are alike two, since three is no size


def test_a_group_runs_in_a_thread_of_its_own_callers() -> None:
    threads: dict[str, int] = {}
    ran: list[tuple[Sequence[str], int]] = []
    turns: Turns[str] = Turns((1, 2), FOREVER, lambda calls: ran.append((calls, threading.get_ident())))
    turns.look_again(3)

    def call(name: str) -> None:
        threads[name] = threading.get_ident()
        take(turns, name, name[0])

    at_once(*[lambda name=name: call(name) for name in ("a", "b", "c")])
    assert len(ran) == 3  # the last to come does not run the first one's
    assert all(thread in [threads[name] for name in calls] for calls, thread in ran)


def test_a_full_group_waits_for_nobody() -> None:
    turns, ran = turns_of((1, 2), callers=9)
    at_once(lambda: turns.take("a", 0, never), lambda: turns.take("b", 0, never))
    assert ran == [["a", "b"]]


def test_patience_ends() -> None:
    turns, ran = turns_of((1, 2), callers=9, patience=0.01)
    turns.take("a", 0, never)
    assert ran == [["a"]]


def test_everybody_in_a_group_that_failed_is_told() -> None:
    def fail(_: Sequence[str]) -> None:
        raise ValueError("it broke")

    turns: Turns[str] = Turns((1, 2), FOREVER, fail)
    turns.look_again(2)
    errors = at_once(lambda: turns.take("a", 0, never), lambda: turns.take("b", 0, never))
    assert [str(error) for error in errors] == ["it broke", "it broke"]
    assert turns.waiting == 0


def test_who_gives_up_leaves_and_lets_the_others_go() -> None:
    turns, ran = turns_of((1, 2), callers=2)
    gave_up = threading.Event()

    def check() -> None:
        if gave_up.is_set():
            raise TimeoutError

    def give_up() -> None:
        while not turns.waiting:
            pass
        gave_up.set()
        turns.look_again()

    error, _ = at_once(lambda: turns.take("a", 0, check), give_up)
    assert isinstance(error, TimeoutError)
    turns.look_again(-1)
    turns.take("b", 0, never)
    assert ran == [["b"]]


def test_others_come_while_a_group_runs() -> None:
    inside, go_on = threading.Event(), threading.Event()
    ran = []

    def run(calls: Sequence[str]) -> None:
        ran.append(sorted(calls))
        inside.set()
        assert go_on.wait(FOREVER)

    turns: Turns[str] = Turns((1, 2), 0.0, run)
    turns.look_again(3)

    def late(name: str) -> None:
        assert inside.wait(FOREVER)
        turns.take(name, 0, never)

    def release() -> None:
        while turns.waiting < 2:
            pass
        go_on.set()

    at_once(lambda: turns.take("a", 0, never), lambda: late("b"), lambda: late("c"), release)
    assert ran == [["a"], ["b", "c"]]


@pytest.mark.parametrize("count", [1, 7])
def test_sizes_are_kept_to(count: int) -> None:
    turns, ran = turns_of((1, 2, 4), callers=count)
    at_once(*[lambda i=i: take(turns, str(i), "") for i in range(count)])
    assert sum(map(len, ran)) == count
    assert {len(group) for group in ran} <= {1, 2, 4}
    assert len(ran[0]) == (4 if count == 7 else 1)
