"""Contestants take turns, and who does not fit is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dicompile.bench import measure
from dicompile.bench.contestants import Contestant, DoesNotFit
from dicompile.bench.measure import Options, ready
from dicompile.bench.models import SUBJECTS
from dicompile.bench.results import Cost
from dicompile.bench.workload import Workload

OPTIONS = Options((), ("eager", "torch.compile", "pab", "fewer-steps"), 2, 3, "cpu", torch.float32, "quick", "eager")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of contestants in the order of their calls; nothing is run, and "pab" does not fit."""
    calls: list[str] = []

    def prepare(name: str, workload: Workload, backend: str) -> Contestant:
        if name == "pab":
            raise DoesNotFit("not here")
        return Contestant(name, lambda **_: calls.append(name), workload.steps)

    monkeypatch.setattr(measure, "prepare", prepare)
    return calls


def test_contestants_take_turns_a_generation_each(ran: list[str]) -> None:
    result = measure.measure(SUBJECTS["dit"], OPTIONS, {"torch.compile": (Cost(9, 9), Cost(1, 1))}, lambda _: None)
    two_calls = ["eager"] * 2 + ["torch.compile"] * 2
    assert ran[:4] == two_calls  # warm
    assert ran[4:] == two_calls * 3
    assert [row.name for row in result.rows] == ["eager", "torch.compile"]
    assert result.refused == (("pab", "not here"),)
    assert result.baseline == "torch.compile"
    assert [row.speedup for row in result.rows][1] == 1.0
    assert [row.cold for row in result.rows] == [None, Cost(9, 9)]
    assert all(kind.count == 2 for row in result.rows for kind in row.kinds)


def test_fewer_steps_need_the_compiled_model(ran: list[str]) -> None:
    workload = Workload.of(SUBJECTS["dit"], SUBJECTS["dit"].size("quick"), 2, "cpu", torch.float32)
    contestants, refused = ready(
        workload, dataclasses.replace(OPTIONS, against=("eager", "fewer-steps")), lambda _: None
    )
    assert [one.name for one in contestants] == ["eager"]
    assert refused == [("fewer-steps", "needs torch.compile, which did not run")]


def test_fewer_steps_run_the_compiled_model_as_often_as_others_cost(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(policy: str, workload: Workload, backend: str) -> Contestant:
        return Contestant(policy, lambda **_: None, workload.steps, flops=(4, 0, 4, 0))

    monkeypatch.setattr(measure, "prepare_policy", half)
    workload: Any = Workload.of(SUBJECTS["dit"], SUBJECTS["dit"].size("quick"), 4, "cpu", torch.float32)
    options = dataclasses.replace(OPTIONS, policies=("x",), against=("torch.compile", "fewer-steps"))
    compiled, _, fewer = ready(workload, options, lambda _: None)[0]
    assert (fewer.name, fewer.steps) == ("2 steps", 2)
    assert fewer.model is compiled.model
