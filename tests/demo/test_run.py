"""The demo: every run is judged and drawn, and the command writes what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dicompile.bench.machine import Machine
from dicompile.cli.main import app
from dicompile.compare import Comparison, Quality, Run
from dicompile.demo import shapes
from dicompile.demo.run import draw_grid, judge_all, points_of
from dicompile.demo.sample import balanced_labels
from dicompile.demo.subject import demo_subject

LABELS = balanced_labels(6)


def run(name: str, pictures: torch.Tensor, *, cached: bool = False) -> Run:
    return Run(name, cached, 5, (1.0,), 2.0, (), 100.0, 0, None, (), "", pictures, Quality(None, 1.0, 0.0))


def test_pictures_that_show_what_their_label_asks_for_are_right() -> None:
    true = (shapes.draw(LABELS, torch.Generator().manual_seed(5)) + 1) / 2
    runs = (run("as it is", true), run("no cache", true.flip(0)), run("FORA, interval 3", true * 0, cached=True))
    judged, floor = judge_all(runs, LABELS)
    assert judged[0].right.all()
    assert judged[1].right.sum() < len(LABELS) and not judged[2].right.any()
    assert judged[2].frechet > judged[0].frechet > floor / 10 > 0
    points = points_of(runs, judged, {"FORA, interval 3": "FORA"})
    assert [point.family for point in points] == ["", "", "FORA"]
    comparison = Comparison("shapes", runs, (), Machine("a CPU", 1, None, {}, "2026-11-27", "demo"))
    grid = draw_grid(comparison, judged, LABELS)
    red = sum(grid.getpixel((x, y)) == (214, 40, 40) for x in range(0, grid.width, 2) for y in range(0, grid.height, 2))
    assert red > 100


def test_the_bundled_model_draws_what_it_is_asked_for() -> None:
    subject = demo_subject(2, 3)
    target = subject.copy()
    pictures = subject.generate(target, 3)
    assert pictures.shape == (2, 3, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, subject.generate(subject.module, 3))
    assert subject.judge(pictures).keys() == {"Fréchet"}
    assert len(subject.captions) == 2


def test_pictures_like_drawn_ones_are_near_and_one_by_itself_or_broken_ones_are_not_judged() -> None:
    labels = balanced_labels(24)
    subject = demo_subject(len(labels), 3)
    true = (shapes.draw(labels, torch.Generator().manual_seed(5)) + 1) / 2
    near, far = (float(subject.judge(pictures)["Fréchet"]) for pictures in (true, torch.rand_like(true)))
    assert near < far / 4
    assert subject.judge(true[:1]) == subject.judge(true * math.nan) == {"Fréchet": "-"}


@pytest.mark.nightly
def test_the_command_writes_a_report_and_pictures(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--samples", "2", "--steps", "4", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    names = {"index.html", "results.json", "pictures.png", "pareto.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) > 5
