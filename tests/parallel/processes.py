"""Two processes of a gloo group, which run the cases of a module as tests ask for them."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from dicompile.errors import DicompileError

RANKS = 2
LONGEST = 60
"""Seconds that a rank waits for another one."""


class Ranks:
    """Processes that are started when the first case is asked for; after one has died, when the next one is.

    Args:
        module: whose `CASES` they run: functions of the rank, by name.
        folder: an empty one, in which they find each other.
    """

    def __init__(self, module: str, folder: Path) -> None:
        self._module, self._folder, self._starts = module, folder, 0
        self._found: dict[str, list[Any]] = {}
        self._running: list[tuple[multiprocessing.Process, Connection]] = []

    def __call__(self, name: str) -> list[Any]:
        """What every rank returned in a case, or the error of dicompile that it raised; None if it died."""
        if name not in self._found:
            if not self._running:
                self._start()
            for _, link in self._running:
                link.send(name)
            answers = [_answer(link) for _, link in self._running]
            if None in answers:
                self.stop()
            failed = [text for text, _ in filter(None, answers) if text]
            assert not failed, "\n".join(failed)
            self._found[name] = [answer and answer[1] for answer in answers]
        return self._found[name]

    def check_refused(self, name: str, error: type[Exception], text: str) -> None:
        """Check that every rank raised an error that says how to go on."""
        for raised in self(name):
            assert isinstance(raised, error)
            assert text in str(raised)
            assert raised.fix  # type: ignore[attr-defined]

    def check_a_death_is_told(self) -> None:
        """Check that of two ranks of which one dies the other one is told so, and not left waiting."""
        told, none = self("dying")
        assert told
        assert none is None

    def stop(self) -> None:
        """Let the processes end."""
        for _, link in self._running:
            link.close()
        for process, _ in self._running:
            process.join(LONGEST)
            process.kill()
        self._running = []

    def _start(self) -> None:
        self._starts += 1
        context = multiprocessing.get_context("forkserver")  # what all ranks import is imported once
        context.set_forkserver_preload([self._module])
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            given = rank, str(self._folder / f"store {self._starts}"), self._module, theirs
            process = context.Process(target=_serve, args=given)
            process.start()
            theirs.close()
            self._running.append((process, ours))


@contextlib.contextmanager
def started(module: str, folder: Path) -> Iterator[Ranks]:
    """Ranks, until the end of the block."""
    ranks = Ranks(module, folder)
    try:
        yield ranks
    finally:
        ranks.stop()


def ranks_of(module: str) -> Any:
    """A fixture: ranks that run the cases of a module, the same for all tests of another one."""

    @pytest.fixture(scope="module")
    def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
        with started(module, tmp_path_factory.mktemp("ranks")) as running:
            yield running

    return ranks


def _answer(link: Connection) -> tuple[str, Any] | None:
    try:
        answer: tuple[str, Any] = torch.load(io.BytesIO(link.recv_bytes()), weights_only=False)
    except EOFError:
        return None
    return answer


def _serve(rank: int, store: str, module: str, link: Connection) -> None:
    """Run cases until nobody asks for one any more."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it where there is no accelerator
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=LONGEST)
    )
    cases = importlib.import_module(module).CASES
    with contextlib.suppress(EOFError):
        while True:
            link.send_bytes(_outcome(cases[link.recv()], rank))
    distributed.destroy_process_group()


def _outcome(case: Callable[[int], Any], rank: int) -> bytes:
    """What went wrong, as text, and what a case returned, or the error of dicompile that it raised."""
    failed, found = "", None
    try:
        found = case(rank)
    except DicompileError as error:
        found = error
    except Exception:  # the test of this case fails, and no other one
        failed = traceback.format_exc()
    written = io.BytesIO()
    torch.save((failed, found if isinstance(found, (torch.Tensor, tuple, str, DicompileError)) else None), written)
    return written.getvalue()
