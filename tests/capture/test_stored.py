"""Captures in another process: what was edited in between is captured anew, and what cannot be told stays at home.

Another process is this one after `dicompile.reset()` and with the model's Python imported anew: it has nothing but the
folder.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dicompile
from dicompile.capture import capture_functional, capture_resized
from dicompile.capture.guards import python_module
from tests.models import flux, pixart, plain_dit, timesteps

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function")
T = timesteps(4)
HELPER = '''
import enum, functools, os, torch
SCALE = 1.5
SIZES = [2, 3]
class Mode(enum.Enum):
    ONE = 1.25
MODE = Mode.ONE
@functools.lru_cache
def table(n):
    return n * 0.5
def shifted(x, by=float(os.environ.get("SHIFT", "0.5"))):
    return x + by
def times(factor):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args) * factor
        return wrapper
    return decorate
class Base(torch.nn.Module):
    gain = 3.0
    def scaled(self, x):
        return x * self.gain
class Processor:
    def __init__(self):
        self.kept = 1.0
    def __call__(self, x):
        return x * self.kept * 2.0
'''  # fmt: skip
MODEL = '''
import torch, tests_helper as helper
from tests_helper import SCALE, SIZES, Base, Mode, Processor, shifted, table, times
class Model(Base):
    bias = 0.25
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)
        self.processor = Processor()
    @property
    def half(self):
        return 0.5
    @staticmethod
    def cube(x):
        return x * x * x
    @times(2.0)
    def forward(self, x, t):
        h = self.scaled(self.proj(x)) * SCALE + SIZES[1] + self.bias
        h = shifted(h) * (2.0 if helper.MODE is Mode.ONE else 1.0) + table(3) * self.half
        return x + self.cube(self.processor(h) * helper.SCALE) * t[:, None].float()
'''  # fmt: skip


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "cache"


@pytest.fixture(autouse=True)
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache folder; one for all edits, since each of them meets everything that the others left."""
    path: Path = request.getfixturevalue("shared_folder") if "edit" in request.fixturenames else tmp_path / "cache"
    monkeypatch.setenv("DICOMPILE_CACHE_DIR", str(path))
    return path


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Classes that are captured, in order."""
    done: list[str] = []

    def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        done.append(type(module).__name__)
        return capture_functional(module, *args, **kwargs)

    monkeypatch.setattr("dicompile.capture.shared.capture_functional", capture)
    return done


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., types.ModuleType]]:
    """Writes the model's code with edits, and imports it anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(*edits: tuple[str, str]) -> types.ModuleType:
        texts = {"tests_helper": HELPER, "tests_model": MODEL}
        for old, new in edits:
            assert any(old in text for text in texts.values()), old
            texts = {name: text.replace(old, new) for name, text in texts.items()}
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("tests_model")

    yield write
    for name in ("tests_helper", "tests_model"):
        sys.modules.pop(name, None)


def run(module: types.ModuleType, **attributes: Any) -> None:
    """Run the model as in a process that has run nothing; what comes out is what it computes."""
    dicompile.reset()
    python_module.cache_clear()
    torch.manual_seed(0)
    model = module.Model()
    for name, value in attributes.items():
        setattr(model, name, value)
    optimized = dicompile.optimize(model, "none", schedule=T, backend="eager")
    x, t = torch.randn(2, 8), torch.full((2,), T[0])
    torch.testing.assert_close(optimized(x, t), model(x, t))


def test_another_process_captures_nothing(code: Callable[..., types.ModuleType], captured: list[str]) -> None:
    run(code())
    run(code())
    run(code(("import enum", "# no matter\n\nimport enum"), ("class Model", "# nor that\nclass Model")))
    assert captured == ["Model"]


@pytest.mark.parametrize(
    "edit",
    [
        ("x + self.cube", "x - self.cube"),
        ("return x * x * x", "return x * x"),
        ("return 0.5", "return 0.75"),
        ("bias = 0.25", "bias = 0.125"),
        ("gain = 3.0", "gain = 4.0"),
        ("return x * self.gain", "return x / self.gain"),
        ("@times(2.0)", "@times(3.0)"),
        ("return function(*args) * factor", "return function(*args) + factor"),
        ("SCALE = 1.5", "SCALE = 2.5"),
        ("SIZES = [2, 3]", "SIZES = [2, 4]"),
        ("ONE = 1.25", "ONE = 1.75"),
        ("return n * 0.5", "return n * 0.25"),
        ('"SHIFT", "0.5"', '"SHIFT", "1.5"'),
        ("return x + by", "return x - by"),
        ("self.kept = 1.0", "self.kept = 1.5"),
        ("self.kept * 2.0", "self.kept * 3.0"),
        ("Linear(8, 8)", "Linear(8, 8, bias=False)"),
        ("class Model(Base):", "class Other(Base):\n    bias = 1.0\nclass Model(Other):"),
    ],
    ids=lambda edit: edit[1][:30].partition("\n")[0],
)
@pytest.mark.sampled
def test_edited_code_is_captured_anew(
    edit: tuple[str, str], code: Callable[..., types.ModuleType], captured: list[str]
) -> None:
    run(code())
    captured.clear()
    run(code(edit))
    run(code())
    assert captured == ["Model"], "and what was there before is kept"


def test_a_default_that_the_environment_decides(
    code: Callable[..., types.ModuleType], captured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(code())
    monkeypatch.setenv("SHIFT", "2.5")
    run(code())
    assert len(captured) == 2


def test_what_somebody_put_in_the_place_of_a_function(
    code: Callable[..., types.ModuleType], captured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(code())
    module = code()
    original = module.Model.forward
    module.Model.forward = lambda self, x, t: original(self, x, t) * 2
    run(module)
    assert len(captured) == 2
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: linear(*args) * 2)
    run(code())
    assert len(captured) == 3


def test_code_that_was_edited_after_it_was_imported_is_what_lies_in_memory(
    code: Callable[..., types.ModuleType], captured: list[str], tmp_path: Path
) -> None:
    module = code()
    (tmp_path / "tests_model.py").write_text(MODEL.replace("x + self.cube", "x - self.cube"))
    run(module)
    run(code(("x + self.cube", "x - self.cube")))
    assert len(captured) == 2


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([("def table", "@torch.compiler.assume_constant_result\ndef table"), ("@functools.lru_cache\n", "")], "table"),
        ([("def shifted", "@torch.compiler.allow_in_graph\ndef shifted")], "shifted"),
        (
            [("def shifted(x, by=float(os.environ.get(\"SHIFT\", \"0.5\"))):",
              "@torch.library.custom_op('tests_stored::shifted', mutates_args=())\n"
              "def shifted(x: torch.Tensor) -> torch.Tensor:\n    by = 1.0"),
             ("class Base", "@shifted.register_fake\ndef _(x):\n    return torch.empty_like(x)\nclass Base")],
            "shifted",
        ),
        ([("class Model(Base):", "def make():\n  class Local(torch.nn.Linear):\n    pass\n  return Local\n"
           "class Model(Base):"), ("torch.nn.Linear(", "make()(")], "Local"),
    ],
    ids=["constant result", "allowed in graph", "operator of another library", "local class"],
)  # fmt: skip
def test_what_cannot_be_told_stays_in_its_process(
    edits: list[tuple[str, str]],
    reason: str,
    code: Callable[..., types.ModuleType],
    captured: list[str],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "dicompile")
    run(code(*edits))
    run(code(*edits))
    assert captured == ["Model", "Model"]
    assert not list(folder.rglob("capture-*"))
    said = [line for line in caplog.text.splitlines() if "captured anew in every process" in line]
    assert all(reason in line for line in said)


def test_hooks_and_modules_of_one_kind_only_are_captured_anew(
    code: Callable[..., types.ModuleType], captured: list[str]
) -> None:
    run(code())
    run(code(), bias=0.5)
    dicompile.reset()
    model = code().Model()
    model.proj.register_forward_hook(lambda module, args, result: result * 2)
    optimized = dicompile.optimize(model, "none", schedule=T, backend="eager")
    x, t = torch.randn(2, 8), torch.full((2,), T[0])
    torch.testing.assert_close(optimized(x, t), model(x, t))
    assert len(captured) == 3


@pytest.mark.parametrize("make", [plain_dit, *(pytest.param(m, marks=pytest.mark.nightly) for m in (pixart, flux))])
def test_models_are_captured_once_for_all_processes_and_policies(make: Any, captured: list[str]) -> None:
    outputs = []
    for _ in range(2):
        for policy in ("none", "toca"):
            dicompile.reset()
            torch.manual_seed(0)
            model, inputs = make(2)
            optimized = dicompile.optimize(model, policy, schedule=T, backend="eager")
            result = optimized(**{**inputs, **{n: torch.full_like(v, T[0]) for n, v in inputs.items() if n == "t"}})
            outputs.append(result if isinstance(result, torch.Tensor) else result[0])
    assert len(captured) == 1
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_other_sizes_are_traced_once_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []

    def resized(module: nn.Module, *args: Any) -> Any:
        traced.append(type(module).__name__)
        return capture_resized(module, *args)

    monkeypatch.setattr("dicompile.model.capture_resized", resized)
    monkeypatch.setattr("dicompile.lower.inductor._compiled", lambda graph_module, *_: graph_module.forward)
    sample = plain_dit(1)
    for _ in range(2):
        dicompile.reset()
        model = dicompile.optimize(sample.model, "none", dynamic=True)
        with torch.no_grad():
            model(**sample.inputs)
        assert len(traced) == 1
