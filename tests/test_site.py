"""The site: built with warnings as errors, a page for everything that has a name, nothing loaded from outside."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dicompile import errors
from dicompile.passes import PASSES
from dicompile.policies import POLICIES
from dicompile.zoo import MODELS

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("material", reason="mkdocs-material is not installed: the extra docs brings it")


class Loaded(HTMLParser):
    """Addresses from which a page loads something, and those of its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
        self.addresses += [value or "" for name, value in attrs if name == names.get(tag)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    said = list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # of the generator's own code
            patch.setenv("NO_MKDOCS_2_WARNING", "1")
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert said == []
    return folder


def headings(page: Path) -> set[str]:
    return set(re.findall(r'<h2 id="([^"]+)"', page.read_text(encoding="utf-8")))


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_every_page_of_docs_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_it_loads_nothing_from_outside(site: Path) -> None:
    for page in site.rglob("*.html"):
        addresses = Loaded(page.read_text(encoding="utf-8")).addresses
        assert [a for a in addresses if "://" in a or a.startswith("//")] == [], page.name


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_has_a_page_made_of_its_data(site: Path, name: str) -> None:
    page = (site / "policies" / f"{name}.html").read_text(encoding="utf-8")
    assert f'<h1 id="{name}">' in page
    assert ('class="lanes"' in page) != ("It does not fit: " in page)
    assert ("FILE" in page) != ("cadence" in page)  # what was trained has no data of its own to show


def test_a_model_an_error_and_a_pass_can_be_looked_up(site: Path) -> None:
    assert set(MODELS) <= set(text_of(site / "models.html").split())
    assert {one.name for one in PASSES} <= headings(site / "passes.html")
    classes = {value for value in vars(errors).values() if inspect.isclass(value)}
    named = {error.__name__.lower() for error in classes if issubclass(error, errors.DicompileError)}
    assert named - {"dicompileerror"} <= headings(site / "errors.html")
    found = text_of(site / "errors.html")
    assert "was not optimized" in found  # a message, with what to do
    assert "dicompile.optimize(model, policy)" in found


def test_the_drawing_in_concepts_is_a_plan(site: Path) -> None:
    assert 'class="lanes"' in (site / "concepts.html").read_text(encoding="utf-8")
