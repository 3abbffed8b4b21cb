"""The demo: what each cache policy saves and what it costs, on the same labels and the same noise.

Every policy has an honest opponent: the same compute spent on fewer steps of the compiled model without a cache.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import dicompile
from dicompile.demo import metrics, shapes
from dicompile.demo.classifier import judge, load_classifier
from dicompile.demo.methods import methods
from dicompile.demo.pareto import draw_pareto
from dicompile.demo.sample import balanced_labels, load_model, load_scheduler, sample
from dicompile.policies import NoCache

EAGER, UNCACHED = "uncached, eager", "uncached"
SAMPLES = 24
REFERENCE_PICTURES = 3000
REFERENCE_SEED = 1
FLOOR_SEED = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """What all methods have in common."""

    samples: int
    steps: int
    guidance: float
    seed: int
    every: bool = False
    """Every method at two or three speeds."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One timed generation."""

    name: str
    family: str
    """Method without its setting; empty without a cache."""
    steps: int
    pictures: Tensor
    """float32, about [-1, 1], [b, 3, 32, 32]."""
    seconds: float
    """Wall-clock time of a warm generation."""
    first_seconds: float
    """Wall-clock time of the warm-up before it: compilation and all."""
    flops: float
    """Of the whole generation."""
    cache_bytes: int

    @property
    def cached(self) -> bool:
        """True if a policy was used."""
        return bool(self.family)


@dataclass(frozen=True, slots=True)
class Row:
    """A generation measured; what the table and results.json show."""

    name: str
    family: str
    steps: int
    cached: bool
    seconds: float
    first_seconds: float
    speedup: float
    """Time of the compiled model without a cache over this time."""
    flops: float
    flop_speedup: float
    """FLOPs of the uncached model over these FLOPs."""
    cache_bytes: int
    psnr: float | None
    """Decibels against the eager samples; None where nothing differs."""
    relative_error: float
    accuracy: metrics.Accuracy
    frechet: float
    """Distance to procedural pictures, squared feature units."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows with what the picture grid needs besides; both tuples in the order of ``rows``."""

    rows: tuple[Row, ...]
    pictures: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    frechet_floor: float
    """Distance that as many procedural pictures as samples have: what a perfect sampler would reach."""


def run_demo(
    out: Path,
    samples: int = SAMPLES,
    steps: int = 50,
    guidance: float = 2.0,
    seed: int = 0,
    every: bool = False,
) -> tuple[Row, ...]:
    """Compare the cache policies, print a table, write ``pictures.png``, ``pareto.png`` and ``results.json``.

    Args:
        out: folder for the results, made if it is missing.
        samples: pictures for each method, sampled as one batch; at least 2.
        steps: denoising steps of the reference and of every cached method.
        guidance: of classifier-free guidance, unitless.
        seed: of the noise.
        every: every method at two or three speeds instead of a selection.

    Returns:
        One row for each method, by falling compute.
    """
    settings = Settings(samples, steps, guidance, seed, every)
    labels = balanced_labels(samples)
    console = Console()
    with _progress(console) as progress:
        generations = generate_all(load_model(), labels, settings, progress)
    judged = judge_all(generations, labels)
    out.mkdir(parents=True, exist_ok=True)
    draw_grid(judged, labels, settings).save(out / "pictures.png")
    draw_pareto(judged.rows, judged.frechet_floor).savefig(out / "pareto.png", dpi=120)
    (out / "results.json").write_text(to_json(judged, settings) + "\n")
    console.print(to_table(judged, settings))
    for what, name in (
        ("pictures", "pictures.png"),
        ("compute against error", "pareto.png"),
        ("numbers", "results.json"),
    ):
        console.print(f"{what}: {out / name}")
    return judged.rows


def generate_all(model: nn.Module, labels: Tensor, settings: Settings, progress: Progress) -> list[Generation]:
    """Run every method: eager, the policies, compiled without a cache, and that on fewer steps."""
    scheduler = load_scheduler()

    def run(name: str, module: nn.Module, steps: int) -> tuple[Tensor, float, float]:
        """Warm up (one step, then compile the others), then time a generation; pictures, its seconds, the warm-up's."""
        task = progress.add_task(name, total=1 + steps)

        def generate(stop_after: int | None) -> tuple[Tensor, float]:
            start = time.perf_counter()
            guidance, seed = settings.guidance, settings.seed
            tick = functools.partial(progress.advance, task)
            pictures = sample(module, scheduler, labels, steps, guidance, seed, tick, stop_after)
            return pictures, time.perf_counter() - start

        _, first_seconds = generate(stop_after=1)
        if isinstance(module, dicompile.CachedModel):
            start = time.perf_counter()
            dicompile.prepare(module, late=False)  # no run of the demo begins late
            first_seconds += time.perf_counter() - start
        measured = generate(stop_after=None)
        progress.remove_task(task)
        return *measured, first_seconds

    def run_cached(name: str, family: str, fast: nn.Module, steps: int) -> Generation:
        measured = run(name, fast, steps)
        plan = dicompile.plan_of(fast)
        return Generation(name, family, steps, *measured, plan.flops, plan.cache_bytes)

    eager = run(EAGER, model, settings.steps)
    generations = []
    for method in methods(settings.steps, settings.every):
        fast = dicompile.optimize(model, method.policy, schedule=scheduler)
        generations.append(run_cached(method.name, method.family, fast, settings.steps))
        model = dicompile.restore(fast)

    fast = dicompile.optimize(model, NoCache(), schedule=scheduler)
    compiled = run_cached(UNCACHED, "", fast, settings.steps)
    baseline_flops = dicompile.plan_of(fast).baseline_flops
    fewer = steps_for_equal_compute([g.flops for g in generations], compiled.flops, settings.steps)
    generations.extend(run_cached(f"{UNCACHED}, {_count(steps, 'step')}", "", fast, steps) for steps in fewer)
    dicompile.restore(fast)
    by_compute = sorted(generations, key=lambda generation: -generation.flops)
    first = Generation(EAGER, "", settings.steps, *eager, baseline_flops, 0)
    return [first, compiled, *by_compute]


def steps_for_equal_compute(flops: Sequence[float], uncached_flops: float, steps: int) -> list[int]:
    """Numbers of uncached steps that come nearest to ``flops``, at least two apart and without the full number.

    Args:
        flops: of whole cached generations.
        uncached_flops: of the uncached generation.
        steps: of the uncached generation.
    """
    nearest = {max(1, round(one / uncached_flops * steps)) for one in flops}
    chosen: list[int] = []
    for count in sorted(nearest - {steps}, reverse=True):
        if not chosen or chosen[-1] - count >= 2:
            chosen.append(count)
    return chosen


def judge_all(generations: Sequence[Generation], labels: Tensor) -> Judged:
    """Measure generations against the eager one (the first) and the compiled uncached one (the second)."""
    eager, compiled = generations[:2]
    classifier = load_classifier()
    every_class = torch.arange(shapes.NUM_CLASSES).repeat(REFERENCE_PICTURES // shapes.NUM_CLASSES)
    true_pictures = shapes.draw(every_class, torch.Generator().manual_seed(REFERENCE_SEED))
    true_features = judge(classifier, true_pictures).features
    few_true_pictures = shapes.draw(labels, torch.Generator().manual_seed(FLOOR_SEED))
    floor = metrics.frechet_distance(judge(classifier, few_true_pictures).features, true_features)

    rows, right = [], []
    for generation in generations:
        predicted = judge(classifier, generation.pictures)
        psnr = metrics.psnr(generation.pictures, eager.pictures)
        right.append(metrics.is_right(predicted.attributes, labels))
        rows.append(
            Row(
                name=generation.name,
                family=generation.family,
                steps=generation.steps,
                cached=generation.cached,
                seconds=generation.seconds,
                first_seconds=generation.first_seconds,
                speedup=compiled.seconds / generation.seconds,
                flops=generation.flops,
                flop_speedup=eager.flops / generation.flops,
                cache_bytes=generation.cache_bytes,
                psnr=psnr if math.isfinite(psnr) else None,
                relative_error=metrics.relative_error(generation.pictures, eager.pictures),
                accuracy=metrics.accuracy(predicted.attributes, labels),
                frechet=metrics.frechet_distance(predicted.features, true_features),
            )
        )
    return Judged(tuple(rows), tuple(g.pictures for g in generations), tuple(right), floor)


def to_json(judged: Judged, settings: Settings) -> str:
    """Rows, settings and machine as JSON text."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "platform": platform.platform()}
    content = {
        "settings": asdict(settings),
        "machine": machine,
        "frechet_floor": judged.frechet_floor,
        "rows": [asdict(row) for row in judged.rows],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def to_table(judged: Judged, settings: Settings) -> Table:
    """Rows as a table for the terminal; cached methods stand out."""
    table = Table(
        title=f"{settings.samples} samples, {_count(settings.steps, 'step')}, guidance {settings.guidance:g}",
        caption=(
            "speedup: measured, against uncached; PSNR and error: against uncached, eager\n"
            "right: shape, colour and place as the label asks, says a classifier\n"
            f"Frechet: distance to procedural pictures; {judged.frechet_floor:.2f} is what such pictures reach"
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("method", no_wrap=True)
    for heading in ("time\ns", "speedup", "fewer\nFLOPs", "cache\nMiB", "PSNR\ndB", "error", "right\n%", "Frechet"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in judged.rows:
        table.add_row(
            row.name,
            f"{row.seconds:.2f}",
            f"{row.speedup:.2f}x",
            f"{row.flop_speedup:.2f}x",
            f"{row.cache_bytes / 2**20:.1f}" if row.cache_bytes else "-",
            "exact" if row.psnr is None else f"{row.psnr:.1f}",
            f"{row.relative_error:.1g}" if row.relative_error < 1e-3 else f"{row.relative_error:.3f}",
            f"{100 * row.accuracy.every:.1f}",
            f"{row.frechet:.2f}",
            style="bold" if row.cached else None,
        )
    return table


COLUMNS = 12
ZOOM = 3
CELL = shapes.IMAGE_SIZE * ZOOM
GAP = 8
LEFT, TOP, MARGIN = 232, 124, 24
INK, FAINT, WRONG = (24, 24, 28), (92, 92, 100), (214, 40, 40)


def draw_grid(judged: Judged, labels: Tensor, settings: Settings) -> Image.Image:
    """Pictures of the first labels: one row for each method, one column for each label and noise."""
    columns = min(COLUMNS, len(labels))
    title, plain, small = (ImageFont.load_default(size) for size in (24, 17, 14))
    size = (LEFT + columns * (CELL + GAP) + MARGIN, TOP + len(judged.rows) * (CELL + GAP) + MARGIN)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, 18), "dicompile: one model, one noise, different caches", INK, title)
    caption = (
        f"{_count(settings.steps, 'step')}, guidance {settings.guidance:g}; numbers over {settings.samples} samples; "
        "speedup against uncached, PSNR against uncached, eager; red frame: not what the label asks for"
    )
    pen.text((MARGIN, 50), caption, FAINT, small)
    for column, label in enumerate(labels[:columns].tolist()):
        words = shapes.name_of(label).replace(", ", "\n")
        place = (LEFT + column * (CELL + GAP) + CELL / 2, TOP - 6)
        pen.multiline_text(place, words, INK, small, anchor="md", align="center", spacing=3)
    for index, row in enumerate(judged.rows):
        top = TOP + index * (CELL + GAP)
        pen.text((MARGIN, top + 14), row.name, INK, plain, stroke_width=0.4 if row.cached else 0)
        pen.text((MARGIN, top + 40), f"speedup {row.speedup:.2f}x", FAINT, small)
        likeness = "exact" if row.psnr is None else f"PSNR {row.psnr:.1f} dB"
        pen.text((MARGIN, top + 60), f"{likeness}, {row.accuracy.every:.0%} right", FAINT, small)
        for column in range(columns):
            left = LEFT + column * (CELL + GAP)
            grid.paste(_image(judged.pictures[index][column]), (left, top))
            if not judged.right[index][column]:
                pen.rectangle((left - 3, top - 3, left + CELL + 2, top + CELL + 2), outline=WRONG, width=3)
    return grid


def _image(picture: Tensor) -> Image.Image:
    """One picture (in [-1, 1], [3, h, w]) in sRGB bytes, enlarged without smoothing."""
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((CELL, CELL), Image.Resampling.NEAREST)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)
