"""``dicompile plan``: the grid in the terminal, as a picture and as a page; two plans beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dicompile.cli import files
from dicompile.cli.show import difference_lines, lane_lines
from dicompile.errors import DicompileError
from dicompile.plan import TimestepSchedule, make_plan
from dicompile.policies import FORA, DuCa, NoCache
from tests.cli.terminal import check_fits, error_of, run
from tests.plan.toys import toy

STRUCTURE = toy([("self-attention", "mlp")] * 3, spans=True)
DUCA = DuCa(score="random", grid_cell=0, aggressive="update")


@pytest.mark.parametrize("columns", [80, 120])
def test_every_step_is_shown(columns: int) -> None:
    text = run("plan", "demo", "-p", "fora", "--steps", 30, columns=columns).output
    check_fits(text, columns)
    assert "0-7 mlp             F.F" + "..F" * 9 in text
    for part in ("fora-3: 30 steps", "faster", "remembers 1.00 MiB in 16 slots", "kind of step", "F computed"):
        assert part in text


def test_long_runs_are_folded_at_whole_tens() -> None:
    plan = make_plan(STRUCTURE, FORA(interval=3), TimestepSchedule.of(70))
    lines = [line.plain for line in lane_lines(plan, 60)]
    assert max(map(len, lines)) <= 60
    rulers = [line.split() for line in lines if line.startswith("step")]
    assert rulers == [
        ["step", "0", "5", "10", "15", "20", "25", "30", "35"],
        ["step", "40", "45", "50", "55", "60", "65"],
    ]
    label = len("0-2 self-attention") + 2
    cells = "".join(line[label:] for line in lines if line.startswith("0-2 mlp"))
    assert cells == "".join(step.sites[1].action.symbol for step in plan.steps)


def test_symbols_have_their_colours() -> None:
    plan = make_plan(STRUCTURE, DUCA, TimestepSchedule.of(12))
    (mlp,) = [line for line in lane_lines(plan, 80) if line.plain.startswith("0-2 mlp")]
    styles = {mlp.plain[span.start]: span.style for span in mlp.spans}
    assert styles["F"] == "bold blue"
    assert styles["t"] == "cyan"


def test_what_gains_nothing_is_said_plainly() -> None:
    said = " ".join(run("plan", "demo", "-p", "fora", "--steps", 1).output.split())
    assert "no gain expected, 1.00x (FLOPs and bytes by roofline): every step computes everything" in said


def test_two_plans_are_compared_lane_by_lane() -> None:
    one, other = (make_plan(STRUCTURE, FORA(interval=i), TimestepSchedule.of(6)) for i in (2, 3))
    lines = [line.plain for line in difference_lines(one, other, 80)]
    assert lines[:4] == [
        "0-2 self-attention, 0-2 mlp",
        "  fora-2  FF.F.F",
        "  fora-3  F.F..F",
        "           ^^^  ",
    ]


def test_equal_plans_differ_in_nothing() -> None:
    plan = make_plan(STRUCTURE, NoCache(), TimestepSchedule.of(3))
    assert [line.plain for line in difference_lines(plan, plan, 80)] == [
        "the same in both: 0-2 self-attention, 0-2 mlp"
    ]


def test_against_prints_both_and_json_has_both() -> None:
    text = run("plan", "demo", "-p", "fora", "--against", "taylorseer", "--steps", 12).output
    check_fits(text, 80)
    assert "fora-3" in text and "taylorseer-4-4" in text and "^" in text
    data = json.loads(run("plan", "demo", "-p", "fora", "-a", "taylorseer", "--steps", 12, "--json").stdout)
    assert list(data["plans"]) == ["fora-3", "taylorseer-4-4"]
    assert sum(step["flops"] for step in data["plans"]["fora-3"]["steps"]) == data["plans"]["fora-3"]["flops"]


def test_pictures_and_pages_are_written(tmp_path: Path) -> None:
    names = ("plan.png", "plan.svg", "plan.html")
    png, svg, html = (tmp_path / "deep" / name for name in names)
    run("plan", "demo", "-p", "fora", "-a", "duca", "--steps", 12, "--png", png, "--svg", svg, "--html", html)
    with Image.open(png) as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(10**6) or []) > 10
    assert "0-7 mlp" in svg.read_text() and "skipped, a span is reused" in svg.read_text()
    page = html.read_text()
    assert page.startswith("<!doctype html>") and "http" not in page and "fora-3" in page and "duca-3" in page
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == sorted(names)


def test_what_is_interrupted_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    files.write_whole(file, "before")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(file, "half")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DicompileError, match=r"cannot write .*taken(.|\n)*fix:"):
        files.write_whole(tmp_path / "taken", "text")
    with pytest.raises(DicompileError, match="cannot write to"):
        (tmp_path / "file").write_text("")
        files.make_folder(tmp_path / "file" / "below", "--html")


def test_a_policy_that_does_not_fit_is_an_error_with_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(capsys, monkeypatch, "plan", "demo", "-p", "toca-pixart")
    assert error.startswith("PolicyDoesNotFit: policy 'toca-pixart-3' ranks tokens by entropy")
    assert "fix:" in error


def test_plans_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "mine.yaml"
    other.write_text(FORA(interval=3).to_yaml() + "seed: 7\n")
    result = run("plan", "demo", "--policy", "fora", "--against", other, "--steps", 9, "--json")
    assert list(json.loads(result.stdout)["plans"]) == ["fora", str(other)]
    error = error_of(capsys, monkeypatch, "plan", "demo", "--policy", "fora", "--against", "fora")
    assert "fora is compared with itself" in error
