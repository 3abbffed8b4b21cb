"""Streams of an accelerator, where one thread reads what others have queued on streams of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def of(tensor: Tensor) -> torch.Stream | None:
    """The stream on which this thread queues work for the device of a tensor; None for the CPU, which has none."""
    return None if tensor.device.type == "cpu" else torch.accelerator.current_stream(tensor.device)


@contextlib.contextmanager
def after(streams: Iterable[torch.Stream | None]) -> Iterator[None]:
    """While open, what this thread queues comes after all that streams have queued so far; they go on after it.

    The host waits for nothing. Threads of these streams do wait meanwhile.

    Args:
        streams: of other threads, or of this one.
    """
    own = {stream: torch.accelerator.current_stream(stream.device) for stream in streams if stream is not None}
    others = [(stream, ours) for stream, ours in own.items() if stream != ours]
    for stream, ours in others:
        ours.wait_stream(stream)
    try:
        yield
    finally:
        for stream, ours in others:
            stream.wait_stream(ours)


def give(tensor: Tensor, stream: torch.Stream | None) -> Tensor:
    """A tensor that this thread has made, for another one: its memory stays until that one's stream is done with it."""
    if stream is not None:
        tensor.record_stream(stream)
    return tensor


def settle(stream: torch.Stream | None) -> None:
    """Wait for all that any thread has queued for the device of a stream."""
    if stream is not None:
        torch.accelerator.synchronize(stream.device)
