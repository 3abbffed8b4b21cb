"""What the processes that compile are asked, and what becomes of their answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dicompile.bench import compiling
from dicompile.bench.compiling import REFUSED, STEPS, Job, compile_times, get_depths, measure_job, run
from dicompile.bench.contestants import Contestant, DoesNotFit
from dicompile.bench.models import SUBJECTS
from dicompile.bench.results import Cost
from dicompile.bench.workload import Workload
from dicompile.errors import DicompileError

JOB = Job("dit", SUBJECTS["dit"].size("quick"), "eager", False, 2)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of Python: it notes what it gets, and says what stands in a file."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\nmkdir -p $TORCHINDUCTOR_CACHE_DIR\n"
        f'echo "$3|$TORCHINDUCTOR_CACHE_DIR|$DICOMPILE_CACHE_DIR|$(ls -a $TORCHINDUCTOR_CACHE_DIR | wc -l)"'
        f" >> {tmp_path}/got\ntouch $TORCHINDUCTOR_CACHE_DIR/code\n. {tmp_path}/says\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path


def says(folder: Path, text: str) -> None:
    (folder / "says").write_text(text)


def test_the_second_process_finds_what_the_first_one_left_and_then_it_is_gone(python: Path) -> None:
    says(python, """echo imports; echo '{"wall": 2.5, "cpu": 4.0}'""")
    assert run(JOB) == [Cost(2.5, 4.0)] * 2
    (job, inductor, ours, empty), (_, inductor_again, ours_again, left) = (
        line.split("|") for line in (python / "got").read_text().splitlines()
    )
    assert compiling._job(job) == JOB
    assert (inductor, ours) == (inductor_again, ours_again)
    assert int(left) == int(empty) + 1
    assert inductor != ours
    assert inductor not in (os.environ.get("TORCHINDUCTOR_CACHE_DIR"), "")
    assert not Path(inductor).exists()


def test_a_contestant_that_does_not_fit_says_why(python: Path) -> None:
    says(python, f"echo no cross-attention; exit {REFUSED}")
    with pytest.raises(DoesNotFit, match="no cross-attention"):
        run(JOB)


def test_a_process_that_fails_is_named_with_its_last_line(python: Path) -> None:
    says(python, "echo 'OutOfMemoryError: 3 GiB' >&2; exit 1")
    with pytest.raises(DicompileError, match=r"compiles dit for eager failed(.|\n)*OutOfMemoryError: 3 GiB"):
        run(JOB)


TICK = 0.02
"""The system counts the CPU time of processes in hundredths of a second."""


def test_a_job_costs_what_its_process_and_the_processes_it_started_spend(monkeypatch: pytest.MonkeyPatch) -> None:
    def spends(_: Contestant, __: Workload) -> None:
        subprocess.run(["sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"], check=True)

    ended: list[bool] = []
    workers: Any = types.ModuleType("torch._inductor.async_compile")
    workers.shutdown_compile_workers = lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, workers.__name__, workers)
    monkeypatch.setattr(Contestant, "run", spends)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    cost = measure_job(JOB)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert cost.cpu >= spent - TICK
    assert spent > 0.05
    assert cost.wall > 0.05
    assert ended


@pytest.mark.nightly
def test_a_real_process_compiles_once() -> None:
    cold, warm = run(replace(JOB, contestant="torch.compile"))
    assert cold.cpu > 2 * warm.cpu


def test_every_depth_is_compiled_by_everybody_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def made_up(job: Job, processes: int) -> list[Cost]:
        jobs.append(job)
        return [Cost(1.0, {"torch.compile": 100.0, "compile-blocks": 20.0}.get(job.contestant, 30.0))] * processes

    monkeypatch.setattr(compiling, "run", made_up)
    told: list[str] = []
    first, second = compile_times(get_depths(["dit-28", "flux-57"]), 2, "cpu", "float32", told.append)
    assert [job.name for job in jobs[:4]] == ["torch.compile", "compile-blocks", "dicompile fora", "dicompile toca"]
    assert jobs[4:8] == jobs[:4]
    assert {job.steps for job in jobs} == {STEPS}
    assert jobs[8].size.config["num_attention_heads"] == 2
    assert "num_layers" not in jobs[8].size.config  # 19 + 38, as published
    assert [(row.whole, row.most_whole, row.most_blocks) for row in first[2:]] == [(0.3, 0.5, 1.5)] * 2
    assert second[2].most_whole == 0.25
    assert told[0] == "DiT, 28 blocks: torch.compile, round 1"


def test_an_unknown_depth_is_named_beside_the_known_ones() -> None:
    with pytest.raises(DicompileError, match=r"'dit-13'(.|\n)*dit-12, dit-28, dit-57, flux-57"):
        get_depths(["dit-13"])


def test_a_job_is_plain_data() -> None:
    job = Job("flux", SUBJECTS["flux"].reduced, "toca", True, 20, "cuda", "bfloat16")
    assert compiling._job(json.dumps(asdict(job))) == job
    assert job.name == "dicompile toca"
