"""Classes that are of no Python module, or not of the one whose name they have: what they read is followed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from dicompile.capture.guards import python_module
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of
from tests.capture.follow import WAYS, follow, given, optimized, same

SOURCE = """
import torch
from torch import nn

SCALE = 2.0


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.is_read = way == "running"
        self.linear = nn.Linear(8, 8)

    def forward(self, x, t, mask):
        if self.is_read and mask.any():
            x = x + 1
        return self.linear(x) * torch.cos(t)[:, None, None] * SCALE
"""


def executed(name: str, source: str = SOURCE) -> dict[str, Any]:
    """A namespace that says that it is the module of a name."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(source, f"<{name}>", "exec"), names)
    return names


def imported(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """A module that has little."""
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    python_module.cache_clear()
    return made


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return imported(monkeypatch, "session_of_somebody")


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return imported(monkeypatch, "session_of_somebody_else")


@pytest.mark.parametrize("way", WAYS)
def test_names_of_a_class_that_is_of_no_module_are_followed(way: str, module: types.ModuleType) -> None:
    names = executed(module.__name__)
    net = names["Net"](way)
    assert follow(net, lambda: names.update(SCALE=3.0), lambda: setattr(module, "SCALE", 5.0)) == [1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_so_are_those_of_a_session(way: str, module: types.ModuleType) -> None:
    exec(compile(SOURCE, "<stdin>", "exec"), vars(module))
    assert follow(module.Net(way), lambda: setattr(module, "SCALE", 3.0)) == [1]


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_is_not_there_is_run_to_capture_it(way: str) -> None:
    names = executed("never_imported")
    net = names["Net"](way)
    model = optimized(net)
    for scale in (2.0, 3.0):
        names["SCALE"] = scale
        same(model, net, **given())
    assert record_of(model).calls.is_run
    assert len(model.frames) == 2


def test_parts_may_be_of_namespaces_of_their_own(module: types.ModuleType, other: types.ModuleType) -> None:
    first, second = executed(module.__name__), executed(other.__name__)
    net = nn.Sequential()
    net.first, net.second = first["Net"]("dynamo"), second["Net"]("dynamo")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.parts.second(self.parts.first(x, t, mask), t, mask)

    assert follow(Both(), lambda: first.update(SCALE=3.0), lambda: second.update(SCALE=4.0)) == [1, 1]


def test_two_namespaces_of_one_name_are_refused(module: types.ModuleType) -> None:
    net = nn.Sequential(*(executed(module.__name__)["Net"]("dynamo") for _ in range(2)))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.parts[1](self.parts[0](x, t, mask), t, mask)

    with pytest.raises(CannotCapture, match="two namespaces that are called session_of_somebody"):
        optimized(Both())(**given())


def test_a_name_that_the_module_of_that_name_has_for_something_else_is_run(module: types.ModuleType) -> None:
    names = executed(module.__name__)
    module.SCALE = 7.0
    net = names["Net"]("dynamo")
    model = optimized(net)
    for scale in (2.0, 3.0):
        names["SCALE"] = scale
        same(model, net, **given())
    assert record_of(model).calls.is_run == (torch.__version__ < "2.14")  # which tells one from the other


def test_a_function_of_no_module_that_a_class_calls_is_no_raw_error(module: types.ModuleType) -> None:
    names = executed(module.__name__, "SCALE = 2.0\ndef scaled(x):\n    return x * SCALE")

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scaled = names["scaled"]

        def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.scaled(self.linear(x)) * torch.cos(t)[:, None, None]

    with pytest.raises(CannotCapture, match="scaled is a function of no module"):
        optimized(Calls())(**given())
