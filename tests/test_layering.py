"""The direction of imports, read with `ast`: capture -> analysis -> plan -> passes -> lower -> runtime.

A module imports only from stages to its left, its own stage and the shared floor. Imports for type checking count: what
a module names, a reader has to know. Imports inside functions count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOOR = (
    "errors", "compat", "config", "debug", "device", "garbage", "gradients", "html", "latest", "lazy", "text", "names",
    "nodes", "opened", "ops", "outside", "parked", "same", "sharded", "store", "tensor_parallel",
)  # fmt: skip
STAGES = ("capture", "analysis", "plan", "passes", "lower", "runtime")
FRONT = (
    "api", "backend", "batch", "bench", "cli", "compare", "compiler", "demo", "learn", "model", "offload", "parallel",
    "pipelines", "progress", "serve", "summary", "wrapper", "zoo",
)  # fmt: skip
MAPPED = ("passes", "runtime")  # top-level folders that install under dicompile
PUBLIC = "__init__"  # dicompile/__init__.py, the public API
USERS = ("bench", "cli", "compare", "demo")  # of the public API, as anybody outside is

ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FLOOR, FLOOR),
    **{stage: FLOOR + STAGES[: i + 1] for i, stage in enumerate(STAGES)},
    "policies": (*FLOOR, "plan", "policies"),
    **dict.fromkeys(FRONT, (*FLOOR, *STAGES, "policies", *FRONT)),
    **dict.fromkeys(USERS, (*FLOOR, *STAGES, "policies", *FRONT, PUBLIC)),
    "zoo": ("errors", "text", "zoo"),
    "__main__": ("cli",),
    PUBLIC: (*FLOOR, *STAGES, "policies", *FRONT),
}


class Violation(NamedTuple):
    file: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}"


class Import(NamedTuple):
    line: int
    name: str
    """Dotted name of what is imported, `a.b.c` for both `import a.b.c` and `from a.b import c`."""


def source_files(root: Path) -> list[Path]:
    return [path for folder in ("dicompile", *MAPPED) for path in sorted((root / folder).rglob("*.py"))]


def module_parts(file: Path) -> tuple[str, ...]:
    """The installed dotted name of a file relative to the root: passes/base.py is dicompile.passes.base."""
    parts = file.with_suffix("").parts
    return ("dicompile", *parts) if parts[0] in MAPPED else parts


def layer_of(module: tuple[str, ...]) -> str:
    """`errors` for dicompile.errors, `plan` for dicompile.plan.action, `__init__` for dicompile itself."""
    return module[1] if len(module) > 1 else PUBLIC


def imports(tree: ast.Module, module: tuple[str, ...]) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module[: len(module) - node.level] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)


def torch_fx_lines(tree: ast.Module) -> Iterator[int]:
    """Lines that write `torch.fx` out, which needs no import of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="fx"):
                yield node.lineno


def broken_rule(layer: str, name: str) -> str | None:
    """The rule that importing `name` in a module of `layer` breaks, if any."""
    parts = tuple(name.split("."))
    if parts[0] in MAPPED:
        return f"import dicompile.{parts[0]}, not {parts[0]}: the bare name loads a second copy of the module"
    if layer == "runtime" and parts[:2] == ("torch", "fx"):
        return "runtime must not see torch.fx"
    if parts[0] != "dicompile":
        return None
    target = layer_of(parts) if layer_of(parts) in ALLOWED else PUBLIC
    if target in ALLOWED[layer]:
        return None
    if target == PUBLIC:
        return f"{layer} must import the module that defines {parts[-1]}, not the public API dicompile"
    return f"{layer} must not import {target}; it may import {', '.join(ALLOWED[layer])}"


def check_file(root: Path, file: Path) -> Iterator[Violation]:
    relative = file.relative_to(root)
    module = module_parts(relative)
    layer = layer_of(module)
    if layer not in ALLOWED:
        yield Violation(relative, 1, f"{layer} has no layer; give it one in tests/test_layering.py")
        return
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    for line, name in imports(tree, module):
        if rule := broken_rule(layer, name):
            yield Violation(relative, line, rule)
    if layer == "runtime":
        yield from (Violation(relative, line, "runtime must not see torch.fx") for line in torch_fx_lines(tree))


def check(root: Path) -> list[Violation]:
    return [violation for file in source_files(root) for violation in check_file(root, file)]


def test_modules_import_only_from_their_left() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in source_files(ROOT)} == {"dicompile", *MAPPED}
    violations = check(ROOT)
    assert not violations, "\n" + "\n".join(map(str, violations))


def plant(root: Path, file: str, source: str) -> list[str]:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return [str(violation) for violation in check(root)]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "dicompile/capture/inputs.py",
            "import os\nfrom dicompile.plan import Plan",
            ":2: capture must not import plan",
        ),
        ("dicompile/analysis/cost.py", "from dicompile import api", ":1: analysis must not import api"),
        ("dicompile/analysis/cost.py", "from ..lower import inductor", ":1: analysis must not import lower"),
        ("dicompile/analysis/__init__.py", "from .. import cli", ":1: analysis must not import cli"),
        ("dicompile/plan/planner.py", "import dicompile.policies.fora", ":1: plan must not import policies"),
        ("dicompile/plan/planner.py", "from dicompile import optimize", ":1: plan must import the module that defines"),
        ("dicompile/plan/planner.py", "import dicompile", ":1: plan must import the module that defines"),
        ("dicompile/policies/fora.py", "from dicompile.lower import x", ":1: policies must not import lower"),
        ("dicompile/text.py", "from dicompile.plan import Plan", ":1: text must not import plan"),
        ("dicompile/lower/inductor.py", "def f():\n    import dicompile.runtime", ":2: lower must not import runtime"),
        ("dicompile/utils.py", "", ":1: utils has no layer"),
        ("passes/base.py", "from dicompile.runtime.slots import x", ":1: passes must not import runtime"),
        ("passes/base.py", "from ..demo import x", ":1: passes must not import demo"),
        ("dicompile/backend.py", "from dicompile import optimize", ":1: backend must import the module that defines"),
        ("dicompile/api.py", "from passes.base import x", ":1: import dicompile.passes, not passes"),
        ("dicompile/api.py", "import runtime", ":1: import dicompile.runtime, not runtime"),
        ("runtime/clock.py", "from torch import fx", ":1: runtime must not see torch.fx"),
        ("runtime/clock.py", "import torch.fx.node", ":1: runtime must not see torch.fx"),
        ("runtime/kernels/scatter.py", "import torch\nx: torch.fx.Node", ":2: runtime must not see torch.fx"),
    ],
)
def test_planted_violation_is_named(tmp_path: Path, file: str, source: str, expected: str) -> None:
    (violation,) = plant(tmp_path, file, source)
    assert violation.startswith(file + expected)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dicompile/__init__.py", "from dicompile.api import optimize\nfrom . import errors"),
        ("dicompile/api.py", "from dicompile import policies\nfrom dicompile.runtime.session import Session"),
        (
            "dicompile/plan/planner.py",
            "from dicompile import errors, text\nfrom .action import Action\nimport torch.fx",
        ),
        ("dicompile/policies/fora.py", "from dicompile.plan.schema import Policy"),
        (
            "dicompile/demo/run.py",
            "import dicompile\nfrom dicompile import optimize\nfrom dicompile.demo import shapes",
        ),
        ("passes/base.py", "from .edit import insert\nfrom dicompile.plan import Plan\nfrom torch import fx"),
        ("runtime/kernels/scatter.py", "from ..slots import x\nfrom dicompile.lower import y\nimport torch"),
    ],
)
def test_import_from_the_left_passes(tmp_path: Path, file: str, source: str) -> None:
    assert plant(tmp_path, file, source) == []
