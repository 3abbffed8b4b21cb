"""What a user gets: the sdist, the wheel made from it, and that wheel in a clean environment, away from the sources."""

import ast
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED_AS = {"dicompile": "dicompile", "passes": "dicompile/passes", "runtime": "dicompile/runtime"}
PACKAGED = {".j2", ".json", ".md", ".py", ".safetensors", ".typed", ".yaml"}
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "cache_dit": "cache-dit",
    "flash_attn": "flash-attn",
    "flip_evaluator": "flip-evaluator",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packaged_files() -> Iterator[tuple[str, str]]:
    """Each file of the three source folders that has to be installed, with its path in the wheel."""
    for folder, target in INSTALLED_AS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in PACKAGED:
                yield path.relative_to(ROOT).as_posix(), f"{target}/{path.relative_to(ROOT / folder).as_posix()}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the sdist; from a copy of the tree, as build/ in the tree may hold modules deleted since."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in INSTALLED_AS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", tree, cwd=tree)
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with only the wheel in it; its dependencies are those of the environment of the tests."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # Lines of a .pth file are only put on the path: the .pth file of an editable dicompile there is not followed.
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (purelib / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
    return home


PROGRAM = """
import json, sys
import torch._dynamo
from torch._dynamo.backends.registry import lookup_backend
found = {"is listed": "dicache" in torch._dynamo.list_backends(exclude_tags=())}
found["imported"] = [name for name in sys.modules if name.split(".")[0] == "dicompile"]
found["backend"] = lookup_backend("dicache").__module__
import dicompile, dicompile.passes, dicompile.runtime
found["files"] = [dicompile.__file__, dicompile.passes.__file__, dicompile.runtime.__file__]
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def found(installed: Path) -> dict[str, Any]:
    """What a process finds in that environment."""
    told: dict[str, Any] = json.loads(run(installed / "bin" / "python", "-I", "-c", PROGRAM, cwd=installed))
    return told


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    missing = [source for source, target in packaged_files() if target not in in_wheel]
    assert not missing, f"not in the wheel; extend packages or package-data in pyproject.toml: {missing}"


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    expected = {target for _, target in packaged_files()}
    extra = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} - expected
    assert not extra


def test_installed_copy_imports(found: dict[str, Any], installed: Path) -> None:
    for file in found["files"]:
        assert Path(file).is_relative_to(installed)


def test_command_prints_help(installed: Path) -> None:
    assert "Usage: dicompile" in run(installed / "bin" / "dicompile", "--help", cwd=installed)


def test_backend_is_listed_without_importing_dicompile(found: dict[str, Any]) -> None:
    assert found["is listed"]
    assert found["imported"] == []


def test_backend_loads(found: dict[str, Any]) -> None:
    assert found["backend"] == "dicompile.backend"


def imported_distributions() -> set[str]:
    names = set()
    for source, _ in packaged_files():
        if source.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
    third_party = names - set(sys.stdlib_module_names) - {"dicompile"}
    return {DISTRIBUTION_OF.get(name, name).lower() for name in third_party}


def test_declared_dependencies_are_those_imported(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required, optional = set(), set()
    for requirement in message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", []):
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        (optional if "extra ==" in requirement else required).add(name)
    imported = imported_distributions()
    assert imported <= required | optional, f"imported but not declared: {imported - required - optional}"
    assert required <= imported, f"declared but never imported: {required - imported}"
