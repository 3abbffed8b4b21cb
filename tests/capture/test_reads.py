"""What a forward does besides computing: it counts, fills tables, writes to what it was given, reads globals."""

from __future__ import annotations

import functools
import gc
import random
import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dicompile.capture import Arguments, capture_call
from dicompile.capture.guards import Path, Walk
from dicompile.capture.reads import Reads
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of
from tests.capture.follow import WAYS, WIDTH, Model, counted, follow, given, optimized, same

CALLS = 0
SEEN: list[int] = []


class Counts(Model):
    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.calls = 0
        self.seen: list[int] = []
        self.inner = nn.Module()
        self.inner.calls = 0
        self.table: dict[str, int] = {"calls": 0}


def count(self: Counts) -> float:
    self.calls += 1
    return self.calls


def count_inner(self: Counts) -> float:
    self.inner.calls = self.inner.calls + 1
    return self.inner.calls


def count_table(self: Counts) -> float:
    self.table["calls"] += 1
    return self.table["calls"]


def count_seen(self: Counts) -> float:
    self.seen.append(1)
    return len(self.seen)


def count_global(_: Counts) -> float:
    global CALLS  # noqa: PLW0603
    CALLS += 1
    return CALLS


def count_global_list(_: Counts) -> float:
    SEEN.append(1)
    return len(SEEN)


COUNTERS: dict[str, Callable[[Counts], float]] = {
    "calls": count, "inner": count_inner, "table": count_table, "seen": count_seen, "CALLS": count_global,
    "SEEN": count_global_list,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.sampled
def test_a_counter_is_refused_by_its_name(name: str, way: str) -> None:
    class Counting(Counts):
        def extra(self, x: Tensor) -> Tensor:
            return x * COUNTERS[name](self)

    with pytest.raises(CannotCapture, match="Counting changes what it keeps at every call") as refused:
        optimized(Counting(way))(**given())
    assert name in str(refused.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_counter_in_an_enclosing_function_is_refused(way: str) -> None:
    calls = 0

    class Counting(Model):
        def extra(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return x * calls

    with pytest.raises(CannotCapture, match="Counting changes what it keeps at every call"):
        optimized(Counting(way))(**given())


@pytest.mark.parametrize("way", WAYS)
def test_a_flag_of_the_first_call_settles(way: str) -> None:
    class First(Model):
        is_first = True

        def extra(self, x: Tensor) -> Tensor:
            scale = 2.0 if self.is_first else 3.0
            self.is_first = False
            return x * scale

    module = First(way)
    model = optimized(module)
    model(**given())
    for seed in range(3):
        same(model, module, **given(seed))
    assert counted(model) <= 2


def fill_attribute(self: Any, _: int, made: Tensor) -> Tensor:
    self.table = made if self.table is None else self.table
    return self.table


def fill_buffer(self: Any, _: int, made: Tensor) -> Tensor:
    if self.buffer is None:
        self.buffer = made
    return self.buffer


def fill_dictionary(self: Any, size: int, made: Tensor) -> Tensor:
    if size not in self.tables:
        self.tables[size] = made
    return self.tables[size]


def fill_list(self: Any, _: int, made: Tensor) -> Tensor:
    if not self.list:
        self.list.append(made)
    return self.list[0]


def fill_number(self: Any, size: int, _: Tensor) -> float:
    self.number = size / 2 if self.number is None else self.number
    return self.number


FILLS: dict[str, Callable[[Any, int, Tensor], Any]] = {
    "attribute": fill_attribute, "dictionary": fill_dictionary, "list": fill_list, "buffer": fill_buffer,
    "number": fill_number,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.sampled
def test_a_table_that_is_filled_at_the_first_call_settles(kind: str, way: str) -> None:
    class Fills(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.table: Tensor | None = None
            self.register_buffer("buffer", None)
            self.tables: dict[int, Tensor] = {}
            self.list: list[Tensor] = []
            self.number: float | None = None

        def filled(self, x: Tensor) -> Any:
            made = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            return FILLS[kind](self, x.shape[1], made)

        def extra(self, x: Tensor) -> Tensor:
            return x * self.filled(x)

    module = Fills(way)
    model = optimized(module)
    for seed in range(4):
        same(model, module, **given(seed))
    assert counted(model) <= 2
    before = counted(model)
    for seed in range(4):
        same(model, module, **given(seed))
    assert counted(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_what_a_forward_computes_and_keeps_is_refused(way: str) -> None:
    class Keeps(Model):
        last: Tensor | None = None

        def extra(self, x: Tensor) -> Tensor:
            result = x if self.last is None else x + self.last
            self.last = x
            return result

    module, inputs = Keeps(way), given()
    with pytest.raises(CannotCapture, match="last"):
        optimized(module)(**inputs)


@dataclass(slots=True)
class Record:
    last: Tensor | None = None


class Recorder:
    last: Tensor | None = None


RECORDED: dict[str, Tensor] = {}
LAST: Tensor | None = None


def into_global_dictionary(result: Tensor) -> None:
    RECORDED["last"] = result


def into_global(result: Tensor) -> None:
    global LAST  # noqa: PLW0603
    LAST = result


def into_class(result: Tensor) -> None:
    Recorder.last = result


def into(holder: Any, put: Callable[[Any, Tensor], object]) -> Callable[[Tensor], None]:
    """What puts a result into something that it finds in the function around it."""

    def record(result: Tensor) -> None:
        put(holder, result)

    return record


def into_variable() -> Callable[[Tensor], None]:
    last: Tensor | None = None

    def record(result: Tensor) -> None:
        nonlocal last
        last = result

    assert last is None
    return record


RECORDS: dict[str, Callable[[], Callable[[Tensor], None]]] = {
    "dictionary": lambda: into({}, lambda held, result: held.update(last=result)),
    "copy": lambda: into({}, lambda held, result: held.update(last=result.detach().cpu())),
    "list item": lambda: into([None], lambda held, result: held.__setitem__(0, result)),
    "set": lambda: into(set(), lambda held, result: held.add(result)),
    "deque": lambda: into(deque([0], maxlen=1), lambda held, result: held.append(result)),
    "attribute": lambda: into(Recorder(), lambda held, result: setattr(held, "last", result)),
    "slot": lambda: into(Record(), lambda held, result: setattr(held, "last", result)),
    "object": lambda: into({}, lambda held, result: held.update(last=Record(result))),
    "class": lambda: into_class,
    "variable": into_variable,
    "global": lambda: into_global,
    "global dictionary": lambda: into_global_dictionary,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", RECORDS)
@pytest.mark.sampled
def test_a_hook_that_keeps_what_it_sees_is_refused(where: str, way: str) -> None:
    module, record = Model(way), RECORDS[where]()
    module.linear.register_forward_hook(lambda _module, _args, result: record(result))
    with pytest.raises(CannotCapture, match="Model changes what it keeps at every call"):
        optimized(module)(**given())


def test_what_is_kept_is_never_a_stand_in() -> None:
    module, kept = Model("dynamo"), {"last": torch.zeros(())}
    module.linear.register_forward_hook(lambda _module, _args, result: kept.update(last=result))
    with pytest.raises(CannotCapture, match="last"):
        optimized(module)(**given())
    assert kept["last"].device.type == "cpu" and torch.isfinite(kept["last"]).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_table_beside_the_module_that_is_filled_at_the_first_call_settles(way: str) -> None:
    tables: dict[int, Tensor] = {}

    class Fills(Model):
        def extra(self, x: Tensor) -> Tensor:
            if x.shape[1] not in tables:
                tables[x.shape[1]] = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            return x * tables[x.shape[1]]

    module = Fills(way)
    model = optimized(module)
    for seed in range(3):
        same(model, module, **given(seed))
    assert tables[4].device.type == "cpu"


def test_a_result_that_python_looks_into_is_refused_and_nothing_is_kept() -> None:
    module, kept = Model("dynamo"), [None]
    module.linear.register_forward_hook(lambda _module, _args, result: kept.__setitem__(0, result.numpy()))
    with pytest.raises(CannotCapture, match="Model"):
        optimized(module)(**given())


def test_a_tensor_of_an_enclosing_function_that_is_written_to_is_named() -> None:
    module, seen = Model("dynamo"), torch.zeros(2, 4, WIDTH)
    module.linear.register_forward_hook(lambda _module, _args, result: seen.copy_(result) is None)
    with pytest.raises(CannotCapture, match=r"writes to its inputs: .*seen"):
        optimized(module)(**given())


@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_that_a_forward_replaces_is_refused_if_it_was_read_before(way: str) -> None:
    class Keeps(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.register_buffer("last", torch.zeros(()))

        def extra(self, x: Tensor) -> Tensor:
            result = x + self.last
            self.last = x.mean()
            return result

    module, inputs = Keeps(way), given()
    before = module.last
    with pytest.raises(CannotCapture, match="last"):
        optimized(module)(**inputs)
    assert way == "dynamo" or module.last is before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["x", "buffer"])
def test_a_write_is_refused_and_leaves_everything_as_it_was(what: str, way: str) -> None:
    class Writes(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.register_buffer("buffer", torch.zeros(WIDTH))

        def extra(self, x: Tensor) -> Tensor:
            (self.buffer if what == "buffer" else x).add_(1)
            return x + self.buffer

        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            if self.is_read and mask.any():
                t = t + 1
            return self.linear(x) * torch.cos(t)[:, None, None] + self.extra(x)

    module, inputs = Writes(way), given()
    kept = {name: value.clone() for name, value in inputs.items()}
    with pytest.raises(CannotCapture, match=f"writes to its inputs: .*{what}"):
        optimized(module)(**inputs)
    assert all(torch.equal(inputs[name], value) for name, value in kept.items())
    assert torch.equal(module.buffer, torch.zeros(WIDTH))


class Sizes(Model):
    """Reads values of a buffer in Python."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.register_buffer("kept", torch.tensor([True, False, True, True]))

    def extra(self, x: Tensor) -> Tensor:
        return x * 2 if self.kept.all() else x * sum(self.kept.tolist())


def test_values_of_a_buffer_that_python_reads_are_followed() -> None:
    module = Sizes("running")
    edit = module.kept.data
    assert follow(module, lambda: edit.fill_(True), lambda: edit[0].fill_(False), lambda: edit.fill_(True)) == [1, 1, 0]


def test_values_of_a_buffer_are_followed_in_inference_mode() -> None:
    module = Sizes("running")
    model = optimized(module)
    with torch.inference_mode():
        for value in (True, False, True):
            module.kept[0] = value
            same(model, module, **given())


def test_values_of_a_buffer_that_is_replaced_are_followed() -> None:
    module = Sizes("running")
    follow(module, lambda: setattr(module, "kept", torch.ones(4, dtype=torch.bool)))


def test_values_of_a_plain_tensor_are_followed() -> None:
    class Plain(Model):
        def __init__(self, way: str) -> None:
            super().__init__(way)
            self.sizes = torch.tensor([1, 2])

        def extra(self, x: Tensor) -> Tensor:
            return x * sum(self.sizes.tolist())

    module = Plain("running")
    follow(module, lambda: module.sizes.fill_(5), lambda: setattr(module, "sizes", torch.tensor([7, 8])))


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_of_nobody_is_refused_or_followed(way: str) -> None:
    table = {"a": torch.ones(WIDTH)}

    class Uses(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * table["a"]

    module = Uses(way)
    try:
        follow(module, lambda: table.update(a=torch.full((WIDTH,), 3.0)), lambda: table["a"].fill_(4.0))
    except CannotCapture as refused:
        assert "whether it is the same at the next call cannot be told" in str(refused)


TABLE = torch.ones(WIDTH)


@pytest.mark.parametrize("way", WAYS)
def test_a_global_tensor_is_followed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Uses(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * TABLE

    here = sys.modules[__name__]
    monkeypatch.setattr(here, "TABLE", torch.ones(WIDTH))
    follow(Uses(way), lambda: setattr(here, "TABLE", torch.full((WIDTH,), 3.0)), lambda: TABLE.fill_(4.0))


@functools.lru_cache
def cached(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_remembers_is_refused_or_right(way: str) -> None:
    class Cached(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * cached(x.shape[-1])

    try:
        follow(Cached(way))
    except CannotCapture as refused:
        assert "whether it is the same at the next call cannot be told" in str(refused)


@pytest.mark.parametrize("way", WAYS)
def test_random_numbers_are_drawn_at_every_call_or_refused(way: str) -> None:
    class Draws(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape)

    model = optimized(Draws(way))
    first, second = model(**given()), model(**given())
    assert not torch.equal(first, second)


def test_an_array_that_is_too_large_to_be_compared_is_refused() -> None:
    class Scaled(Model):
        def __init__(self) -> None:
            super().__init__("running")
            self.held = np.ones(1 << 19)

        def extra(self, x: Tensor) -> Tensor:
            return x * float(self.held[0])

    with pytest.raises(CannotCapture, match=r"self\.held is too large"):
        optimized(Scaled())(**given())


OWN_SOURCE = np.random.default_rng(0)
DRAWS: dict[str, Callable[[], float]] = {
    "random.random": random.random,
    "random.uniform": lambda: random.uniform(0, 1),
    "np.random": np.random.rand,
    "own": lambda: float(OWN_SOURCE.random()),
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.sampled
def test_random_numbers_of_others_are_refused_where_they_are_drawn(kind: str, way: str) -> None:
    class Draws(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * DRAWS[kind]() if self.is_drawing else x

    module = Draws(way)
    module.is_drawing = True
    with pytest.raises(CannotCapture, match="Draws changes what it keeps at every call"):
        optimized(module)(**given())
    module.is_drawing = False
    same(optimized(module), module, **given())


@pytest.mark.parametrize("way", WAYS)
def test_random_numbers_of_a_generator_of_its_own_are_refused(way: str) -> None:
    class Draws(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator)

    module = Draws(way)
    module.generator = torch.Generator()
    told = "cannot be traced" if torch.__version__ < "2.12" else "computes with a Generator of its own"
    with pytest.raises(CannotCapture, match=told):
        optimized(module)(**given())


def test_nothing_stays_behind_after_a_run() -> None:
    look_up, fallback, profile = nn.Module.__getattribute__, nn.Module.__getattr__, sys.getprofile()
    for module in (Model("running"), Counts("running")):
        capture_call(module, Arguments.of((), given()))
    with pytest.raises(AttributeError):
        capture_call(Sizes("running"), Arguments.of((), {**given(), "mask": "text"}), by_running=True)
    assert (nn.Module.__getattribute__, nn.Module.__getattr__, sys.getprofile()) == (look_up, fallback, profile)
    assert "__getattribute__" not in vars(nn.Module)


def test_a_walk_finds_what_python_finds() -> None:
    module = Sizes("running")
    walk = Walk(module)
    assert walk.find(Path().attribute("linear").attribute("weight")) is module.linear.weight
    assert walk.find(Path().attribute("kept")) is module.kept
    assert walk.find(Path().attribute("gone")) is None
    assert walk.find(Path(__name__).attribute("SEEN")) is SEEN


def test_a_model_that_was_run_once_is_not_shown_to_dynamo_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Model("running")
    model = optimized(module)
    same(model, module, **given())
    monkeypatch.setattr("dicompile.capture.call.capture_by_dynamo", lambda *_: pytest.fail("asked again"))
    inputs = given()
    inputs["mask"][:] = False
    same(model, module, **inputs)
    assert counted(model) == 2 and record_of(model).calls.is_run


@pytest.mark.parametrize("allocations", range(1, 20))
@pytest.mark.sampled
def test_a_collection_at_any_moment_hides_no_read(allocations: int) -> None:
    """Python may collect garbage while the callbacks that tell of it are registered, one by one."""
    module = Model("running")
    reads, thresholds = Reads(module, {}), gc.get_threshold()
    gc.collect()
    gc.set_threshold(allocations, 1000, 1000)
    try:
        with reads.noted():
            assert module.is_read
    finally:
        gc.set_threshold(*thresholds)
    assert Path().attribute("is_read") in reads.facts


class AsksForFrameworks(Model):
    def extra(self, x: Tensor) -> Tensor:
        return x * 2 if "torch" in sys.modules else x


def test_an_import_changes_nothing_for_who_asks_which_modules_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        monkeypatch.setitem(sys.modules, "just_loaded", types.ModuleType("just_loaded"))

    for number in range(5000):  # more than are compared of any other dictionary
        monkeypatch.setitem(sys.modules, f"loaded_{number}", types.ModuleType(f"loaded_{number}"))
    assert follow(AsksForFrameworks("running"), load) == [0]
