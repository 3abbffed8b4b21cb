"""What every test gets: fixed seed, few threads, reads of the cache checked, reasons of skips."""

import gc
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dicompile

SHARED = Path(__file__).resolve().parents[2] / "shared"
SPREAD = {
    "tests/passes/test_refresh_zoo.py",
    "tests/pipelines/test_every_pipeline.py",
    "tests/test_coverage.py",
    "tests/test_examples.py",
    "tests/test_golden.py",
}
"""Modules of long tests that share nothing: whichever worker is free takes the next one, after all other modules."""

COUNTING = (
    "tests/capture/",
    "tests/gpu/",
    "tests/lower/test_inductor.py",
    "tests/lower/test_program.py",
    "tests/lower/test_sizes.py",
    "tests/lower/test_variants.py",
    "tests/pipelines/test_offload.py::test_a_call_waits_while_another_thread_captures",
    "tests/runtime/test_release.py",
    "tests/test_api.py::test_a_second_policy_compiles_only_what_no_earlier_one_had",
    "tests/test_garbage.py",
    "tests/test_progress.py",
    "tests/test_warmup.py",
)
"""Where tests count captures or compilations, wait for one, or look at what is said of them: they share neither."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)
    os.environ.setdefault("DICOMPILE_CHECK", "1")
    if not hasattr(config, "workerinput"):  # what tests compile is no business of the user's; workers share it
        folder = tempfile.TemporaryDirectory(prefix="dicompile-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["DICOMPILE_CACHE_DIR"] = folder.name
    # pytest listens to every logger that does not propagate; torch would make text of every graph for this one.
    logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Modules go to workers whole: what their tests make once (captures, fixtures) would be made once per worker.

    Marks cannot say so: with pytest 9.2, pytest-xdist 3.8 ignores xdist_group (pytest-dev/pytest-xdist#1386, open).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::", maxsplit=1)[0]
            return nodeid if module in SPREAD else module

    return ByModule(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen = Counter[str]()
    for item in items:
        family = item.nodeid.partition("[")[0]
        if item.get_closest_marker("sampled") and seen[family] % 5:
            item.add_marker(pytest.mark.nightly)
        seen[family] += 1
    if "nightly" not in config.getoption("markexpr"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


def pytest_collection_finish() -> None:
    """What is imported lives on: looking at it whenever garbage is collected was a sixth of the suite's CPU time.

    Nor need garbage be looked for after every 700 new objects, of which one graph makes many times as many.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_session() -> Iterator[None]:
    """What a test leaves in the middle of a run is remembered by no other one."""
    with dicompile.session():
        yield


@pytest.fixture(scope="module", autouse=True)
def modules_are_like_processes(request: pytest.FixtureRequest) -> None:
    """Tests of one module share captures and compiled code, as everything in a user's process does.

    What modules share lies in the cache folder of the run.
    """
    if request.node.nodeid not in SPREAD:
        dicompile.reset()


@pytest.fixture(autouse=True)
def counting_starts_at_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests count captures or compilations they share none."""
    if request.node.nodeid.startswith(COUNTING):
        dicompile.reset()
        monkeypatch.setenv("DICOMPILE_CACHE_DIR", "off")


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """A test that leaves a transform or a profile function behind fails itself, and not whichever comes after it."""
    yield
    left = torch._C._functorch.peek_interpreter_stack(), sys.getprofile()
    while torch._C._functorch.peek_interpreter_stack() is not None:
        torch._C._functorch.pop_dynamic_layer_stack()
    sys.setprofile(None)
    assert left == (None, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference traces and routers beside the repository, which is not part of it."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder beside the repository")
    return SHARED
