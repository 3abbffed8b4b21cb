"""What every test gets: fixed seed, few threads, reads of the cache checked, a worker per module, reasons of skips."""

import logging
import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)
    os.environ.setdefault("DICOMPILE_CHECK", "1")
    # pytest listens to every logger that does not propagate; torch would make text of every graph for this one.
    logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in config.getoption("markexpr"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    for item in items:
        # What the tests of a module make once (captures, fixtures) would be made once per worker otherwise.
        if not (item.get_closest_marker("xdist_group") or item.get_closest_marker("spread")):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference traces and routers beside the repository, which is not part of it."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder beside the repository")
    return SHARED
