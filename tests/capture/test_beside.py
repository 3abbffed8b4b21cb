"""What a forward reads that lies in no plain attribute: in globals, classes, other threads, behind C, or nowhere yet.

Whatever it is, what is computed after a change of it has to follow, in whichever way the model was captured.
"""

from __future__ import annotations

import array
import contextlib
import copy
import functools
import itertools
import os
import sys
import threading
import weakref
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dicompile.capture import Arguments
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.errors import CannotCapture
from tests.capture import follow
from tests.capture.follow import WAYS, Model, counted, given, optimized, same

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")


class Three:
    """What `Box` may become."""

    def get(self) -> float:
        return 3.0


class Box:
    """Something that holds a number, for its class or for itself."""

    scale = 1.0

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def get(self) -> float:
        return self.scale

    @property
    def found(self) -> float:
        try:
            return self.table["x"]  # type: ignore[attr-defined,no-any-return]
        except KeyError:
            return 1.0


HERE = sys.modules[__name__]
FIRST = Box(scale=1.0)
COUNT = 1.0


def by_key(held: dict[str, float]) -> float:
    try:
        return held["x"]
    except KeyError:
        return 1.0


def by_position(held: list[float]) -> float:
    try:
        return held[1]
    except IndexError:
        return 1.0


def by_attribute(held: Any) -> float:
    try:
        return held.x  # type: ignore[no-any-return]
    except AttributeError:
        return 1.0


def suppressed(held: dict[str, float]) -> float:
    with contextlib.suppress(KeyError):
        return held["x"]
    return 1.0


def matched(held: dict[str, float]) -> float:
    match held:
        case {"x": value}:
            return value
    return 1.0


def imported(_: Any) -> float:
    from array import SCALE_OF_TESTS  # type: ignore[attr-defined]

    return SCALE_OF_TESTS  # type: ignore[no-any-return]


def imported_module(_: Any) -> float:
    import array as module

    return module.SCALE_OF_TESTS  # type: ignore[attr-defined,no-any-return]


def one_of_many(text: str) -> Callable[[Any], float]:
    """A function of this module that reads a name behind 300 others, whose number takes two instructions."""
    made: dict[str, Any] = {}
    others = " + ".join(f"_.name_{number}" for number in range(300))
    source = f"def reads(_):\n    return {others} if COUNT < 0 else {text}\n"
    exec(compile(source, __file__, "exec"), globals(), made)
    return made["reads"]  # type: ignore[no-any-return]


def one() -> float:
    return 1.0


def three() -> float:
    return 3.0


def remembers() -> float:
    return remembers.scale  # type: ignore[attr-defined,no-any-return]


def scaled(scale: float = 1.0) -> float:
    return scale


SCALES = np.ones(2, dtype=np.float32)
SCALE: ContextVar[float] = ContextVar("SCALE", default=1.0)
BESIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], object]]] = {
    "numpy": (lambda: np.ones(2, dtype=np.float32), lambda held: float(held[0]), lambda held: held.fill(3)),
    "numpy global": (lambda: SCALES.fill(1), lambda _: float(SCALES[0]), lambda _: SCALES.fill(3)),
    "array": (lambda: array.array("f", [1.0]), lambda held: held[0], lambda held: held.__setitem__(0, 3.0)),
    "bytearray": (lambda: bytearray([1]), lambda held: held[0], lambda held: held.__setitem__(0, 3)),
    "deque": (lambda: deque([1.0]), lambda held: held[0], lambda held: held.__setitem__(0, 3.0)),
    "context variable": (lambda: SCALE.set(1.0), lambda _: SCALE.get(), lambda _: SCALE.set(3.0)),
    "weak reference": (lambda: weakref.ref(FIRST), lambda held: held().scale, lambda _: setattr(FIRST, "scale", 3.0)),
    "weak method": (
        lambda: weakref.WeakMethod(FIRST.get), lambda held: held()(), lambda _: setattr(FIRST, "scale", 3.0)
    ),
    "method": (lambda: FIRST.get, lambda held: held(), lambda _: setattr(FIRST, "scale", 3.0)),
    "keywords of a partial call": (
        lambda: functools.partial(scaled, scale=1.0), lambda held: held(), lambda held: held.keywords.update(scale=3.0)
    ),
    "object of a partial call": (
        lambda: functools.partial(Box.get, FIRST), lambda held: held(), lambda _: setattr(FIRST, "scale", 3.0)
    ),
    "maps": (lambda: ChainMap({}, {"x": 1.0}), lambda held: held["x"], lambda held: held.update(x=3.0)),
    "attribute of a function": (lambda: remembers, lambda held: held(), lambda held: setattr(held, "scale", 3.0)),
    "code of a function": (lambda: one, lambda held: held(), lambda held: setattr(held, "__code__", three.__code__)),
    "class": (lambda: Box, lambda held: held.scale, lambda held: setattr(held, "scale", 3.0)),
    "class by type": (Box, lambda held: type(held).scale, lambda _: setattr(Box, "scale", 3.0)),
    "class by name": (Box, lambda held: held.__class__.scale, lambda _: setattr(Box, "scale", 3.0)),
    "another class": (Box, lambda held: held.get(), lambda held: setattr(held, "__class__", Three)),
    "in the place of that of the class": (Box, lambda held: held.scale, lambda held: setattr(held, "scale", 3.0)),
    "import": (lambda: None, imported, lambda _: setattr(array, "SCALE_OF_TESTS", 3.0)),
    "imported module": (lambda: None, imported_module, lambda _: setattr(array, "SCALE_OF_TESTS", 3.0)),
    "name behind many": (
        lambda: None, one_of_many("array.SCALE_OF_TESTS"), lambda _: setattr(array, "SCALE_OF_TESTS", 3.0)
    ),
    "sys.modules": (lambda: None, lambda _: sys.modules[__name__].COUNT, lambda _: setattr(HERE, "COUNT", 3.0)),
    "globals": (lambda: None, lambda _: globals()["COUNT"], lambda _: setattr(HERE, "COUNT", 3.0)),
    "no attribute": (Box, lambda held: getattr(held, "x", 1.0), lambda held: setattr(held, "x", 3.0)),
    "hasattr": (Box, lambda held: 3.0 if hasattr(held, "x") else 1.0, lambda held: setattr(held, "x", 3.0)),
    "no attribute, caught": (Box, by_attribute, lambda held: setattr(held, "x", 3.0)),
    "no entry, caught": (dict, by_key, lambda held: held.update(x=3.0)),
    "no entry, in a property": (lambda: Box(table={}), lambda held: held.found, lambda held: held.table.update(x=3.0)),
    "no entry, suppressed": (dict, suppressed, lambda held: held.update(x=3.0)),
    "no entry, by a pattern": (dict, matched, lambda held: held.update(x=3.0)),
    "no item, caught": (lambda: [1.0], by_position, lambda held: held.append(3.0)),
    "copy": (lambda: Box(x=[1.0]), lambda held: sum(copy.copy(held).x), lambda held: held.x.append(2.0)),
    "deep copy": (lambda: Box(x=[1.0]), lambda held: sum(copy.deepcopy(held).x), lambda held: held.x.append(2.0)),
}  # fmt: skip
"""What makes something, what reads it, and what changes it."""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Box, "scale", 1.0)
    monkeypatch.setattr(FIRST, "scale", 1.0)
    monkeypatch.setattr(HERE, "COUNT", 1.0)
    monkeypatch.setattr(array, "SCALE_OF_TESTS", 1.0, raising=False)
    monkeypatch.setattr(remembers, "scale", 1.0, raising=False)
    monkeypatch.setattr(one, "__code__", one.__code__)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.sampled
def test_it_is_followed(kind: str, way: str) -> None:
    make, read, change = BESIDE[kind]

    class Scaled(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.held = make()

        def extra(self, x: Tensor) -> Tensor:
            return x * read(self.held)

    module = Scaled(way).eval()
    model = optimized(module)
    for seed in range(2):
        same(model, module, **given(seed))
    change(module.held)
    for seed in range(2):
        same(model, module, **given(seed))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given_default", [(), (1.0,)])
def test_a_context_variable_in_which_nothing_lay_is_followed(given_default: tuple[float, ...], way: str) -> None:
    unset: ContextVar[float] = ContextVar("unset") if given_default else ContextVar("unset", default=1.0)

    class Scaled(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * unset.get(*given_default)

    module = Scaled(way).eval()
    model = optimized(module)
    for value in (None, 3.0, 2.0):
        token = None if value is None else unset.set(value)
        for seed in range(2):
            same(model, module, **given(seed))
        if token is not None:
            unset.reset(token)
    same(model, module, **given())


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_in_a_context_variable_is_followed(way: str) -> None:
    held: ContextVar[Tensor] = ContextVar("held")
    held.set(torch.tensor(2.0))

    class Scaled(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * held.get()

    module = Scaled(way).eval()
    model = optimized(module)
    same(model, module, **given())
    held.set(torch.tensor(3.0))
    for seed in range(2):
        same(model, module, **given(seed))


def test_what_dynamo_names_in_a_way_that_we_do_not_know_is_run() -> None:
    class Refers(Model):
        def __init__(self) -> None:
            super().__init__("dynamo")
            self.held = weakref.ref(FIRST)

        def extra(self, x: Tensor) -> Tensor:
            return x * self.held().scale  # type: ignore[union-attr]

    with pytest.raises(CannotCapture, match=r"(?s)what the forward reads of self\.held .*does not know"):
        capture_by_dynamo(Refers().eval(), Arguments.of((), given()))


def test_another_precision_of_products_is_captured_anew() -> None:
    module = Model("dynamo").eval()
    model, before = optimized(module), torch.get_float32_matmul_precision()
    same(model, module, **given())
    torch.set_float32_matmul_precision("medium" if before == "high" else "high")
    try:
        same(model, module, **given())
    finally:
        torch.set_float32_matmul_precision(before)
    same(model, module, **given())
    assert counted(model) == 2


@pytest.mark.parametrize("way", WAYS)
def test_an_attribute_that_comes_before_what_a_class_answers_is_followed(way: str) -> None:
    class Asks(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.config = {"scale": 1.0}

        def __getattr__(self, name: str) -> Any:
            return self.__dict__["config"][name] if name == "scale" else super().__getattr__(name)

        def extra(self, x: Tensor) -> Tensor:
            return x * self.scale

    module = Asks(way)
    changes = (
        lambda: module.config.update(scale=2.0),
        lambda: setattr(module, "scale", 3.0),
        lambda: delattr(module, "scale"),
    )
    follow.follow(module, *changes)


ASKS: dict[str, Callable[[], str | None]] = {
    "environ.get": lambda: os.environ.get("DICOMPILE_TEST"),
    "getenv": lambda: os.getenv("DICOMPILE_TEST"),
    "in": lambda: "3.0" if "DICOMPILE_TEST" in os.environ else None,
    "copy": lambda: dict(os.environ).get("DICOMPILE_TEST"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ASKS)
@pytest.mark.sampled
def test_environment_variables_are_followed(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * float(ASKS[kind]() or 1.0)

    module = Scaled(way).eval()
    model = optimized(module)
    same(model, module, **given())
    for value in ("3.0", "2.0"):
        monkeypatch.setenv("DICOMPILE_TEST", value)
        for seed in range(2):
            same(model, module, **given(seed))
    monkeypatch.delenv("DICOMPILE_TEST")
    same(model, module, **given())


class WithDefault(threading.local):
    scale = 1.0


LOCAL = threading.local()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("held", [threading.local(), WithDefault(), LOCAL], ids=["own", "with default", "global"])
def test_every_thread_has_its_own_values(held: Any, way: str) -> None:
    class Scaled(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.held = held

        def extra(self, x: Tensor) -> Tensor:
            found = LOCAL if held is LOCAL else self.held
            return x * getattr(found, "scale", 1.0)

    module = Scaled(way).eval()
    model = optimized(module)

    def compare(scales: Sequence[float | None]) -> None:
        for scale in scales:
            if scale is not None:
                held.scale = scale
            for seed in range(2):
                same(model, module, **given(seed))

    compare([None, 3.0])
    for scales in ([2.0], [None], [None, 3.0, 5.0]):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(compare, scales).result()
        compare([None])


ITERATORS: dict[str, Callable[[], Iterator[float]]] = {
    "list": lambda: iter([1.0, 2.0, 3.0]),
    "range": lambda: iter(range(1, 9)),
    "cycle": lambda: itertools.cycle([1.0, 2.0]),
    "count": itertools.count,
    "generator": lambda: (float(i) for i in range(9)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ITERATORS)
@pytest.mark.sampled
def test_an_iterator_is_refused_by_its_name(kind: str, way: str) -> None:
    class Scaled(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.scales = ITERATORS[kind]()

        def extra(self, x: Tensor) -> Tensor:
            return x * next(self.scales)

    with pytest.raises(CannotCapture, match=r"self\.scales is a \w+, of which the forward takes the next value"):
        optimized(Scaled(way))(**given())
