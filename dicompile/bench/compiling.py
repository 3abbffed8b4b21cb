"""What compiling costs: fresh processes with empty caches, and again with what the first one left there.

``python -m dicompile.bench.compiling JOB`` is such a process. It builds and prepares the contestant, and then measures
from the first call to the end of the first generation. CPU seconds count what it started, compilers and Inductor's
workers: those are counted once they are waited for, so it ends the workers before it looks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dicompile.bench.contestants import BLOCKS, COMPILED, DoesNotFit, prepare_policy
from dicompile.bench.models import SUBJECTS, pick
from dicompile.bench.results import CompileRow, Cost, compile_rows, median_cost
from dicompile.bench.rivals import prepare
from dicompile.bench.workload import Workload
from dicompile.config import environment_with
from dicompile.errors import DicompileError
from dicompile.zoo import Size

REFUSED = 3
"""Exit status of a process whose contestant does not fit the model."""


@dataclass(frozen=True)
class Job:
    """What a process compiles.

    Attributes:
        model: name of the model.
        size: how large; see `Size`.
        contestant: name of an opponent, or of a policy.
        is_policy: True for a policy of dicompile.
        steps: calls of a generation.
        device: where.
        dtype: of the weights.
    """

    model: str
    size: Size
    contestant: str
    is_policy: bool
    steps: int
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of the contestant, as in the tables."""
        return f"dicompile {self.contestant}" if self.is_policy else self.contestant


@dataclass(frozen=True)
class Depth:
    """A model at a depth, narrow, and what caching may cost there relative to ``torch.compile`` of the plain model."""

    title: str
    model: str
    size: Size
    toca: str
    most_whole: float
    most_blocks: float = 1.5


_NARROW_FLUX = {
    "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [8, 12, 12], "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}  # fmt: skip


def _dit(blocks: int, most: float) -> Depth:
    config = {"num_layers": blocks, "num_attention_heads": 2, "attention_head_dim": 48, "sample_size": 16}
    return Depth(f"DiT, {blocks} blocks", "dit", Size((16, 16), 0, config), "toca", most)


DEPTHS = {
    "dit-12": _dit(12, 1.0),
    "dit-28": _dit(28, 0.5),
    "dit-57": _dit(57, 0.25),
    "flux-57": Depth("FLUX, 19 + 38 blocks", "flux", Size((16, 16), 16, _NARROW_FLUX), "toca", 0.25),
}
"""What the table of compile times is made of."""
STEPS = 20
"""Calls of the first generation: enough for every variant."""


def get_depths(names: Sequence[str]) -> list[Depth]:
    """Rows of the table by name; see `pick`."""
    return pick(DEPTHS, names, "there are no compile times for {}", "dicompile bench --compile-times")


def compile_times(
    depths: Sequence[Depth], rounds: int, device: str, dtype: str, tick: Callable[[str], object]
) -> Iterator[list[CompileRow]]:
    """Cold costs of everybody, depth by depth; contestants take turns.

    Args:
        depths: the models.
        rounds: processes for every contestant.
        device: where.
        dtype: of the weights.
        tick: called before every process.
    """
    for depth in depths:
        job = Job(depth.model, depth.size, COMPILED, False, STEPS, device, dtype)
        jobs = [job, replace(job, contestant=BLOCKS)]
        jobs += [replace(job, contestant=policy, is_policy=True) for policy in ("fora", depth.toca)]
        costs: dict[str, list[Cost]] = {}
        for number in range(rounds):
            for one in jobs:
                tick(f"{depth.title}: {one.name}" + (f", round {number + 1}" if rounds > 1 else ""))
                costs.setdefault(one.name, []).extend(run(one, processes=1))
        medians = {name: median_cost(found) for name, found in costs.items()}
        yield compile_rows(
            depth.title,
            medians,
            whole=COMPILED,
            blocks=BLOCKS,
            most_whole=depth.most_whole,
            most_blocks=depth.most_blocks,
        )


def run(job: Job, processes: int = 2) -> list[Cost]:
    """Costs of processes that follow each other and share caches, which are empty before the first.

    Raises:
        DoesNotFit: the contestant cannot run this model.
        DicompileError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="dicompile-bench-") as folder:
        caches = {f"{name}_CACHE_DIR": str(Path(folder, name.lower())) for name in ("TORCHINDUCTOR", "DICOMPILE")}
        return [_one(job, environment_with(caches)) for _ in range(processes)]


def _one(job: Job, environment: dict[str, str]) -> Cost:
    command = [sys.executable, "-m", "dicompile.bench.compiling", json.dumps(asdict(job))]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException:  # Ctrl-C: the caches go once nobody writes to them
            process.terminate()
            process.wait()
            raise
    last = (output.splitlines() or [""])[-1]
    if process.returncode == REFUSED:
        raise DoesNotFit(last)
    if process.returncode:
        raise DicompileError(
            f"the process that compiles {job.model} for {job.name} failed",
            where="dicompile bench",
            why=(errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1],
            fix=f"run it to see everything: {' '.join(command[:3])} '{command[3]}'",
        )
    return Cost(**json.loads(last))


def _job(text: str) -> Job:
    fields = json.loads(text)
    size = fields.pop("size")
    return Job(size=Size(tuple(size["latent"]), size["text"], size["config"]), **fields)


def measure_job(job: Job) -> Cost:
    """What this process spends from the first call to the end of the first generation.

    Raises:
        DoesNotFit: the contestant cannot run this model.
    """
    from torch._inductor.async_compile import shutdown_compile_workers

    dtype = getattr(torch, job.dtype)
    workload = Workload.of(SUBJECTS[job.model], job.size, job.steps, job.device, dtype)
    contestant = (prepare_policy if job.is_policy else prepare)(job.contestant, workload)
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    contestant.run(workload)
    wall = time.perf_counter() - wall
    shutdown_compile_workers()
    return Cost(wall, sum(os.times()[:4]) - cpu)


def main() -> None:
    """Measure the job that is the argument, and print the cost as the last line."""
    try:
        print(json.dumps(asdict(measure_job(_job(sys.argv[1])))))
    except DoesNotFit as reason:
        print(reason)
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    main()
