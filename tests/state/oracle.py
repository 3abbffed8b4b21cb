"""What every run gives in a process that never ran anything: a server that forks for each run, and its client.

The server imports and waits. Each child builds the model, optimizes it, makes one run and ends.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.state.runs import SETUPS, Optimized, Run, Sampling

ROOT = Path(__file__).resolve().parents[2]
TRACING = ("torch._inductor.codecache", "torch._functorch.partitioners", "networkx")
"""What Dynamo imports when it traces for the first time: no child has to."""


class Oracle:
    """Client of the server; asks for every run once."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.state.oracle", str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._known: dict[Run, list[str]] = {}

    def __call__(self, run: Run) -> list[str]:
        """Digests of the outputs of all calls of the run."""
        if run not in self._known:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.write(json.dumps(run.to_json()) + "\n")
            self._server.stdin.flush()
            answer = json.loads(self._server.stdout.readline())
            assert isinstance(answer, list), f"a fresh process cannot make this run: {run}\n{answer}"
            self._known[run] = answer
        return self._known[run]

    def __len__(self) -> int:
        return len(self._known)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)


@functools.cache
def oracle() -> Oracle:
    """The one of this process; it ends with it."""
    return Oracle()


def serve(threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in TRACING:
        importlib.import_module(name)
    for line in sys.stdin:
        run = Run(**json.loads(line))
        SETUPS[run.model].make()  # nor what this imports
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with os.fdopen(writing, "w") as out:
                json.dump(_in_child(run, threads), out)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            answers.write(answer.read() + "\n")
        os.waitpid(child, 0)
        answers.flush()


def _in_child(run: Run, threads: int) -> Any:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        return Sampling(run, Optimized(run.model, run.policy)).finish()
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
