"""Order between streams, which are stood in for: a CPU has none."""

from __future__ import annotations

import pytest
import torch

from dicompile.runtime import streams


class Stream:
    """A stream that does nothing but to note what it waits for."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


def test_they_go_on_after_what_failed() -> None:
    log: list[tuple[str, ...]] = []
    own, other = Stream("own", log), Stream("other", log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_stream", lambda _: own)
        with pytest.raises(ValueError, match="broken"), streams.after([own, other, other]):
            log.append(("forward",))
            raise ValueError("broken")
    assert log == [("own", "waits for", "other"), ("forward",), ("other", "waits for", "own")]


def test_a_stream_is_one_whoever_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> torch.Stream:
        return torch.Stream(stream_id=3, device_index=0, device_type=1)  # of a GPU, which need not be there

    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: stream())
    with streams.after([stream(), stream()]):  # to let it wait would raise here
        pass


def test_on_a_cpu_nothing_is_queued() -> None:
    tensor = torch.ones(2)
    assert streams.of(tensor) is None
    assert streams.give(tensor, None) is tensor
    with streams.after([None, None]):
        streams.settle(None)
