"""What changes after the first calls is followed, whichever way the module was captured."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import dicompile
from dicompile.capture import Arguments, Guards, capture_call
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of
from tests.capture.follow import WAYS, WIDTH, Model, counted, follow, given, optimized, same
from tests.models import dit, flux, pixart, sd3

FACTOR = 2.0
SETTINGS = SimpleNamespace(factor=2.0, inner=SimpleNamespace(factors=[1.0, 2.0]))


class Kind(enum.Enum):
    PLUS = "plus"
    MINUS = "minus"


class Processor:
    bias = 1.0

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale + self.bias


class Negative(Processor):
    def __call__(self, x: Tensor) -> Tensor:
        return -x * self.scale


@dataclass
class Slotted:
    __slots__ = ("inner", "scale")
    scale: float
    inner: Any


@dataclass
class Plain:
    scale: float = 2.0
    names: list[str] = field(default_factory=lambda: ["a"])


class Base(Model):
    factor = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor


class Held(Base):
    """Holds something of every kind."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.processor = Processor(2.0)
        self.config = {"scale": 2.0, "layers": [1.0, 2.0], "inner": {"deep": {"scale": 3.0}}}
        self.skipped = {"a", "b"}
        self.frozen = frozenset({1})
        self.slotted = Slotted(2.0, Slotted(3.0, None))
        self.plain = Plain()
        self.space = SimpleNamespace(scale=2.0, inner=SimpleNamespace(scale=5.0))
        self.kind = Kind.PLUS
        self.number: Any = 1
        self.pair = (1.0, [2.0])
        self.table = torch.arange(WIDTH) / WIDTH
        self.tables = {"a": torch.ones(WIDTH)}
        self.function = torch.sin
        self.partial = functools.partial(torch.mul, other=2.0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})
        self.chain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(WIDTH))])
        self.drop = nn.Dropout(0.0)
        self.register_buffer("shift", torch.ones(WIDTH))
        self.register_buffer("maybe", None)


def setter(path: str, value: Any) -> Callable[[Held], None]:
    def change(module: Held) -> None:
        *parents, name = path.split(".")
        owner: Any = module
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value() if callable(value) and not isinstance(value, type) else value)

    return change


def blocks(module: Held, x: Tensor) -> Tensor:
    for block in module.blocks:
        x = block(x)
    return x


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def swap_forward(module: Held) -> None:
    old = module.blocks[0].forward
    module.blocks[0].forward = lambda x: old(x) * 2  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "attribute of a processor": (lambda m, x: m.processor(x), setter("processor.scale", 3.0)),
    "new attribute of a processor": (lambda m, x: m.processor(x), setter("processor.bias", 3.0)),
    "new processor": (lambda m, x: m.processor(x), setter("processor", lambda: Processor(3.0))),
    "processor of another class": (lambda m, x: m.processor(x), setter("processor", lambda: Negative(2.0))),
    "value in a dictionary": (lambda m, x: x * m.config["scale"], lambda m: m.config.update(scale=3.0)),
    "deep in a dictionary": (
        lambda m, x: x * m.config["inner"]["deep"]["scale"], lambda m: m.config["inner"]["deep"].update(scale=4.0)),
    "dictionary in a dictionary": (
        lambda m, x: x * m.config["inner"]["deep"]["scale"], lambda m: m.config.update(inner={"deep": {"scale": 4.0}})),
    "key that was not there": (lambda m, x: x * m.config.get("more", 1.0), lambda m: m.config.update(more=2.0)),
    "key asked for": (lambda m, x: x * 2 if "more" in m.config else x, lambda m: m.config.update(more=2.0)),
    "number of keys": (lambda m, x: x * len(m.config), lambda m: m.config.update(more=2.0)),
    "order of keys": (
        lambda m, x: x * (2.0 if next(iter(m.config)) == "scale" else 3.0),
        lambda m: m.config.update(scale=m.config.pop("scale"))),
    "list in a dictionary": (lambda m, x: x * m.config["layers"][1], lambda m: m.config["layers"].__setitem__(1, 7.0)),
    "list that grows": (lambda m, x: x * sum(m.config["layers"]), lambda m: m.config["layers"].append(7.0)),
    "list by index from behind": (lambda m, x: x * m.config["layers"][-1], lambda m: m.config["layers"].append(7.0)),
    "list by slice": (lambda m, x: x * sum(m.config["layers"][:1]), lambda m: m.config["layers"].insert(0, 7.0)),
    "list asked for": (lambda m, x: x * (2.0 if 7.0 in m.config["layers"] else 1.0),
                       lambda m: m.config["layers"].__setitem__(0, 7.0)),
    "set": (lambda m, x: x * 2 if "c" in m.skipped else x, lambda m: m.skipped.add("c")),
    "set of the same size": (lambda m, x: x * 2 if "c" in m.skipped else x, setter("skipped", lambda: {"c", "a"})),
    "set edited": (lambda m, x: x * 2 if "c" in m.skipped else x,
                   lambda m: (m.skipped.remove("a"), m.skipped.add("c"))),
    "frozen set": (lambda m, x: x * 2 if 2 in m.frozen else x, setter("frozen", lambda: frozenset({2}))),
    "object with slots": (lambda m, x: x * m.slotted.scale, setter("slotted.scale", 3.0)),
    "slots in slots": (lambda m, x: x * m.slotted.inner.scale, setter("slotted.inner.scale", 4.0)),
    "dataclass": (lambda m, x: x * m.plain.scale, setter("plain.scale", 3.0)),
    "new dataclass": (lambda m, x: x * m.plain.scale, setter("plain", lambda: Plain(3.0))),
    "list of a dataclass": (lambda m, x: x * len(m.plain.names), lambda m: m.plain.names.append("b")),
    "namespace": (lambda m, x: x * m.space.scale, setter("space.scale", 3.0)),
    "object in an object": (lambda m, x: x * m.space.inner.scale, setter("space.inner.scale", 3.0)),
    "new object in an object": (
        lambda m, x: x * m.space.inner.scale, setter("space.inner", lambda: SimpleNamespace(scale=3.0))),
    "attribute by getattr": (lambda m, x: x * getattr(m.space, "more", 1.0), setter("space.more", 3.0)),
    "attribute by hasattr": (lambda m, x: x * 2 if hasattr(m, "more") else x, setter("more", 3.0)),
    "enum": (lambda m, x: x if m.kind is Kind.PLUS else -x, setter("kind", Kind.MINUS)),
    "enum's value": (lambda m, x: x if m.kind.value == "plus" else -x, setter("kind", Kind.MINUS)),
    "1 and 1.0": (lambda m, x: x * (2 if isinstance(m.number, float) else 3), setter("number", 1.0)),
    "1 and True": (lambda m, x: x * (2 if isinstance(m.number, bool) else 3), setter("number", True)),
    "number": (lambda m, x: x * m.number, setter("number", 7)),
    "number to tensor": (lambda m, x: x * m.number, setter("number", lambda: torch.full((), 3.0))),
    "number to none": (lambda m, x: x if m.number is None else x * m.number, setter("number", lambda: None)),
    "tuple": (lambda m, x: x * m.pair[0], setter("pair", (2.0, [2.0]))),
    "list in a tuple": (lambda m, x: x * m.pair[1][0], lambda m: m.pair[1].__setitem__(0, 5.0)),
    "partial": (lambda m, x: m.partial(x), setter("partial", lambda: functools.partial(torch.mul, other=3.0))),
    "function": (lambda m, x: m.function(x), setter("function", lambda: torch.cos)),
    "plain tensor replaced": (lambda m, x: x * m.table, setter("table", lambda: torch.full((WIDTH,), 3.0))),
    "plain tensor of another shape": (lambda m, x: x * m.table, setter("table", lambda: torch.full((1,), 3.0))),
    "plain tensor edited": (lambda m, x: x * m.table, lambda m: m.table.mul_(2)),
    "tensor in a dictionary": (lambda m, x: x * m.tables["a"], lambda m: m.tables.update(a=torch.full((WIDTH,), 3.0))),
    "buffer replaced": (lambda m, x: x * m.shift, setter("shift", lambda: torch.full((WIDTH,), 3.0))),
    "buffer of another shape": (lambda m, x: x * m.shift, setter("shift", lambda: torch.full((1,), 3.0))),
    "buffer of another dtype": (
        lambda m, x: x * m.shift, setter("shift", lambda: torch.full((WIDTH,), 3.0, dtype=torch.float64))),
    "buffer edited": (lambda m, x: x * m.shift, lambda m: m.shift.data.mul_(3)),
    "buffer that was none": (lambda m, x: x if m.maybe is None else x * m.maybe,
                             setter("maybe", lambda: torch.full((WIDTH,), 3.0))),
    "parameter's data": (lambda m, x: x, lambda m: setattr(m.linear.weight, "data", torch.ones(WIDTH, WIDTH))),
    "parameter": (lambda m, x: x, setter("linear.weight", lambda: nn.Parameter(torch.ones(WIDTH, WIDTH)))),
    "bias dropped": (lambda m, x: x, setter("linear.bias", lambda: None)),
    "submodule replaced": (blocks, lambda m: m.blocks.__setitem__(1, nn.Linear(WIDTH, WIDTH))),
    "submodule of another class": (blocks, lambda m: m.blocks.__setitem__(1, Twice(WIDTH, WIDTH))),
    "submodule's class": (blocks, lambda m: setattr(m.blocks[1], "__class__", Twice)),
    "module list that grows": (blocks, lambda m: m.blocks.append(nn.Linear(WIDTH, WIDTH))),
    "module list that shrinks": (blocks, lambda m: m.blocks.__delitem__(1)),
    "module list turned around": (
        blocks, lambda m: setattr(m, "blocks", nn.ModuleList(reversed(list(m.blocks))))),
    "module dictionary": (lambda m, x: sum(block(x) for block in m.named.values()),
                          lambda m: m.named.update({"b": nn.Linear(WIDTH, WIDTH)})),
    "sequential that grows": (lambda m, x: m.chain(x), lambda m: m.chain.append(nn.Tanh())),
    "parameter list": (lambda m, x: x * sum(m.parts), lambda m: m.parts.append(nn.Parameter(torch.ones(WIDTH)))),
    "child as an attribute": (lambda m, x: m.drop(x), lambda m: setattr(m, "drop", nn.Tanh())),
    "forward of a submodule": (blocks, swap_forward),
    "method of the module": (lambda m, x: m.scaled(x), lambda m: setattr(m, "scaled", lambda x: x * 9)),
    "forward of the module": (lambda m, x: x, lambda m: setattr(m, "extra", lambda x: x * 9)),
    "training flag": (lambda m, x: x * 2 if m.training else x, lambda m: m.train()),
    "training flag of a child": (lambda m, x: x * 2 if m.drop.training else x, lambda m: m.drop.train()),
    "state dict": (blocks, lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})),
    "state dict, assigned": (
        blocks, lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True)),
    "slope hidden by an attribute": (lambda m, x: m.scaled(x), setter("factor", 5.0)),
}  # fmt: skip


def reading(way: str, read: Callable[[Any, Tensor], Tensor]) -> Held:
    """A module with a forward of the test's choice: a method, as Dynamo and people write it."""

    class Reading(Held):
        def extra(self, x: Tensor) -> Tensor:
            return read(self, x)

    return Reading(way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.sampled
def test_what_changes_is_followed(name: str, way: str) -> None:
    read, change = CHANGES[name]
    module = reading(way, read)
    assert follow(module, lambda: change(module))[0] <= 1


EQUAL: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "processor": (lambda m, x: m.processor(x), setter("processor", lambda: Processor(2.0))),
    "dictionary": (lambda m, x: x * m.config["scale"], lambda m: setattr(m, "config", copy.deepcopy(m.config))),
    "set": (lambda m, x: x * 2 if "c" in m.skipped else x, setter("skipped", lambda: {"b", "a"})),
    "dataclass": (lambda m, x: x * m.plain.scale, setter("plain", lambda: Plain(2.0))),
    "slots": (lambda m, x: x * m.slotted.scale, lambda m: setattr(m, "slotted", copy.deepcopy(m.slotted))),
    "namespace": (lambda m, x: x * m.space.scale, lambda m: setattr(m, "space", copy.deepcopy(m.space))),
    "number": (lambda m, x: x * m.config["scale"], lambda m: m.config.update(scale=float("2"))),
    "something that is not read": (lambda m, x: x * m.config["scale"], setter("unread", 1.0)),
    "submodule": (blocks, lambda m: m.blocks.__setitem__(1, nn.Linear(WIDTH, WIDTH))),
    "weights": (blocks, lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()})),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.sampled
def test_an_equal_object_in_the_place_of_another_captures_nothing(name: str, way: str) -> None:
    read, change = EQUAL[name]
    module = reading(way, read)
    assert follow(module, lambda: change(module)) == [0]


@pytest.mark.parametrize("way", WAYS)
def test_going_back_captures_nothing(way: str) -> None:
    module = reading(way, lambda m, x: m.processor(x))
    assert follow(module, *(lambda scale=scale: setattr(module.processor, "scale", scale)
                            for scale in (3.0, 2.0, 3.0, 2.0, 4.0))) == [1, 0, 0, 0, 1]  # fmt: skip


class Globals(Base):
    def extra(self, x: Tensor) -> Tensor:
        return x * FACTOR + SETTINGS.factor * sum(SETTINGS.inner.factors) + Processor.bias + math.pi + self.factor


def global_changes() -> dict[str, tuple[Any, str, Any]]:
    here = sys.modules[__name__]
    return {
        "global": (here, "FACTOR", 3.0),
        "global object": (here, "SETTINGS", SimpleNamespace(factor=3.0, inner=SETTINGS.inner)),
        "attribute of a global object": (SETTINGS, "factor", 3.0),
        "object in a global object": (SETTINGS.inner, "factors", [1.0, 2.0, 3.0]),
        "attribute of a Python module": (math, "pi", 3.0),
        "class attribute": (Base, "factor", 3.0),
        "class attribute of a subclass": (Globals, "factor", 3.0),
        "method of the class": (Globals, "extra", lambda self, x: x * 9),
        "forward of the class": (Base, "forward", lambda self, x, t, mask: x * 9),
        "forward of torch": (nn.Linear, "forward", lambda self, x: x * 9),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", global_changes())
@pytest.mark.sampled
def test_a_global_that_changes_is_followed(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, value = global_changes()[name]
    module = Globals(way)
    with monkeypatch.context() as patch:
        follow(module, lambda: patch.setattr(owner, attribute, value, raising=False), patch.undo)


@pytest.mark.parametrize("way", WAYS)
def test_a_class_attribute_of_a_global_is_followed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        follow(Globals(way), lambda: patch.setattr(Processor, "bias", 3.0), patch.undo)


@pytest.mark.parametrize("way", WAYS)
def test_a_list_in_a_global_object_is_followed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETTINGS, "inner", SimpleNamespace(factors=[1.0, 2.0]))
    follow(Globals(way), lambda: SETTINGS.inner.factors.append(3.0), lambda: SETTINGS.inner.factors.__setitem__(0, 5.0))


@pytest.mark.parametrize("way", WAYS)
def test_a_variable_of_an_enclosing_function_is_followed(way: str) -> None:
    factor, scales = 2.0, [2.0]

    class Closes(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * factor * scales[0]

    def change() -> None:
        nonlocal factor
        factor = 3.0

    follow(Closes(way), change, lambda: scales.__setitem__(0, 5.0))


@pytest.mark.xfail(
    torch.__version__ < "2.12", reason="Dynamo of torch 2.11 guards on no default, nor does torch.compile"
)
def test_a_default_argument_is_followed() -> None:
    class Defaults(Model):
        def extra(self, x: Tensor, factor: float = 2.0, *, shift: float = 1.0) -> Tensor:
            return x * factor + shift

    def change() -> None:
        Defaults.extra.__defaults__ = (3.0,)

    def change_again() -> None:
        Defaults.extra.__kwdefaults__["shift"] = 3.0

    follow(Defaults("dynamo"), change, change_again)


@pytest.mark.parametrize("way", WAYS)
def test_a_property_is_followed(way: str) -> None:
    class Has(Model):
        _scale = 2.0

        @property
        def scale(self) -> float:
            return self._scale

        def extra(self, x: Tensor) -> Tensor:
            return x * self.scale

    module = Has(way)
    follow(module, lambda: setattr(module, "_scale", 3.0), lambda: setattr(Has, "_scale", 5.0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["blocks.0", ""])
@pytest.mark.parametrize("is_before", [False, True])
@pytest.mark.sampled
def test_hooks_that_come_and_go_are_followed(way: str, place: str, is_before: bool) -> None:
    module = reading(way, blocks)
    handles: list[Any] = []

    def add() -> None:
        inner = module.get_submodule(place)
        if is_before and place:
            handles.append(inner.register_forward_pre_hook(lambda _, args: (args[0] * 2,)))
        elif is_before:
            hook = lambda _, args, kwargs: (args, {**kwargs, "x": kwargs["x"] * 2})  # noqa: E731
            handles.append(inner.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(inner.register_forward_hook(lambda _, __, result: result * 2))

    def replace() -> None:
        handles.pop().remove()
        add()

    captured = follow(module, add, replace, lambda: handles.pop().remove())
    assert captured[0] == 1 and captured[-1] == 0


class Scaled:
    """A hook that is an object, or has a method that is one."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, _module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        return result * self.scale

    def scaled(self, _module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        return result * self.scale


def scaled(scale: float) -> Callable[..., Tensor]:
    return lambda _module, _args, result: result * scale


HOOKS: dict[str, Callable[[float], Any]] = {
    "function": scaled,
    "object": Scaled,
    "method": lambda scale: Scaled(scale).scaled,
    "partial": lambda scale: functools.partial(Scaled.__call__, Scaled(scale)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.sampled
def test_a_hook_in_the_place_of_another_is_followed(kind: str, way: str) -> None:
    module = reading(way, blocks)
    handles = [module.get_submodule("blocks.0").register_forward_hook(HOOKS[kind](2.0))]

    def replace() -> None:
        handles.pop().remove()
        handles.append(module.get_submodule("blocks.0").register_forward_hook(HOOKS[kind](3.0)))

    follow(module, replace)


@pytest.mark.parametrize("way", WAYS)
def test_a_setting_of_a_hook_is_followed(way: str) -> None:
    module, hook = reading(way, blocks), Scaled(2.0)
    module.get_submodule("blocks.0").register_forward_hook(hook)
    follow(module, lambda: setattr(hook, "scale", 3.0))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_another_hook_takes_no_capture_of_the_first(way: str) -> None:
    for scale in (2.0, 3.0):
        module = reading(way, blocks)
        module.get_submodule("blocks.0").register_forward_hook(scaled(scale))
        follow(module)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_before", [False, True])
@pytest.mark.sampled
def test_hooks_of_all_modules_that_come_and_go_are_followed(way: str, is_before: bool) -> None:
    handles: list[Any] = []

    def add() -> None:
        if is_before:
            add_hook = nn.modules.module.register_module_forward_pre_hook
            handles.append(add_hook(lambda m, args: (args[0] * 2,) if isinstance(m, nn.Linear) else None))
        else:
            add_hook = nn.modules.module.register_module_forward_hook
            handles.append(add_hook(lambda m, _, result: result * 2 if isinstance(result, Tensor) else None))

    def replace() -> None:
        handles.pop().remove()
        add()

    try:
        captured = follow(reading(way, blocks), add, replace, lambda: handles.pop().remove())
    finally:
        for handle in handles:
            handle.remove()
    assert captured[0] == 1 and captured[-1] == 0


@pytest.mark.parametrize("way", WAYS)
def test_functions_that_the_forward_makes_are_no_state(way: str) -> None:
    def extra(module: Model, x: Tensor) -> Tensor:
        mean, bias = x.mean(-1, keepdim=True), module.linear.bias

        def moved(y: Tensor) -> Tensor:
            return y * mean + bias

        return moved(x)

    module = reading(way, extra)
    assert follow(module, lambda: module.linear.bias.data.mul_(2)) == [0]


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_around_a_function_is_followed(way: str) -> None:
    module = reading(way, lambda m, x: x)
    bias = module.linear.bias
    module.extra = lambda x: x * bias.mean()

    def edit() -> None:
        bias.data.mul_(2)

    def swap() -> None:
        nonlocal bias
        bias = module.linear.bias = nn.Parameter(torch.randn(WIDTH))

    follow(module, edit, swap)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("place", ["the module", "a part"])
def test_a_class_that_is_called_in_a_way_of_its_own_is_followed(place: str, name: str, way: str) -> None:
    class Part(nn.Linear):
        pass

    class Whole(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.linear = Part(WIDTH, WIDTH)

    changed: Any = Whole if place == "the module" else Part

    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = getattr(super(changed, self), name)(*args, **kwargs)
        return result * 2

    module = Whole(way)
    follow(module, lambda: setattr(changed, name, doubled), lambda: delattr(changed, name))
    setattr(changed, name, doubled)
    follow(module)
    delattr(changed, name)


def test_a_call_of_its_own_beside_hooks_of_all_modules_is_refused() -> None:
    class Doubles(Model):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    hook = nn.modules.module.register_module_forward_hook(lambda _, __, ___: None)
    with hook, pytest.raises(CannotCapture, match="Doubles has a __call__ of its own, and all modules have some hooks"):
        optimized(Doubles("dynamo"))(**given())


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_a_module_beside_those_of_all_are_refused(way: str) -> None:
    """Those of all would run around its own, where torch runs them before."""
    module = reading(way, blocks)
    module.register_forward_hook(lambda _, __, result: result + 1)
    hook, refused = (
        nn.modules.module.register_module_forward_hook(lambda _, __, ___: None),
        pytest.raises(CannotCapture),
    )
    with hook, refused as caught:
        optimized(module)(**given())
    assert "has hooks, and all modules have some hooks" in str(caught.value)
    follow(module)


@pytest.mark.parametrize("way", WAYS)
def test_flops_are_counted_without_another_capture(way: str) -> None:
    module, counted = reading(way, blocks), []

    def count() -> None:
        counted.append(FlopCounterMode(display=False))
        counted[-1].__enter__()

    assert follow(module, count, lambda: counted.pop().__exit__(None, None, None)) == [0, 0]
    with FlopCounterMode(display=False):
        follow(reading(way, blocks))


@pytest.mark.parametrize("way", WAYS)
def test_another_dtype_of_all_parameters_is_followed(way: str) -> None:
    module = reading(way, blocks)
    assert follow(module, lambda: module.to(torch.float64), inputs=lambda seed: {
        name: value.to(next(module.parameters()).dtype) if value.is_floating_point() else value
        for name, value in given(seed).items()}) == [1]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_data_of_another_dtype_is_followed(way: str) -> None:
    module = reading(way, lambda m, x: x * m.shift)

    def change() -> None:
        module.shift.data = module.shift.data.double() * 3

    assert follow(module, change) == [1]


@pytest.mark.parametrize("way", WAYS)
def test_tied_weights_that_are_untied_are_followed(way: str) -> None:
    module = reading(way, blocks)
    module.blocks[1].weight = module.blocks[0].weight

    def untie() -> None:
        module.blocks[1].weight = nn.Parameter(module.blocks[0].weight + 1)

    def tie() -> None:
        module.blocks[1].weight = module.blocks[0].weight

    assert follow(module, untie, tie) == [1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_become_tied_are_followed(way: str) -> None:
    module = reading(way, blocks)
    assert sum(follow(module, lambda: setattr(module.blocks[1], "weight", module.blocks[0].weight))) <= 1


@pytest.mark.parametrize("way", WAYS)
def test_a_module_used_twice_is_followed_when_it_is_two(way: str) -> None:
    module = reading(way, blocks)
    module.blocks = nn.ModuleList([module.blocks[0], module.blocks[0]])
    follow(module, lambda: module.blocks.__setitem__(1, nn.Linear(WIDTH, WIDTH)))


class Ambient(Model):
    def extra(self, x: Tensor) -> Tensor:
        scale = torch.ones(1) * 3
        return self.linear(x) * scale.to(torch.get_default_dtype())


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_followed(way: str) -> None:
    module = Ambient(way)
    model = optimized(module)
    for _ in range(2):
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                same(model, module, **given())
    assert counted(model) == 2


@pytest.mark.parametrize("way", WAYS)
def test_inference_mode_is_followed(way: str) -> None:
    module = Ambient(way)
    model = optimized(module)
    for _ in range(2):
        for mode in (True, False):
            with torch.inference_mode(mode):
                same(model, module, **given())


class Attends(Model):
    def extra(self, x: Tensor) -> Tensor:
        heads = self.linear(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_that_attention_may_use_are_followed(way: str) -> None:
    module = Attends(way)
    model = optimized(module)
    for _ in range(2):
        same(model, module, **given())
        with sdpa_kernel(SDPBackend.MATH):  # it leaves its result in another layout
            same(model, module, **given())
    assert counted(model) == 2


class Scales(TorchFunctionMode):
    """Scales what linear maps return, as a mode would exchange attention."""

    def __init__(self, by: float, held: object = None) -> None:
        super().__init__()
        self.by, self.held = by, held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * self.by if func is F.linear else result


@pytest.mark.parametrize("way", WAYS)
def test_modes_around_a_call_are_followed(way: str) -> None:
    module, kept, opaque = Model(way), Scales(2.0), Scales(4.0, threading.Lock())
    model = optimized(module)
    for _ in range(2):
        for mode in (kept, Scales(3.0), Scales(2.0), opaque):
            with mode:
                same(model, module, **given())
        with torch.device("cpu"):
            same(model, module, **given())
    assert counted(model) == 4  # of them two hold the same
    kept.by = 5.0
    with kept:
        same(model, module, **given())
    assert counted(model) == 5


@pytest.mark.parametrize("way", WAYS)
def test_the_default_dtype_is_followed(way: str) -> None:
    module = Ambient(way)
    model = optimized(module)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            same(model, module, **{name: value.float() if name != "mask" else value for name, value in given().items()})
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_on_its_own(way: str) -> None:
    module = reading(way, lambda m, x: m.processor(x))
    model = optimized(module)
    same(model, module, **given())
    twin = copy.deepcopy(model)
    twin.processor.scale = 5.0
    inner = record_of(twin).module
    assert inner is not module and counted(twin) == 0
    for _ in range(2):
        same(twin, inner, **given())
        same(model, module, **given())
    assert module.processor.scale == 2.0 and counted(model) == 1


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_followed_and_every_scale_is_captured_once(way: str) -> None:
    peft = pytest.importorskip("peft")
    module = reading(way, blocks)
    model = optimized(module)
    same(model, module, **given())
    before = counted(model)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["blocks.0", "blocks.1"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    module.eval()
    same(model, module, **given())
    assert counted(model) == before + 1
    for scale, captured in ((0.5, 1), (1.0, 0), (0.5, 0), (0.25, 1), (1.0, 0)):
        before = counted(model)
        for block in module.blocks:
            block.scaling["default"] = scale
        for _ in range(2):
            same(model, module, **given())
        assert counted(model) == before + captured, scale


def test_an_adapter_of_diffusers_is_followed() -> None:
    peft = pytest.importorskip("peft")
    sample = sd3(layers=1)
    model = dicompile.optimize(sample.model, "none", mode="eager")
    plain = model(**sample.inputs)[0]
    sample.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    sample.model.eval()
    for change in (lambda: None, sample.model.disable_adapters, sample.model.enable_adapters):
        change()
        with torch.no_grad():
            wanted = sample.model(**sample.inputs)[0]
        torch.testing.assert_close(model(**sample.inputs)[0], wanted)
    assert not torch.equal(plain, wanted) and counted(model) == 3


def test_frames_that_were_not_used_for_longest_are_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dicompile.model.MOST_FRAMES", 2)
    module = reading("dynamo", lambda m, x: m.processor(x))
    model = optimized(module)
    with caplog.at_level(logging.WARNING, "dicompile"):
        for scale in (1.0, 2.0, 1.0, 3.0):
            module.processor.scale = scale
            same(model, module, **given())
    assert counted(model) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dicompile"]
    assert line.startswith("Reading runs with more than 2 shapes and settings")
    kept = model.frames
    module.processor.scale = 1.0  # 2.0 is the one that went
    same(model, module, **given())
    assert set(map(id, model.frames)) == set(map(id, kept))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [{}, {"y": 1}, {"x": torch.ones(2, 4, 3)}, {"x": "text"}])
@pytest.mark.sampled
def test_a_mistake_of_the_caller_raises_what_it_raises_anyway(way: str, inputs: dict[str, Any]) -> None:
    module = Model(way)
    model = optimized(module)
    inputs = {**given(), **inputs} if inputs else {}
    with pytest.raises(Exception) as wanted:
        module(**inputs)
    with pytest.raises(wanted.type) as found:
        model(**inputs)
    assert str(found.value) == str(wanted.value) and counted(model) == 0
    same(model, module, **given())


def guards_of(module: nn.Module, **inputs: Any) -> Guards:
    return capture_call(module.eval(), Arguments.of((), inputs)).guards


@pytest.mark.parametrize("way", WAYS)
def test_the_text_of_guards_is_stable_and_readable(way: str) -> None:
    class Reads(Held):
        def extra(self, x: Tensor) -> Tensor:
            return self.processor(x) * self.config["scale"] * self.kind.value.count("p") * FACTOR

    texts = []
    for _ in range(2):
        module = Reads(way)
        texts.append(str(guards_of(module, **given())))
    assert texts[0] == texts[1]
    assert "0x" not in texts[0]
    lines = texts[0].splitlines()
    for line in (
        "self.processor is a Processor",
        "self.processor.scale == 2.0 (float)",
        "self.config['scale'] == 2.0 (float)",
        "self.kind == <Kind.PLUS: 'plus'> (Kind)",
        f"{__name__}.FACTOR == 2.0 (float)",
    ):
        assert line in lines, texts[0]


@pytest.mark.parametrize("way", WAYS)
def test_guards_say_what_does_not_hold(way: str) -> None:
    module = reading(way, lambda m, x: m.processor(x))
    guards = guards_of(module, **given())
    module.processor.scale = 3.0
    assert guards.pin(module) == "self.processor.scale == 2.0 (float): it is 3.0 now"


class Runs(nn.Module):
    """A model of diffusers within one that has to be run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, mask: Tensor, **inputs: Any) -> Any:
        return self.model(**inputs) if mask.any() else None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [flux, pixart, dit])
@pytest.mark.sampled
def test_no_path_is_walked_at_an_ordinary_call(make: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make(layers=1)
    module, inputs = sample.model, sample.inputs
    if way == "running":
        module, inputs = Runs(module), {**inputs, "mask": torch.ones(2, dtype=torch.bool)}
    model = optimized(module)
    for _ in range(2):
        model(**inputs)
    assert record_of(model).calls.is_run == (way == "running")
    walked: list[Guards] = []
    pin = Guards.pin
    monkeypatch.setattr(Guards, "pin", lambda self, module: walked.append(self) or pin(self, module))
    for _ in range(10):
        model(**inputs)
    assert len(walked) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_partial_call_that_is_bound_to_a_module_is_a_method_without_code(way: str) -> None:
    module = Model(way)
    module.linear.extra_repr = MethodType(functools.partial(nn.Linear.extra_repr), module.linear)  # as torchao does
    assert follow(module, lambda: None) == [0]
