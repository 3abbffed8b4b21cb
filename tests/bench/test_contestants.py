"""A contestant runs, or is named with the reason; others get as many steps as it costs."""

from __future__ import annotations

import pytest
import torch

from dicompile.bench.contestants import (
    COMPILED,
    Contestant,
    DoesNotFit,
    fewer_steps,
    prepare_policy,
    warm_up,
)
from dicompile.bench.models import SUBJECTS
from dicompile.bench.workload import Workload
from dicompile.errors import CacheTooLarge, DicompileError, PolicyDoesNotFit, UnknownPolicy

STEPS = 4


def workload_of(name: str) -> Workload:
    subject = SUBJECTS[name]
    return Workload.of(subject, subject.size("quick"), STEPS, "cpu", torch.float32)


def test_an_opponent_that_fails_while_it_runs_is_named_too() -> None:
    def failing(**_: object) -> None:
        raise ValueError("no context")

    with pytest.raises(DoesNotFit, match="ValueError: no context"):
        warm_up(Contestant("x", failing, STEPS), workload_of("dit"))


def test_fewer_steps_cost_what_the_others_cost() -> None:
    compiled = Contestant(COMPILED, lambda **_: None, 20)
    fewer = fewer_steps(compiled, [1.0, 1.05, 2.77, 2.6, 2.1, 100.0])
    assert [one.steps for one in fewer] == [19, 10, 8, 1]
    assert [one.name for one in fewer] == ["19 steps", "10 steps", "8 steps", "1 steps"]
    assert fewer[1].flop_speedup(20) == 2.0
    assert fewer[1].kinds == ["full"] * 10


@pytest.mark.parametrize("error", [PolicyDoesNotFit("x", why="no cross-attention"), CacheTooLarge("no room")])
def test_a_policy_that_does_not_fit_is_named(error: DicompileError) -> None:
    def refusing(**_: object) -> None:
        raise error

    with pytest.raises(DoesNotFit, match=error.why or error.what):
        warm_up(Contestant("x", refusing, STEPS), workload_of("dit"))


def test_an_unknown_policy_is_the_users_mistake() -> None:
    with pytest.raises(UnknownPolicy, match="fora2"):
        prepare_policy("fora2", workload_of("dit"))
