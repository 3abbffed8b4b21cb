"""What README and docs refer to is there, and README stays short."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
from typer.main import get_command

import dicompile
from dicompile import text
from dicompile.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"errors.md", "models.md", "passes.md"}
"""Pages that exist in the site alone; tests/test_site.py checks links to them, too."""
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    gone = [
        link for link in links if "://" not in link and not (page.parent / link).exists() and not is_generated(link)
    ]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"^ {4}(?:\$ )?dicompile ([a-z][a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(known)


def is_generated(link: str) -> bool:
    return link in GENERATED or link.startswith("policies/")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_examples_name_what_there_is(page: Path) -> None:
    """Examples need pipelines and weights, so they are read, not run: names and options have to exist."""
    options = set(inspect.signature(dicompile.optimize).parameters)
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            match node:
                case ast.Attribute(value=ast.Name(id="dicompile"), attr=name):
                    assert hasattr(dicompile, name), name
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "dicompile":
                    assert all(hasattr(importlib.import_module(module), each.name) for each in node.names)
                case ast.Call(func=ast.Attribute(value=ast.Name(id="dicompile"), attr="optimize"), keywords=given):
                    assert {each.arg for each in given} <= options


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_sessions_in_docs_print_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("session")  # what is defined in it has to be found there, as in any module
    monkeypatch.setitem(sys.modules, "session", module)
    session = doctest.DocTestParser().get_doctest(page.read_text(encoding="utf-8"), {}, page.name, str(page), 0)
    session.globs = vars(module)
    found = doctest.DocTestRunner().run(session, clear_globs=False)
    assert found.attempted > 0
    assert found.failed == 0


def test_texts_of_the_source_name_what_there_is() -> None:
    """Errors say which function to call instead, say; docstrings and names of formats, which end so, are left out."""
    paths = [path for folder in ("dicompile", "passes", "runtime") for path in (ROOT / folder).rglob("*.py")]
    told = {name for path in paths for name in re.findall(r"\bdicompile\.([a-z]\w*[a-z])\b(?=[^/\n])", _texts(path))}
    assert told
    absent = [name for name in sorted(told) if not hasattr(dicompile, name)]
    assert [name for name in absent if importlib.util.find_spec(f"dicompile.{name}") is None] == []


def _texts(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [ast.get_docstring(node, clean=False) for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]  # fmt: skip
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(text for text in texts if text not in documented)


def test_sessions_in_docstrings_print_what_they_say() -> None:
    found = doctest.testmod(text)
    assert (found.attempted, found.failed) == (1, 0)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
