"""Random sequences of events, each run compared with a fresh process: a slice of them, and the nightly ones.

`make nightly` runs at least 500 sequences; see `tests.state.machine` for the events.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from dicompile.runtime.stamps import Stamps
from tests.state import machine
from tests.state.oracle import oracle

SEQUENCES = int(os.environ.get("DICOMPILE_SEQUENCES", "500"))
BASE = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=False, database=None)


@pytest.fixture(autouse=True)
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models of the machine can fail in the middle of a call; one thread, as in the oracle."""
    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", machine.FAULTS.compile_segment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    oracle().close()
    oracle.cache_clear()


def run_sequences(kind: type[RuleBasedStateMachine], profile: settings, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.DONE.clear()
    reads, begun = Stamps.reads, time.perf_counter()

    def tell() -> None:
        done = ", ".join(f"{count} {what}" for what, count in sorted(machine.DONE.items()))
        seconds = time.perf_counter() - begun
        checked = f"{Stamps.reads - reads} reads checked, {len(oracle())} runs in fresh processes"
        print(f"{done}; {checked}, {seconds:.0f} s", flush=True)

    monkeypatch.setattr(machine, "tell", tell)
    try:
        with machine.foreign_code():
            run_state_machine_as_test(kind, settings=profile)
    finally:
        tell()
    assert Stamps.reads > reads


def test_nothing_that_happens_changes_what_a_run_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = settings(BASE, max_examples=3, stateful_step_count=8, derandomize=True)
    run_sequences(machine.FastMachine, profile, monkeypatch)


@pytest.mark.nightly
def test_nothing_that_happens_changes_what_a_run_gives_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = settings(BASE, max_examples=SEQUENCES, stateful_step_count=20)
    run_sequences(machine.NightlyMachine, profile, monkeypatch)
