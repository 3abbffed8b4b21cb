"""The demo: what each cache policy saves and what it costs, on the same labels and the same noise.

Every policy has an honest opponent: the same compute spent on fewer steps of the compiled model without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from dicompile.compare import Comparison, Run, compare, write_report
from dicompile.compare.results import decibels
from dicompile.demo import metrics, shapes
from dicompile.demo.classifier import judge, load_classifier, true_features
from dicompile.demo.methods import methods
from dicompile.demo.pareto import Point, draw_pareto
from dicompile.demo.sample import GUIDANCE, balanced_labels
from dicompile.demo.subject import demo_subject
from dicompile.progress import progress
from dicompile.store import written_whole

SAMPLES = 24
FLOOR_SEED = 2


@dataclass(frozen=True, slots=True)
class Judged:
    """What the classifier says of the pictures of one run.

    Attributes:
        right: whether a picture shows what its label asks for; bool, [b].
        frechet: distance to procedural pictures, squared feature units.
    """

    right: Tensor
    frechet: float


def run_demo(
    out: Path,
    samples: int = SAMPLES,
    steps: int = 50,
    guidance: float = GUIDANCE,
    seed: int = 0,
    every: bool = False,
) -> Comparison:
    """Compare the cache policies, print a table, and write a report, ``pictures.png`` and ``pareto.png``.

    Args:
        out: folder for the results, made if it is missing.
        samples: pictures for each method, sampled as one batch; at least 2.
        steps: denoising steps of the reference and of every cached method.
        guidance: of classifier-free guidance, unitless.
        seed: of the noise.
        every: every method at two or three speeds instead of a selection.
    """
    labels, console = balanced_labels(samples), Console()
    chosen = methods(steps, every)
    with progress("the demo") as update:
        found = compare(
            demo_subject(samples, steps, seed, guidance),
            {method.name: method.policy for method in chosen},
            rounds=1,
            tick=lambda text: update(description=text),
        )
    judged, floor = judge_all(found.runs, labels)
    page = write_report(found, out)
    with written_whole(out / "pictures.png", for_all=True) as file:
        draw_grid(found, judged, labels).save(file, "PNG")
    families = {method.name: method.family for method in chosen}
    with written_whole(out / "pareto.png", for_all=True) as file:
        draw_pareto(points_of(found.runs, judged, families), floor).savefig(file, format="png", dpi=120)
    console.print(found.table())
    console.print("speedup: against the compiled model without a cache; PSNR and SSIM: against the model as it is")
    for what, path in (
        ("report", page),
        ("pictures", out / "pictures.png"),
        ("compute against error", out / "pareto.png"),
        ("numbers", out / "results.json"),
    ):
        console.print(f"{what}: {path}", markup=False)
    return found


def judge_all(runs: Sequence[Run], labels: Tensor) -> tuple[list[Judged], float]:
    """Judge the pictures of all runs.

    Returns:
        What is said of each, and the Frechet distance that as many procedural pictures as samples have: what a perfect
        sampler would reach.
    """
    classifier = load_classifier()
    reference = true_features(classifier)
    few_true_pictures = shapes.draw(labels, torch.Generator().manual_seed(FLOOR_SEED))
    floor = metrics.frechet_distance(judge(classifier, few_true_pictures).features, reference)
    judged = []
    for run in runs:
        predicted = judge(classifier, run.pictures * 2 - 1)
        frechet = metrics.frechet_distance(predicted.features, reference)
        judged.append(Judged(metrics.is_right(predicted.attributes, labels), frechet))
    return judged, floor


def points_of(runs: Sequence[Run], judged: Sequence[Judged], families: Mapping[str, str]) -> list[Point]:
    """What the plot of compute shows."""
    return [
        Point(families.get(run.name, ""), run.steps, run.flops, run.quality.error, each.frechet)
        for run, each in zip(runs, judged, strict=True)
    ]


COLUMNS = 12
ZOOM = 3
CELL = shapes.IMAGE_SIZE * ZOOM
GAP = 8
LEFT, TOP, MARGIN = 232, 124, 24
INK, FAINT, WRONG = (24, 24, 28), (92, 92, 100), (214, 40, 40)


def draw_grid(comparison: Comparison, judged: Sequence[Judged], labels: Tensor) -> Image.Image:
    """Pictures of the first labels: one row for each method, one column for each label and noise."""
    columns = min(COLUMNS, len(labels))
    title, plain, small = (ImageFont.load_default(size) for size in (24, 17, 14))
    size = (LEFT + columns * (CELL + GAP) + MARGIN, TOP + len(comparison.runs) * (CELL + GAP) + MARGIN)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, 18), "dicompile: one model, one noise, different caches", INK, title)
    caption = (
        f"{comparison.subject}; speedup against the compiled model without a cache, PSNR against the model as it is; "
        "red frame: not what the label asks for"
    )
    pen.text((MARGIN, 50), caption, FAINT, small)
    for column, label in enumerate(labels[:columns].tolist()):
        words = shapes.name_of(label).replace(", ", "\n")
        place = (LEFT + column * (CELL + GAP) + CELL / 2, TOP - 6)
        pen.multiline_text(place, words, INK, small, anchor="md", align="center", spacing=3)
    for index, (run, said) in enumerate(zip(comparison.runs, judged, strict=True)):
        top = TOP + index * (CELL + GAP)
        pen.text((MARGIN, top + 14), run.name, INK, plain, stroke_width=0.4 if run.is_cached else 0)
        pen.text((MARGIN, top + 40), f"speedup {comparison.speedup(run):.2f}x", FAINT, small)
        likeness = "exact" if run.quality.psnr is None else f"PSNR {decibels(run.quality.psnr)} dB"
        pen.text((MARGIN, top + 60), f"{likeness}, {said.right.double().mean():.0%} right", FAINT, small)
        for column in range(columns):
            left = LEFT + column * (CELL + GAP)
            grid.paste(_image(run.pictures[column]), (left, top))
            if not said.right[column]:
                pen.rectangle((left - 3, top - 3, left + CELL + 2, top + CELL + 2), outline=WRONG, width=3)
    return grid


def _image(picture: Tensor) -> Image.Image:
    """One picture (in [0, 1], [3, h, w]) in sRGB bytes, enlarged without smoothing."""
    levels = (picture * 255).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((CELL, CELL), Image.Resampling.NEAREST)
