"""What every test gets: fixed seed, few threads, reads of the cache checked, reasons of skips."""

import logging
import os
import sys
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

SHARING = {*SPREAD, "tests/fuzz/test_fuzz.py"} - {"tests/test_examples.py"}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)
    os.environ.setdefault("DICOMPILE_CHECK", "1")
    os.environ["DICOMPILE_CACHE_DIR"] = "off"  # what tests compile is no business of the user's, and they share nothing
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests share no captures and no compiled code, but for long ones that count neither."""
    if request.path.relative_to(request.config.rootpath).as_posix() in SHARING:
        yield
        return
    dicompile.reset()
    yield
    dicompile.reset()


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
