"""How a module's result is made of a graph's results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dicompile.errors import CannotCapture
from tests.capture.follow import WAYS, Model, given, optimized

RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda y, x: y,
    "tuple": lambda y, x: (y, y * 2),
    "tuple of one": lambda y, x: (y,),
    "list of one in a tuple": lambda y, x: ([y],),
    "tuple of one in a tuple": lambda y, x: ((y,),),
    "lists of one in a tuple": lambda y, x: ([y], [y * 2]),
    "dictionary in a tuple": lambda y, x: ({"sample": y},),
    "list of one": lambda y, x: [y],
    "samples in a list": lambda y, x: (list(y.unbind(0)),),
    "one twice": lambda y, x: (y, y),
    "other order": lambda y, x: (y * 2, y),
    "what went in": lambda y, x: (y, x),
    "number": lambda y, x: (y, 3),
    "nothing": lambda y, x: (y, None, ()),
    "nested": lambda y, x: {"sample": [y, {"rest": (y * 2, None)}]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.sampled
def test_a_result_is_packed_as_the_model_packs_it(kind: str, way: str) -> None:
    class Packs(Model):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
            return RESULTS[kind](super().forward(x, t, mask), x)

    module = Packs(way)
    model = optimized(module)
    for seed in range(2):
        inputs = given(seed)
        with torch.no_grad():
            wanted, found = module(**inputs), model(**inputs)
        assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
        torch.testing.assert_close(found, wanted)


@dataclass
class Output:
    """What diffusers' output classes look like, but for that pytree does not know it."""

    sample: Any
    steps: int = 3


@dataclass(frozen=True, slots=True)
class Slotted:
    sample: Any


class Answer(dict[str, Any]):
    """A dictionary of a class of its own."""


class Samples(list[Any]):
    """A list of a class of its own."""


class Both:
    """Holds objects that hold tensors."""

    def __init__(self, y: Tensor, x: Tensor) -> None:
        self.first, self.others = Output(y), [Output(x), {"a": Slotted(y * 2)}]


OBJECTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "dataclass": (lambda y, x: Output(y), lambda r: (r.sample, r.steps)),
    "dataclass with slots": (lambda y, x: Slotted(y), lambda r: r.sample),
    "lists in a dataclass": (lambda y, x: Output([y, {"rest": y * 2}]), lambda r: r.sample),
    "namespace": (lambda y, x: SimpleNamespace(sample=y, same=x), lambda r: (r.sample, r.same)),
    "dictionary": (lambda y, x: Answer(sample=y), dict),
    "list": (lambda y, x: Samples([y, y * 2]), list),
    "nested": (
        lambda y, x: {"out": (Both(y, x), 1)},
        lambda r: (
            r["out"][0].first.sample,
            r["out"][0].others[0].sample,
            r["out"][0].others[1]["a"].sample,
            r["out"][1],
        ),
    ),
    "function": (lambda y, x: lambda: y * 2, lambda r: r()),
    "partial call": (lambda y, x: functools.partial(torch.mul, y), lambda r: r(2)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_are_returned_around_what_this_call_has_computed(kind: str, way: str) -> None:
    packs, unpacked = OBJECTS[kind]

    class Packs(Model):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
            return packs(super().forward(x, t, mask), x)

    module = Packs(way)
    model = optimized(module)
    returned = []
    for seed in range(3):
        inputs = given(seed)
        with torch.no_grad():
            wanted, found = module(**inputs), model(**inputs)
        assert type(found) is type(wanted)
        torch.testing.assert_close(unpacked(found), unpacked(wanted))
        returned.append((found, copy.deepcopy(unpacked(wanted))))
    for found, wanted in returned:  # nobody writes to what an earlier call returned
        torch.testing.assert_close(unpacked(found), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_objects_that_hold_no_tensor_of_the_call_are_returned_themselves(way: str) -> None:
    class Returns(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.config = SimpleNamespace(width=8)

        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
            return Output(super().forward(x, t, mask)), self.config, self

    model = optimized(Returns(way))
    for seed in range(2):
        with torch.no_grad():
            output, config, module = model(**given(seed))
        assert isinstance(output, Output) and config is model.config
        assert isinstance(module, nn.Module) and module.linear is model.linear


def loop(y: Tensor) -> Output:
    made = Output(y)
    made.steps = [made] * 30  # type: ignore[assignment]
    return made


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "in a circle": loop,
    "set": lambda y: {y},
    "frozen set": lambda y: frozenset([y]),
    "view of a dictionary": lambda y: MappingProxyType({"sample": y}),
    "values": lambda y: {"sample": y}.values(),
    "iterator": lambda y: iter([y]),
    "generator": lambda y: (one for one in [y]),
    "in an object": lambda y: Output({y}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", REFUSED)
def test_results_that_cannot_be_made_around_other_tensors_are_refused(kind: str, way: str) -> None:
    class Packs(Model):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
            return REFUSED[kind](super().forward(x, t, mask))

    with torch.no_grad(), pytest.raises(CannotCapture, match="the result holds tensors in an object of class"):
        optimized(Packs(way))(**given())
