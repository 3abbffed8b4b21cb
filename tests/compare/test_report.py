"""The report: one file that says everything, needs nothing, and reads well in a real browser."""

from __future__ import annotations

import functools
import json
import re
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dicompile.bench.machine import Machine
from dicompile.compare import Call, Comparison, Quality, Run, write_report
from dicompile.compare.quality import quality_of
from dicompile.plan import Plan, TimestepSchedule, make_plan
from dicompile.policies import FORA, NoCache
from tests.plan.toys import toy

STEPS, BLOCKS = 10, [["self-attention", "mlp"]] * 3
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@functools.cache
def plan(cached: bool) -> Plan:
    return make_plan(toy(BLOCKS), FORA(3) if cached else NoCache(), TimestepSchedule.of(STEPS))


def run(name: str, cached: bool, seconds: tuple[float, ...], psnr: float | None, steps: int = STEPS) -> Run:
    torch.manual_seed(len(name))
    known = plan(cached)
    kinds = [step.kind for step in known.steps][:steps]
    return Run(
        name=name,
        is_cached=cached,
        steps=steps,
        seconds=seconds,
        first_seconds=3.0,
        calls=tuple(Call(kind, 0.1 if kind == "full" else 0.01, 1000 * cached) for kind in kinds),
        flops=known.flops * steps / STEPS,
        cache_bytes=known.cache_bytes if cached else 0,
        plan=known,
        labels=tuple(site.label for site in toy(BLOCKS).everything),
        report="10 calls: 4 full, 6 reuse",
        pictures=torch.rand(3, 3, 32, 32),
        quality=Quality(psnr, 0.9, 0.05 if psnr else 0.0),
        extras={"right\n%": "95.8"},
    )


COMPARISON = Comparison(
    "<b>a model</b>",
    (
        run("as it is", False, (1.2, 1.3), None),
        run("no cache", False, (1.0, 1.1), 143.0),
        run("fora-3", True, (0.5, 0.6), 40.0),
        run("4 steps", False, (0.4, 0.5), 41.0, 4),
    ),
    (("duca-pixart", "it has no cross-attention"),),
    Machine("a CPU, 2 cores", 2, 0.5, {"torch": "2.13.0"}, "2026-11-26", "dicompile compare demo -p fora"),
    ("a <red> square", "a dot"),
)


class Page(HTMLParser):
    """What a page refers to, and which elements it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(COMPARISON, tmp_path_factory.mktemp("report") / "deep")


def test_it_is_one_file_that_refers_to_nothing(page: Path) -> None:
    read = Page(page.read_text())
    assert all(reference.startswith("data:") for reference in read.references)
    assert "script" not in read.tags
    assert not re.search(r"url\(|@import", page.read_text())
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "results.json"]
    assert stat.S_IMODE(page.stat().st_mode) & 0o044  # who serves it may read it


def test_it_says_what_was_found(page: Path) -> None:
    text = page.read_text()
    assert "&lt;b&gt;a model&lt;/b&gt;" in text and "<b>a model" not in text
    assert "a &lt;red&gt; square" in text
    assert "dicompile compare demo -p fora" in text
    assert "it has no cross-attention" in text
    assert "4 steps without a cache take no more operations, and are nearer to the original here" in text
    assert text.count("<img ") == 2 * 3 * len(COMPARISON.runs)
    reused = text.count("reused</title>")
    assert reused == len(plan(True).steps[0].sites) * 3 - text.count("skipped</title>")


def test_figures_are_written_as_data(page: Path) -> None:
    found = json.loads((page.parent / "results.json").read_text())
    assert [each["name"] for each in found["runs"]] == [each.name for each in COMPARISON.runs]
    assert found["runs"][2]["speedup"] == pytest.approx(1.05 / 0.55)
    assert found["refused"] == {"duca-pixart": "it has no cross-attention"}


def test_likeness_is_that_of_the_libraries() -> None:
    reference = torch.rand(2, 3, 32, 32)
    assert quality_of(reference, reference) == Quality(None, 1.0, 0.0, quality_of(reference, reference).flip)
    off = (reference + 0.1).clamp(0, 1)
    found = quality_of(off, reference)
    per_picture = [-10 * torch.log10((a - b).square().mean()).item() for a, b in zip(off, reference, strict=True)]
    assert found.psnr == pytest.approx(sum(per_picture) / 2, abs=1e-3)
    assert found.error == pytest.approx((off - reference).norm().item() / reference.norm().item(), rel=1e-5)
    assert 0 < found.ssim < 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_works_in_a_browser(page: Path, size: str, scheme: Any) -> None:
    """No complaint of the browser, nothing wider than the page, everything by keyboard, enough contrast."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    complaints: list[str] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        width, height = SIZES[size]
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("img.difference >> visible=true").count() == 0
        tab.locator("#show-pictures").focus()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("img.picture >> visible=true").count() == 0
        assert tab.locator("img.difference >> visible=true").count() == 3 * len(COMPARISON.runs)
        closed = tab.locator("details:not([open])").count()
        tab.locator("details:not([open]) summary").first.focus()
        tab.keyboard.press("Enter")
        assert tab.locator("details:not([open])").count() == closed - 1
        assert min(tab.evaluate(CONTRASTS)) >= 4.5
        browser.close()
    assert complaints == []


CONTRASTS = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) && element.checkVisibility());
  return texts.filter(element => !["title", "style"].includes(element.tagName)).map(element => {
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(behind(element))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  });
}"""
"""Contrast of every text with what lies behind it (WCAG 2.2, 1.4.3)."""
