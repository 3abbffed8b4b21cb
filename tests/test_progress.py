"""Bars: in a terminal only, one at a time, and for whatever a call has to wait for."""

from __future__ import annotations

import functools

import pytest
from rich.console import Console

from dicompile.progress import progress
from tests.models import optimized, plain_dit, run, timesteps


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicompile.progress.Console", functools.partial(Console, force_terminal=True, width=100))


@pytest.mark.usefixtures("terminal")
def test_there_is_one_bar_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("outside"), progress("inside"):
        pass
    with pytest.raises(KeyboardInterrupt), progress("interrupted"):
        raise KeyboardInterrupt
    with progress("afterwards"):
        pass
    shown = capsys.readouterr().err
    assert [word in shown for word in ("outside", "inside", "interrupted", "afterwards")] == [True, False, True, True]


def test_nothing_is_shown_but_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("outside"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_a_call_that_captures_and_compiles_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    sample = plain_dit(1)
    model = optimized(sample, "none", 2, mode="inductor")
    run(model, sample.inputs, timesteps(2))
    shown = capsys.readouterr().err
    assert "looking at PlainDiT" in shown
    assert "of code for a full step" in shown
    run(model, sample.inputs, timesteps(2))
    assert capsys.readouterr().err == ""
