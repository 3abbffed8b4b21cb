"""Compute against error: which method is worth its operations, and which is beaten by sampling fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#994f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
RIVAL = "#777777"


class Point(NamedTuple):
    """A run in the plot.

    Attributes:
        family: of its method; empty without a cache.
        steps: of the sampler.
        flops: of the whole run.
        error: relative to the uncached samples, unitless.
        frechet: distance to true pictures, squared feature units.
    """

    family: str
    steps: int
    flops: float
    error: float
    frechet: float


def draw_pareto(runs: Sequence[Point], frechet_floor: float) -> Figure:
    """Two panels over compute: relative error to the uncached samples, and Frechet distance to true pictures.

    Args:
        runs: the first two are uncached at full steps; the other uncached ones make the line of fewer steps.
        frechet_floor: what a perfect sampler would reach.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    error, frechet = figure.subplots(1, 2)
    full = runs[0].flops
    cached = sorted((run for run in runs if run.family), key=lambda run: run.family)
    rivals = sorted((run for run in runs[2:] if not run.family), key=lambda run: run.flops)
    panels = (
        (error, "error", f"relative error to {runs[0].steps} uncached steps"),
        (frechet, "frechet", "Frechet distance"),
    )
    for axes, name, label in panels:
        compute = [100 * run.flops / full for run in rivals]
        axes.plot(compute, [getattr(r, name) for r in rivals], "--", color=RIVAL, marker=".", label="fewer steps")
        for number, (family, members) in enumerate(groupby(cached, key=lambda run: run.family)):
            points = sorted((100 * run.flops / full, getattr(run, name)) for run in members)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2, label=family)
        axes.set_xlabel("compute, % of the uncached run")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    frechet.axhline(
        runs[0].frechet, color="black", linewidth=0.8, linestyle=":", label=f"uncached, {runs[0].steps} steps"
    )
    frechet.axhline(frechet_floor, color="black", linewidth=0.8, label="true pictures")
    error.set_title("nearer to the uncached samples: lower", fontsize=10, loc="left")
    frechet.set_title("nearer to true pictures: lower", fontsize=10, loc="left")
    error.set_yscale("log")
    error.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    frechet.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
