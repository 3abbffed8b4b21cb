"""Arguments of a call, taken apart."""

from __future__ import annotations

import enum
import functools
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dicompile
from dicompile.capture import Arguments, bind_positions
from dicompile.errors import CannotCapture
from tests.capture.follow import WAYS, WIDTH, counted, optimized, same

ONE, TWO = torch.ones(2), torch.zeros(2)


def key(*args: Any, **kwargs: Any) -> tuple[object, ...]:
    return Arguments.of(args, kwargs).key


@dataclass
class Cache:
    value: Any
    mode: str = "read"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), (0, False), ("a", "b"), (None, 0), ([1], (1,)), ([1], [1, 1]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}), (torch.float32, torch.float16), (ONE, torch.ones(3)), (ONE, ONE.double()),
        (ONE, nn.Parameter(ONE)), (torch.ones(2, 3), torch.ones(3, 2).T), (ONE, None), (ONE, 1.0),
        (Cache(1), Cache(2)), (Cache(1), Cache(1.0)), (Cache(ONE), Cache(ONE, "write")),
        (Cache(1), SimpleNamespace(value=1)),
        ([ONE, ONE], [ONE, TWO]), ([ONE, TWO, ONE], [ONE, TWO, TWO]), (math.sin, math.cos),
        (Cache([ONE, ONE]), Cache([ONE, TWO])), (float("nan"), 1.0), ({"a": ONE, "b": 1}, {"a": 1, "b": ONE}),
    ],
)  # fmt: skip
def test_calls_that_differ_share_no_graph(first: Any, second: Any) -> None:
    assert key(x=first) != key(x=second)
    assert key(x=first) == key(x=first)
    assert hash(key(x=first)) == hash(key(x=first))


@pytest.mark.parametrize(
    ("first", "second"),
    [(ONE, TWO), ([ONE, TWO], [TWO, ONE]), (Cache(ONE), Cache(TWO)), (Cache([1, {"a": ONE}]), Cache([1, {"a": TWO}]))],
)
def test_calls_that_differ_in_values_of_tensors_share_one(first: Any, second: Any) -> None:
    assert key(x=first) == key(x=second)


def test_a_tensor_that_is_given_twice_is_one() -> None:
    found = Arguments.of((), {"x": ONE, "y": [TWO, ONE]})
    assert [id(tensor) for tensor in found.tensors] == [id(ONE), id(TWO)]


def test_names_are_those_of_the_forward() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, inner: Any, more: Any = None) -> Tensor:
            return x

    found = Arguments.of((ONE, {"a": [TWO]}), {"more": Cache(torch.ones(1))})
    assert found.names(Takes()) == ["x", "inner.a.0", "more.value"]


def test_arguments_of_a_forward_that_takes_any_have_numbers() -> None:
    class Around(nn.Module):
        def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return x + args[0] + kwargs["more"]

    x, y, z = (torch.ones(2) for _ in range(3))
    assert Arguments.of((x, y), {"more": z}).names(Around()) == ["x", "args.0", "more"]


def test_copies_are_other_tensors_of_the_same_form() -> None:
    x, cache = torch.ones(3, 2).T, Cache(ONE)
    found = Arguments.of((x,), {"cache": cache, "scale": 2.0, "twice": [ONE]})
    copied = found.copied()
    assert copied.key == found.key == Arguments.of(copied.args, copied.kwargs).key
    assert copied.args[0] is not x and copied.args[0].stride() == x.stride()
    assert copied.kwargs["cache"] is not cache and copied.kwargs["cache"].value is copied.kwargs["twice"][0]
    assert cache.value is ONE


def test_open_numbers_are_tensors_and_no_part_of_the_key() -> None:
    found = [Arguments.of((), {"x": ONE, "t": t}, ("t",)) for t in (1.0, 2.0, np.float32(3.0), 4)]
    assert found[0].key == found[1].key == found[2].key != found[3].key
    assert [float(item.tensors[-1]) for item in found] == [1.0, 2.0, 3.0, 4.0]
    assert [item.tensors[-1].dtype for item in found] == [torch.float64] * 3 + [torch.int64]
    assert found[0].given == [ONE] and found[0].numbers == ("t",)
    flag = Arguments.of((), {"x": ONE, "t": True}, ("t",))
    assert flag.numbers == () and flag.key != Arguments.of((), {"x": ONE, "t": False}, ("t",)).key


def test_positions_are_bound_where_one_of_them_is_an_open_number() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, t: float, y: Any = None) -> Tensor:
            return x

    assert bind_positions(Takes(), (ONE, 2.0), {"y": 1}, ("t",)) == ((), {"x": ONE, "t": 2.0, "y": 1})
    assert bind_positions(Takes(), (ONE, ONE), {}, ("t",)) == ((ONE, ONE), {})
    assert bind_positions(Takes(), (2.0, ONE), {}, ("t",)) == ((2.0, ONE), {})


class ShuffledSet(set[Any]):
    """A container whose items in what order nobody knows."""


def circle() -> Cache:
    made = Cache(1.0)
    made.value = [made] * 30
    return made


@pytest.mark.parametrize(
    "value",
    [
        circle(),
        np.ones(2),
        {ONE},
        ShuffledSet([ONE, TWO]),
        iter([1]),
        MappingProxyType({"a": ONE}),
        random.Random(1),
        re.compile("a"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(value: Any) -> None:
    with pytest.raises(CannotCapture, match="holds an object of class"):
        key(x=value)


class Takes(nn.Module):
    """Computes with whatever it is given, and reads a mask in Python if it is to be run."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.is_read = way == "running"
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, scale: Any = 1.0, other: Any = None) -> Tensor:
        if self.is_read and mask.any():
            x = x + 1
        if isinstance(other, Cache):
            x = x + other.value if other.mode == "read" else x - other.value
        elif isinstance(other, dict):
            x = x + sum(other.values())
        elif isinstance(other, Tensor):
            x = x + other
        kind = {bool: 2.0, int: 3.0, float: 4.0}.get(type(scale), 5.0)
        return self.linear(x) * kind * (1.0 if scale is None else scale)


@dataclass(frozen=True, slots=True)
class Settings:
    """A frozen object without a dictionary."""

    kept: Any
    by: float = 1.0


@pytest.mark.parametrize("way", WAYS)
def test_objects_without_a_dictionary_are_looked_into(way: str) -> None:
    class Reads(Takes):
        def forward(self, x: Tensor, mask: Tensor, settings: Any, places: range) -> Tensor:  # type: ignore[override]
            return super().forward(x, mask) * settings.by + settings.kept + len(places)

    module = Reads(way)
    model = optimized(module)
    one, two = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    for settings in (Settings(one), Settings(two), Settings(one, 3.0), Settings(2.0)):
        for places in (range(2), range(3)):
            (inputs,) = calls({"settings": settings, "places": places})
            same(model, module, **inputs)
    assert counted(model) == 6  # values of tensors may differ


def calls(*values: Any) -> list[dict[str, Any]]:
    mask = torch.ones(2, dtype=torch.bool)
    return [{"x": torch.randn(2, WIDTH), "mask": mask, **value} for value in values]


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_argument_is_followed(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    one, two = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    given = calls(
        {"scale": 1}, {"scale": 1.0}, {"scale": True}, {"scale": None}, {"scale": torch.ones(())},
        {"scale": float("nan")},
        {"other": one}, {"other": two}, {"other": {"a": one}}, {"other": {"a": one, "b": two}}, {"other": {"b": one}},
        {"other": Cache(one)}, {"other": Cache(two)}, {"other": Cache(two, "write")}, {"other": {"a": one, "b": one}},
        {"other": {"a": 1.0}}, {"other": {"a": 2.0}},
    )  # fmt: skip
    for _ in range(2):
        for inputs in given:
            same(model, module, **inputs)
    captured = counted(model)
    for inputs in given:
        same(model, module, **inputs)
    assert counted(model) == captured <= len(given)


class Named(dict[str, Any]):
    """A dictionary of a class that pytree does not know."""


class Frozen(OrderedDict[str, Any]):
    """One that nobody can write to after it was made, as the configurations of diffusers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_frozen = True

    def __setitem__(self, key: str, value: Any) -> None:
        assert not hasattr(self, "is_frozen")
        super().__setitem__(key, value)


class ByAttribute(dict[str, Any]):
    """One whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Listed(list[Any]):
    """A list that says what it is for."""

    purpose = "add"


class Pair(NamedTuple):
    first: Any
    second: Any


class Named2(Pair):
    """A tuple that derives from one with names."""


class Mode(enum.Enum):
    ADD = 1
    LEAVE = 2


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "dictionary": lambda y: Named(a=y),
    "frozen": lambda y: Frozen(a=y),
    "by attribute": lambda y: ByAttribute(a=y),
    "list": lambda y: Listed([y]),
    "tuple": lambda y: Named2(y, 2.0),
    "in an object": lambda y: SimpleNamespace(held=Named(a=Listed([y]))),
}


def taken(other: Any) -> Any:
    """The tensor that one of them holds."""
    if isinstance(other, SimpleNamespace):
        return other.held["a"][0]
    if isinstance(other, ByAttribute):
        assert other["a"] is other.a
    return other["a"] if isinstance(other, dict) else other[0]


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("way", WAYS)
def test_containers_of_other_classes_are_looked_into(way: str, kind: str) -> None:
    class Adds(Takes):
        def forward(self, x: Tensor, mask: Tensor, other: Any) -> Tensor:  # type: ignore[override]
            assert type(other) is type(CONTAINERS[kind](1.0))
            return super().forward(x, mask) + taken(other)

    module = Adds(way)
    model = optimized(module)
    for value in (torch.randn(2, WIDTH), torch.randn(2, WIDTH), 1.0, 2.0):
        (inputs,) = calls({"other": CONTAINERS[kind](value)})
        same(model, module, **inputs)
    assert counted(model) == 3  # values of tensors may differ


@pytest.mark.parametrize("way", WAYS)
def test_members_of_enumerations_sets_and_flags_of_numpy_are_what_they_are(way: str) -> None:
    class Reads(Takes):
        def forward(self, x: Tensor, mask: Tensor, mode: Any, flag: Any, sites: Any) -> Tensor:  # type: ignore[override]
            return super().forward(x, mask) + (mode is Mode.ADD) + 2 * bool(flag) + 4 * len(sites) + 8 * (1 in sites)

    module = Reads(way)
    model = optimized(module)
    for _ in range(2):
        for mode in Mode:
            for flag in (np.bool_(True), np.bool_(False)):
                for sites in ({1, 2}, {3, 4}, frozenset([1]), set()):
                    (inputs,) = calls({"mode": mode, "flag": flag, "sites": sites})
                    same(model, module, **inputs)
    assert counted(model) == 16


@pytest.mark.parametrize("way", WAYS)
def test_what_hangs_on_a_tensor_is_followed(way: str) -> None:
    class Reads(Takes):
        def forward(self, x: Any, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, mask) * getattr(x, "by", 1.0)

    module = Reads(way)
    model = optimized(module)
    for _ in range(2):
        for by in (None, 2.0, 3.0):
            (inputs,) = calls({})
            if by is not None:
                inputs["x"].by = by
            same(model, module, **inputs)
    assert counted(model) == 3


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(CannotCapture, match=r"layout torch\.sparse_coo"):
        key(x=torch.eye(3).to_sparse())


def test_items_have_the_names_of_those_of_plain_containers() -> None:
    given = Arguments.of((), {"x": ONE, "other": Named(a=TWO)})
    assert given.names(Takes("dynamo")) == ["x", "other.a"]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tensor_twice_and_then_two(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    x, other = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    mask = torch.ones(2, dtype=torch.bool)
    for first, second in ((x, x), (x, other), (other, other), (other, x)):
        same(model, module, x=first, mask=mask, other=second)
    assert counted(model) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_of_the_module_that_is_given_is_told_from_another(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    weight = module.linear.weight
    mask = torch.ones(2, dtype=torch.bool)
    for other in (weight, nn.Parameter(torch.randn(WIDTH, WIDTH)), weight):
        same(model, module, x=torch.randn(WIDTH, WIDTH), mask=mask, other=other)


@pytest.mark.parametrize("way", WAYS)
def test_not_a_number_is_a_number(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    (inputs,) = calls({"scale": float("nan")})
    for _ in range(3):
        same(model, module, **{**inputs, "scale": float("nan")})
    inputs["x"][0, 0] = float("nan")
    same(model, module, **inputs)
    assert counted(model) == 1


@pytest.mark.parametrize("way", WAYS)
def test_positions_and_names_give_the_same(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    (inputs,) = calls({"other": torch.randn(2, WIDTH)})
    with torch.no_grad():
        wanted = module(**inputs)
    torch.testing.assert_close(model(inputs["x"], inputs["mask"], other=inputs["other"]), wanted)
    torch.testing.assert_close(model(**inputs), wanted)


def test_values_with_nan_that_python_reads_capture_once_more_at_most() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
            return x * 2 if sizes.isnan().any() else x

    module = Reads()
    model = optimized(module)
    x = torch.randn(2, WIDTH)
    for sizes in (torch.tensor([1.0]), torch.tensor([float("nan")]), torch.tensor([float("nan")])):
        same(model, module, x=x, sizes=sizes)


# What a forward does to containers of its caller ----------------------------------------------------------------------


class TakesOut(nn.Module):
    """Takes items out of containers that it is given, as a DiT does with the residuals of its ControlNet."""

    def __init__(self, way: str, *, puts_in: bool = False) -> None:
        super().__init__()
        self.is_read, self.puts_in = way == "running", puts_in
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, given: dict[str, Any]) -> Tensor:
        if self.is_read and mask.any():
            x = x + 1
        scale = given.pop("scale")
        for _ in range(2):
            x = self.linear(x) * scale + given["residuals"].pop()
        del given["residuals"][0]
        if self.puts_in:
            given["residuals"].append(x)
        return x


def residuals() -> tuple[list[Tensor], dict[str, Any]]:
    tensors = [torch.randn(2, WIDTH) for _ in range(4)]
    return tensors, {"scale": 2.0, "residuals": list(tensors), "other": tensors[0]}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_forward_takes_out_of_containers_is_taken_out_at_every_call(way: str) -> None:
    module = TakesOut(way)
    model = optimized(module)
    for _ in range(3):
        tensors, given = residuals()
        x, mask, held = torch.randn(2, WIDTH), torch.ones(2, dtype=torch.bool), given["residuals"]
        got = model(x, mask, given)
        assert given == {"residuals": held, "other": tensors[0]}
        assert len(held) == 1 and held[0] is tensors[1]
        with torch.no_grad():
            wanted = module(x, mask, {"scale": 2.0, "residuals": list(tensors)})
        torch.testing.assert_close(got, wanted)
    assert counted(model) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_puts_something_in_is_refused_and_leaves_all_as_it_was(way: str) -> None:
    tensors, given = residuals()
    with pytest.raises(CannotCapture, match="writes to a list, dictionary or object among its arguments"):
        optimized(TakesOut(way, puts_in=True))(torch.randn(2, WIDTH), torch.ones(2, dtype=torch.bool), given)
    assert list(given) == ["scale", "residuals", "other"]
    assert all(map(is_, given["residuals"], tensors)) and len(given["residuals"]) == 4


# Where tensors lie in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_longer_and_longer_histories_share_a_graph(way: str) -> None:
    module = Takes(way)
    model = optimized(module)
    mask = torch.ones(WIDTH, dtype=torch.bool)
    for length in (3, 4, 6, 9):
        history = torch.randn(2, length, WIDTH)
        same(model, module, x=torch.randn(2, 2, WIDTH), mask=mask, other=history[:, -2:])
    assert counted(model) == 1
    transposed, repeated = torch.randn(2, WIDTH, 2).transpose(1, 2), torch.randn(1, 1, WIDTH).expand(2, 2, WIDTH)
    for other in (transposed, repeated):  # other layouts are computed as they are
        same(model, module, x=torch.randn(2, 2, WIDTH), mask=mask, other=other)
    assert counted(model) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"x": ONE.expand(2, 2)}, {"x": torch.ones(3, 2, 4)[:, :, :1]}, {"x": torch.ones(2, 2, 4)[:, :, :2].double()},
        {"x": torch.ones(2, 2, 4)[:, :, :2], "y": 1}, {"x": torch.ones(2, 2, 2).transpose(0, 1)},
    ],
)  # fmt: skip
def test_only_views_that_differ_in_strides_are_laid_out_anew(other: dict[str, Any]) -> None:
    known = key(x=torch.ones(2, 2, 3)[:, :, :2])
    given = torch.randn(2, 2, 5)
    laid_out = Arguments.of((), {"x": given[:, :, :2]}).laid_out_as(known)
    assert laid_out is not None and laid_out.key == known
    assert laid_out.tensors[0].stride() == (6, 3, 1) and torch.equal(laid_out.tensors[0], given[:, :, :2])
    assert Arguments.of((), other).laid_out_as(known) is None


class Patched(nn.Module):
    """Calls what its caller gives it, as patches of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + patch(self.linear(x)) * timestep[:, None, None]


class Scaled:
    """A callable object."""

    def __init__(self) -> None:
        self.scale = [1.0]

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.scale[0]


class ScaledModule(nn.Module):
    """A module that is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = [1.0]
        self.weight = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scale[0] * self.weight


def closed_over() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    scale = [1.0]
    return lambda y: y * scale[0], scale


def of_object() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    made = Scaled()
    return made, made.scale


def of_method() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    made = Scaled()
    return made.__call__, made.scale


def of_partial() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    scale = [1.0]
    return functools.partial(lambda by, y: y * by[0], scale), scale


def of_default() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    scale = [1.0]

    def patch(y: Tensor, by: list[float] = scale) -> Tensor:
        return y * by[0]

    return patch, scale


def of_module() -> tuple[Callable[[Tensor], Tensor], list[float]]:
    made = ScaledModule()
    return made, made.scale


CALLABLES = [closed_over, of_object, of_method, of_partial, of_default, of_module]


@pytest.mark.parametrize("make", CALLABLES)
def test_what_a_callable_among_the_arguments_holds_is_seen_at_every_call(
    make: Callable[[], tuple[Callable[[Tensor], Tensor], list[float]]],
) -> None:
    patch, scale = make()
    model = Patched()
    optimized = dicompile.optimize(model, "none", backend="eager")
    with torch.no_grad():
        for value in (1.0, 2.0, 1.0):
            scale[0] = value
            inputs = torch.randn(2, 4, 8), torch.ones(2)
            assert torch.equal(optimized(*inputs, patch), model(*inputs, patch))


def test_tensors_that_a_callable_closes_over_are_inputs() -> None:
    by, model = torch.tensor(2.0), Patched()
    optimized = dicompile.optimize(model, "none", backend="eager")
    with torch.no_grad():
        for value in (2.0, 3.0):
            by.fill_(value)
            inputs = torch.randn(2, 4, 8), torch.ones(2)
            assert torch.equal(optimized(*inputs, lambda y: y * by), model(*inputs, lambda y: y * by))


def test_callables_that_hold_the_same_and_do_something_else_are_told_apart() -> None:
    by, model = [2.0], Patched()
    optimized, inputs = dicompile.optimize(model, "none", backend="eager"), (torch.randn(2, 4, 8), torch.ones(2))
    with torch.no_grad():
        for patch in (lambda y: y * by[0], lambda y: y + by[0], lambda y: y * by[0]):
            assert torch.equal(optimized(*inputs, patch), model(*inputs, patch))


def test_a_callable_that_writes_to_what_it_holds_is_refused_by_name() -> None:
    calls = [0]

    def counting(y: Tensor) -> Tensor:
        calls[0] += 1
        return y * calls[0]

    optimized = dicompile.optimize(Patched(), "none", backend="eager")
    with pytest.raises(CannotCapture, match="Patched writes to a list, dictionary or object among its arguments"):
        optimized(torch.randn(2, 4, 8), torch.ones(2), counting)
    assert calls == [0]


def test_functions_that_hold_nothing_stay_what_they_are() -> None:
    seen: list[object] = []

    class Notes(nn.Module):
        def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
            seen.append(function)
            return function(x)

    functions = [torch.sin, F.silu, plain_function, torch.ops.aten.silu, torch.ops.aten.silu.default, doubled]
    for function in functions:
        args, _ = Arguments.of((torch.ones(2), function), {}).filled([torch.zeros(2)])
        Notes()(*args)
    assert all(map(is_, seen, functions))
    assert len(seen) == len(functions)


def plain_function(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2
