"""Servers load a model once, and fork for each of their workers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, threading, time
import torch._inductor.compile_worker.subproc_pool as pools


class Pool:
    def __init__(self, count):
        self.process = os.getpid()

    def shutdown(self):
        print("ended by its own process" if self.process == os.getpid() else "ended by another", flush=True)


pools.SubprocPool = Pool
from dicompile.compiler import ONE_AT_A_TIME
from dicompile.lower import workers

first, compiling = workers._pool(), threading.Event()


def compile_something():
    with ONE_AT_A_TIME:
        compiling.set()
        time.sleep(0.2)


def take_the_lock():
    taken.append(ONE_AT_A_TIME.acquire(timeout=20))


threading.Thread(target=compile_something).start()
compiling.wait()
child, taken = os.fork(), []
thread = threading.Thread(target=take_the_lock)
thread.start()
thread.join()
assert taken == [True], "nobody holds it"
if child == 0:
    assert workers._pool() is not first and workers._pool().process == os.getpid()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert workers._pool() is first
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_compiles_with_workers_of_its_own_and_leaves_those_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ended by its own process"] * 2
