"""Threads with streams of their own: a batch comes after what they have queued, and they go on after it.

A CPU queues nothing, so streams are stood in for; `tests/gpu/test_serve_gpu.py` has real ones.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.runtime import streams
from dicompile.serve import Batcher, together
from tests import models
from tests.runtime.test_streams import Stream
from tests.serve.clients import at_once


class Device:
    """Which thread has which stream, what was waited for, and whose every tensor is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, ...]] = []
        self.given: dict[int, tuple[Tensor, str]] = {}
        self.settled = 0
        self._thread = threading.local()
        monkeypatch.setattr(streams, "of", lambda _: self._thread.stream)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: self._thread.stream)
        monkeypatch.setattr(torch.accelerator, "synchronize", self._synchronize)
        monkeypatch.setattr(streams, "give", self._give)
        run_calls = together.run_calls
        monkeypatch.setattr(together, "run_calls", lambda *args: (self.log.append(("forward",)), run_calls(*args)))

    def use(self, stream: Stream) -> None:
        self._thread.stream = stream

    def _synchronize(self, _: object) -> None:
        self.settled += 1

    def _give(self, tensor: Tensor, stream: Stream) -> Tensor:
        self.log.append(("given to", stream.name))
        self.given[id(tensor)] = tensor, stream.name
        return tensor


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    return Device(monkeypatch)


def served(device: Device, names: list[str], steps: int = 3) -> dict[str, list[Tensor]]:
    """What each request holds after its first step; requests run together, each on the stream of a name."""
    sample = models.plain_dit(layers=2)
    serving = Batcher(sample.model, backend="eager", patience=20.0, sizes=(1, 2))
    times = models.timesteps(steps)
    opened = [serving.request("fora", schedule=times) for _ in names]
    by_name = {name: Stream(name, device.log) for name in names}
    held: dict[str, list[Tensor]] = {}

    def run(name: str, one: Any) -> None:
        device.use(by_name[name])
        with one:
            for i, timestep in enumerate(times):
                models.call(one.model, sample.inputs, timestep, i)
                (context,) = one.session.state_of(one._owner).contexts.values()
                held.setdefault(name, [tensor for tensor in context.store if tensor is not None])

    errors = at_once(*[lambda item=item: run(*item) for item in zip(names, opened, strict=True)])
    assert errors == [None] * len(names)
    assert serving.served().batches == {2: steps}
    return held


def test_a_batch_comes_after_what_every_thread_has_queued_and_they_go_on_after_it(device: Device) -> None:
    held = served(device, ["a", "b"])
    batches = "\n".join(" ".join(item) for item in device.log).split("forward")
    assert len(batches) == 4
    for before, later in itertools.pairwise(batches):
        runner, _, _, other = before.split("\n")[-2].split(" ")
        assert {runner, other} == {"a", "b"}
        given, waits = later.split(f"{other} waits for {runner}")[0], f"{other} waits for {runner}" in later
        assert waits
        assert "waits" not in given
        assert {"given to a", "given to b"} <= set(given.split("\n"))
    for name, tensors in held.items():
        assert tensors
        assert {device.given[id(tensor)][1] for tensor in tensors} == {name}


def test_threads_on_one_stream_wait_for_nothing(device: Device) -> None:
    served(device, ["a", "a"])
    assert not [item for item in device.log if "waits for" in item]


def test_what_a_capture_puts_on_the_device_is_there_before_another_thread_reads_it(device: Device) -> None:
    served(device, ["a", "b"])
    assert 2 <= device.settled <= 3  # of one request, by one thread or by both; and of two
