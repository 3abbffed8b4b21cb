"""Pictures by matplotlib: a plan as a step x site grid, and the dataflow of a block with its sites marked."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import networkx as nx
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dicompile.analysis import ModelStructure
from dicompile.capture import Capture
from dicompile.cli.dataflow import Box, block_flow
from dicompile.cli.files import write_whole
from dicompile.plan import Plan
from dicompile.plan.lanes import MEANING, Lane, make_lanes
from dicompile.text import operations_text, size_text

COLOURS = {
    "F": "#1f5fae", "t": "#4fb3c8", "b": "#9a5fc0", "f": "#58a672", ".": "#c5cdd8", "-": "#eef1f5", "*": "#e0a93b",
    " ": "#ffffff",
}  # fmt: skip
_INK = "#1c2330"

MOST_BLOCKS = 3
"""Kinds of block in one picture of the dataflow."""


def draw_plans(file: Path, model: str, plans: Sequence[Plan]) -> None:
    """Draw plans below each other: what every lane of sites does at every step, work and memory.

    Args:
        file: PNG, SVG or PDF by its name.
        model: what the title calls the model.
        plans: of one model.
    """
    lanes = [make_lanes(plan) for plan in plans]
    heights = [h for each in lanes for h in (0.28 * len(each) + 0.1, 0.75, 0.75)]
    width = max(7.0, 2.6 + 0.13 * max(len(plan.steps) for plan in plans))
    figure = Figure(figsize=(width, sum(heights) + 0.75 * len(plans) + 0.9), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    figure.suptitle(model, fontsize=11, color=_INK)
    for i, (plan, each) in enumerate(zip(plans, lanes, strict=True)):
        _grid(axes[3 * i], plan, each)
        _work(axes[3 * i + 1], plan)
        _memory(axes[3 * i + 2], plan)
    figure.align_ylabels(axes)
    used = {symbol for plan, each in zip(plans, lanes, strict=True) for lane in each for symbol in lane.cells(plan)}
    patches = [Patch(fc=COLOURS[s], ec="#aab2bd", lw=0.5, label=text) for s, text in MEANING.items() if s in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 4), frameon=False, fontsize=8)
    save(figure, file)


def _grid(axis: Any, plan: Plan, lanes: Sequence[Lane]) -> None:
    symbols = list(COLOURS)
    cells = np.array([[symbols.index(symbol) for symbol in lane.cells(plan)] for lane in lanes])
    first = plan.schedule.before
    edges = np.arange(first, first + len(plan.steps) + 1) - 0.5
    colours = ListedColormap(list(COLOURS.values()))
    axis.pcolormesh(
        edges, np.arange(len(lanes) + 1) - 0.5, cells, cmap=colours, vmin=0, vmax=len(COLOURS) - 1, ec="w", lw=0.6
    )
    axis.invert_yaxis()
    axis.set_yticks(range(len(lanes)), [lane.label for lane in lanes], fontsize=8)
    axis.set_title(
        f"{plan.policy}: {plan.flop_speedup:.2f}x fewer operations, "
        + (plan.no_gain() or f"predicted {plan.predicted_speedup:.2f}x faster"),
        fontsize=9, loc="left", color=_INK,
    )  # fmt: skip
    _plain(axis, plan)
    axis.tick_params(bottom=False, labelbottom=False)


def _work(axis: Any, plan: Plan) -> None:
    whole = plan.baseline_flops / len(plan.steps) or 1
    axis.bar(_steps(plan), [step.flops / whole for step in plan.steps], width=0.8, color=COLOURS["F"])
    axis.set_ylim(0, 1.05 * max(1.0, *(step.flops / whole for step in plan.steps)))
    axis.set_yticks([0, 1], ["0", operations_text(whole)], fontsize=7)
    axis.set_ylabel("work", fontsize=8, rotation=0, ha="right", va="center")
    _plain(axis, plan)
    axis.tick_params(labelbottom=False)


def _memory(axis: Any, plan: Plan) -> None:
    most = plan.cache_bytes
    held = [plan.held(i) for i in range(len(plan.steps))]
    axis.step(_steps(plan), held, where="mid", color=_INK, lw=1)
    axis.fill_between(_steps(plan), held, step="mid", color=COLOURS["."])
    axis.set_ylim(0, (most or 1) * 1.1)
    axis.set_yticks([0, most] if most else [0], ["0", size_text(most)] if most else ["0"], fontsize=7)
    axis.set_ylabel("held", fontsize=8, rotation=0, ha="right", va="center")
    axis.set_xlabel("step", fontsize=8)
    _plain(axis, plan)


def _steps(plan: Plan) -> range:
    return range(plan.schedule.before, plan.schedule.before + len(plan.steps))


def _plain(axis: Any, plan: Plan) -> None:
    """Room for all steps, whole numbers below, no frame."""
    steps = _steps(plan)
    axis.set_xlim(steps[0] - 0.6, steps[-1] + 0.6)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=7, colors=_INK)
    axis.spines[["top", "right", "left"]].set_visible(False)


def save(figure: Figure, file: Path) -> None:
    """Write a figure in the format that the file's name says, whole or not at all; text of an SVG stays text."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format=file.suffix[1:].lower(), dpi=150)
    write_whole(file, buffer.getvalue())


SITE_COLOURS = ("#cfe2f8", "#fbe3c0", "#d9efd9", "#ecd9f3", "#f9d4d4", "#d5eef2")


def draw_blocks(file: Path, capture: Capture, structure: ModelStructure) -> None:
    """Draw the dataflow of the first block of each kind, with the sites marked.

    Args:
        file: PNG, SVG or PDF by its name.
        capture: the graph.
        structure: what the analysis found in it.
    """
    firsts = {block.kind: block for block in reversed(structure.blocks)}
    blocks = sorted(firsts.values(), key=lambda block: block.id)[:MOST_BLOCKS]
    flows = [block_flow(capture, structure, block) for block in blocks]
    layers = [list(nx.topological_generations(flow)) for flow in flows]
    widths = [1.9 * max(map(len, each)) + 0.6 for each in layers]
    height = 0.62 * max(map(len, layers)) + 1.2
    figure = Figure(figsize=(sum(widths), height))
    axes = figure.subplots(1, len(flows), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.6 / height, 0.02)
    for axis, block, flow, each in zip(axes, blocks, flows, layers, strict=True):
        axis.set_title(f"block {block.id}  {block.path}", fontsize=9, color=_INK)
        _flow(axis, flow, each, structure)
    save(figure, file)


def _flow(axis: Any, flow: nx.DiGraph, layers: Sequence[Sequence[int]], structure: ModelStructure) -> None:
    """Boxes in layers from top to bottom, ordered by what they read so that few arrows cross."""
    places: dict[int, tuple[float, float]] = {}
    for depth, layer in enumerate(layers):
        order = sorted(layer, key=lambda number: _pull(flow, places, number))
        for i, number in enumerate(order):
            places[number] = (i - (len(order) - 1) / 2, -float(depth))
    colours: dict[int, str] = {}
    for number, (x, y) in places.items():
        box: Box = flow.nodes[number]["box"]
        site = box.sites[0] if box.sites else -1
        if box.sites:
            colours.setdefault(site, SITE_COLOURS[len(colours) % len(SITE_COLOURS)])
        fill = {"input": "white", "add": COLOURS["F"]}.get(box.kind, colours.get(site, "#f3f5f8"))
        axis.text(
            x, y, box.label, ha="center", va="center", fontsize=6.5, color="white" if box.kind == "add" else _INK,
            bbox={"boxstyle": "round,pad=0.3", "fc": fill, "ec": "#9aa4b1", "lw": 0.8}, zorder=3,
        )  # fmt: skip
    for a, b in flow.edges:
        passes_by = places[a][1] - places[b][1] > 1.5  # other layers: bent, so that it does not hide behind their boxes
        axis.annotate(
            "", places[b], places[a], zorder=1,
            arrowprops={
                "arrowstyle": "-|>", "color": "#9aa4b1", "lw": 0.7, "shrinkA": 9, "shrinkB": 9,
                "connectionstyle": f"arc3,rad={0.18 if passes_by else 0}",
            },
        )  # fmt: skip
    patches = [
        Patch(fc=colour, ec="#9aa4b1", lw=0.5, label=f"site {site}, {structure.sites[site].kind.value}")
        for site, colour in sorted(colours.items())
    ]
    axis.legend(handles=patches, loc="lower left", fontsize=7, frameon=False)
    most = max(map(len, layers)) / 2
    axis.set_xlim(-most - 0.1, most + 0.1)
    axis.set_ylim(-len(layers) + 0.3, 0.7)
    axis.axis("off")


def _pull(flow: nx.DiGraph, places: Mapping[int, tuple[float, float]], box: int) -> tuple[float, int]:
    """Where a box would lie if nothing else did: below the nearest ones that it reads; beside those of its site."""
    above = [places[source] for source in flow.predecessors(box)]
    nearest = [x for x, y in above if y == min(y for _, y in above)]
    return (float(np.mean(nearest)) if nearest else 0.0), min(flow.nodes[box]["box"].sites, default=-1)
