"""A comparison as one HTML file that needs nothing else: no network, no scripts, light and dark, on paper, too.

What there is to choose and to open is done by the browser (radio buttons, ``<details>``), drawings are SVG in the page
whose parts say what they are, to a pointer and to a screen reader.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from torch import Tensor

from dicompile.compare.results import Comparison, Run, decibels
from dicompile.plan import Plan
from dicompile.store import written_whole
from dicompile.text import size_text

MOST_PICTURES = 8
EDGE = 256
"""Pictures are shown at most so large, in pixels."""
SMALL = 96
"""Pictures up to this size are enlarged without smoothing."""
GAIN = 4
"""Differences are shown so much stronger than they are."""
EXACT = 100.0
"""Decibels from which on nothing but rounding differs."""
SYMBOLS = {
    "F": ("full", "computed"),
    "t": ("tokens", "some tokens computed"),
    "b": ("blend", "blended"),
    "f": ("forecast", "forecast"),
    ".": ("reuse", "reused"),
    "-": ("skip", "skipped"),
}
"""Class and words for every symbol of a plan."""
KINDS = {"full": "full", "partial": "tokens", "mixed": "blend", "reuse": "reuse", "skip": "skip"}
"""Colour of every kind of step."""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write ``index.html`` and ``results.json``; each appears whole or not at all.

    Args:
        comparison: what to show.
        folder: made if it is missing.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", comparison.to_json() + "\n"), ("index.html", page(comparison))):
        with written_whole(folder / name, for_all=True) as file:
            file.write(text.encode())
    return folder / "index.html"


def page(comparison: Comparison) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dicompile.compare", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"decibels": decibels, "size": size_text, "times": lambda x: f"{x:.2f}x"}
    template = environment.get_template("report.html.j2")
    return template.render(
        comparison=comparison,
        entries=[_entry(comparison, run) for run in comparison.runs],
        pareto=_pareto(comparison),
        has_flip=comparison.runs[0].quality.flip is not None,
        opened=next((run.name for run in comparison.runs if run.is_cached), ""),
        symbols=SYMBOLS,
        gain=GAIN,
    )


@dataclass(frozen=True)
class Bar:
    """A bar or cell of a drawing: place, size, class of its colour, and what it says."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    says: str


@dataclass(frozen=True)
class Entry:
    """A run, and everything that is drawn of it."""

    run: Run
    speedup: float
    flop_speedup: float
    share: float
    pictures: tuple[str, ...]
    differences: tuple[str, ...]
    is_small: bool
    timeline: tuple[Bar, ...]
    longest: float
    memory: tuple[Bar, ...]
    grid: tuple[Bar, ...]
    rows: int
    better: str


def _entry(comparison: Comparison, run: Run) -> Entry:
    reference = comparison.runs[0].pictures
    slowest = max(each.median for each in comparison.runs)
    longest = max((call.seconds for each in comparison.runs for call in each.calls), default=1.0)
    better = comparison.better_steps(run)
    return Entry(
        run=run,
        speedup=comparison.speedup(run),
        flop_speedup=comparison.flop_speedup(run),
        share=100 * run.median / slowest,
        pictures=tuple(_encoded(picture) for picture in run.pictures[:MOST_PICTURES]),
        differences=tuple(
            _encoded(_difference(picture, wanted))
            for picture, wanted in zip(run.pictures[:MOST_PICTURES], reference, strict=False)
        ),
        is_small=max(run.pictures.shape[-2:]) <= SMALL,
        timeline=tuple(_timeline(run, longest)),
        longest=1000 * longest,
        memory=tuple(_memory(run)),
        grid=tuple(_cells(run.plan, run.labels)) if run.is_cached and run.plan is not None else (),
        rows=0 if run.plan is None else len(run.plan.steps[0].sites),
        better="" if better is None else better.name,
    )


def _timeline(run: Run, longest: float) -> Iterator[Bar]:
    width = 100 / max(len(run.calls), 1)
    for i, call in enumerate(run.calls):
        height = 100 * call.seconds / longest
        says = f"call {i + 1}: {call.kind}, {1000 * call.seconds:.1f} ms"
        yield Bar(i * width, 100 - height, width, height, KINDS.get(call.kind, "full"), says)


def _memory(run: Run) -> Iterator[Bar]:
    most = max((call.cache_bytes for call in run.calls), default=0)
    width = 100 / max(len(run.calls), 1)
    for i, call in enumerate(run.calls if most else ()):
        height = 100 * call.cache_bytes / most
        says = f"after call {i + 1}: {size_text(call.cache_bytes)}"
        yield Bar(i * width, 100 - height, width, height, "memory", says)


def _cells(plan: Plan, labels: Sequence[str]) -> Iterator[Bar]:
    """What every site does at every step; equal neighbours are one cell."""
    width = 100 / len(plan.steps)
    for row in range(len(plan.steps[0].sites)):
        symbols = [step.sites[row].action.symbol for step in plan.steps]
        start = 0
        for symbol, group in itertools.groupby(symbols):
            count = len(list(group))
            steps = f"step {start + 1}" if count == 1 else f"steps {start + 1} to {start + count}"
            kind, words = SYMBOLS[symbol]
            yield Bar(start * width, row, count * width, 1, kind, f"{labels[row]}, {steps}: {words}")
            start += count


def _pareto(comparison: Comparison) -> dict[str, Any]:
    """Time against likeness: places in a drawing of 100 by 100, and ticks."""
    shown = [run for run in comparison.runs[1:] if _psnr(run) < EXACT]
    exact = [run for run in comparison.runs[1:] if _psnr(run) >= EXACT]
    if not shown:
        return {}
    times = [seconds for run in (*shown, *exact) for seconds in run.seconds]
    likeness = [_psnr(run) for run in shown]
    left, right = _around(0.0, max(times))
    low, high = _around(min(likeness), max(likeness) + 0.1)

    def point(run: Run) -> dict[str, Any]:
        flop_speedup, speedup = comparison.flop_speedup(run), comparison.speedup(run)
        likeness = decibels(run.quality.psnr)
        return {
            "x": _place(run.median, left, right),
            "from": _place(min(run.seconds), left, right),
            "to": _place(max(run.seconds), left, right),
            "y": 100 - _place(_psnr(run), low, high),
            "name": run.name,
            "is_cached": run.is_cached,
            "says": f"{run.name}: {run.median:.2f} s, {likeness} dB, {speedup:.2f}x, {flop_speedup:.2f}x fewer FLOPs",
        }

    points = sorted(map(point, shown), key=lambda point: float(point["x"]))  # neighbours have their names on two sides
    return {
        "points": points,
        "line": sorted((p["x"], p["y"]) for p in points if not p["is_cached"]),
        "exact": [{"x": _place(run.median, left, right), "name": run.name} for run in exact],
        "x_ticks": [(_place(t, left, right), f"{t:g}") for t in _ticks(left, right)],
        "y_ticks": [(100 - _place(t, low, high), f"{t:g}") for t in _ticks(low, high)],
    }


def _psnr(run: Run) -> float:
    return math.inf if run.quality.psnr is None else run.quality.psnr


def _around(low: float, high: float) -> tuple[float, float]:
    step = _step(high - low)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _step(span: float) -> float:
    """A round number that is about a fifth of a span."""
    raw = max(span, 1e-9) / 5
    power = 10 ** math.floor(math.log10(raw))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999))


def _ticks(low: float, high: float) -> list[float]:
    step = _step(high - low)
    return [round(low + i * step, 10) for i in range(round((high - low) / step) + 1)]


def _place(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)


def _difference(picture: Tensor, reference: Tensor) -> Tensor:
    return ((picture - reference).abs().mean(0, keepdim=True) * GAIN).clamp(0, 1).expand(3, -1, -1)


def _encoded(picture: Tensor) -> str:
    """A picture as a data URL: without loss where it is small, otherwise reduced."""
    levels = (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().numpy()
    image, buffer = Image.fromarray(np.ascontiguousarray(levels)), io.BytesIO()
    is_small = max(image.size) <= SMALL
    image.thumbnail((EDGE, EDGE))
    image.save(buffer, "PNG" if is_small else "WEBP", **({} if is_small else {"quality": 90}))
    kind = "png" if is_small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
