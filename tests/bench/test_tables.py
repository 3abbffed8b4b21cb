"""Tables fit their terminal, Markdown keeps what else is in a file, JSON holds everything."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dicompile.bench.machine import Machine
from dicompile.bench.results import CompileRow, Cost, Kind, Memory, Result, Row
from dicompile.bench.tables import all_sheets, compile_sheet, in_place_of, sheets_of, to_json, to_markdown

MACHINE = Machine("a CPU, 2 cores", 1, 0.25, {"Python": "3.11", "torch": "2.13"}, "2026-11-26", "dicompile bench dit")
KINDS = (Kind("full", 12, 1234.56), Kind("reuse", 24, 12.34), Kind("partial", 14, 123.45))
RESULT = Result(
    "CogVideoX-2B",
    "12 of 30 blocks, width 384 of 1920, 256 of 17550 tokens, 77 of text, batch 2",
    "torch.compile",
    (
        Row("torch.compile", KINDS[:1], 1.0, 1.0, Memory(peak=2**30), Cost(123.4, 234.5), Cost(12.3, 23.4)),
        Row("first-block", KINDS[:2], 2.5, 2.0, setting="threshold 0.4"),
        Row("dicompile toca", KINDS, 3.0, 2.7, Memory(2**20, 2**20, 2**21, 2**30), Cost(23.4, 34.5), Cost(2.3, 3.4)),
    ),
    (("cache-dit", "cache-dit is not installed: pip install 'dicompile[bench]'"),),
)
COMPILED = [
    CompileRow("FLUX, 19 + 38 blocks", "torch.compile", Cost(1000, 1200.5), 1.0, 10.0),
    CompileRow("FLUX, 19 + 38 blocks", "dicompile fora", Cost(100, 120.05), 0.1, 1.0, 0.25, 1.5),
]


def printed(width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    for sheet in all_sheets([RESULT], COMPILED):
        console.print(sheet.rich())
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    words = set(text.split())
    for sheet in all_sheets([RESULT], COMPILED):
        assert all(word in words for row in sheet.rows for cell in row for word in cell.split())


def test_who_does_not_fit_is_said_below_the_table_letter_by_letter() -> None:
    assert "cache-dit is left out: cache-dit is not installed: pip install 'dicompile[bench]'" in printed(120)


def test_a_row_has_time_by_kind_speedup_operations_and_arrival() -> None:
    speed, _ = sheets_of(RESULT)
    assert speed.rows[1] == ("first-block", "12 full 1234.56, 24 reuse 12.34", "15110.9", "2.00x", "2.50x", "0.80")
    assert speed.notes[0] == "Speedup over torch.compile."
    assert "first-block: threshold 0.4" in speed.notes


def test_columns_without_a_figure_are_left_out() -> None:
    on_cpu = Result("m", "s", "eager", (Row("dicompile fora", KINDS[:1], 1, 1, Memory(8, 8, 0)),))
    _, costs = sheets_of(on_cpu)
    assert costs.headings == ("", "cache, planned", "held", "hoisted")
    assert costs.rows == (("dicompile fora", "8 bytes", "8 bytes", "0 bytes"),)
    assert len(sheets_of(Result("m", "s", "eager", (Row("eager", KINDS[:1], 1, 1),)))) == 1


def test_a_target_stands_beside_its_ratio() -> None:
    sheet = compile_sheet(COMPILED)
    assert sheet.rows == (
        ("FLUX, 19 + 38 blocks", "", "", "", "", "", ""),
        ("torch.compile", "1000.0", "1200.5", "1.00x", "", "10.00x", ""),
        ("dicompile fora", "100.0", "120.0", "0.10x", "0.25x", "1.00x", "1.5x"),
    )


def test_markdown_names_machine_versions_date_and_command() -> None:
    text = to_markdown(MACHINE, all_sheets([RESULT], COMPILED))
    for part in (
        "2026-11-26",
        "a CPU, 2 cores, 1 thread, load 0.2 at the start",
        "torch 2.13",
        "`dicompile bench dit`",
    ):
        assert part in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {7, 8, 10}
    assert text.count("| --- |") == 3


def test_json_holds_what_was_measured_and_what_follows() -> None:
    content = json.loads(to_json(MACHINE, [RESULT], COMPILED))
    assert content["machine"]["command"] == "dicompile bench dit"
    (model,) = content["models"]
    row = model["rows"][2]
    assert row["arrival"] == pytest.approx(0.9)
    assert row["milliseconds"] == pytest.approx(sum(kind.count * kind.milliseconds for kind in KINDS))
    assert row["memory"] == {"planned": 2**20, "held": 2**20, "hoisted": 2**21, "peak": 2**30}
    assert model["refused"] == {"cache-dit": RESULT.refused[0][1]}
    assert content["compile_times"][1]["whole"] == 0.1


def test_a_part_is_written_in_the_place_of_the_old_one_and_the_rest_stays() -> None:
    notes = "# Notes\n\nby hand\n"
    once = in_place_of("step times", "one\n", notes)
    assert once.startswith(notes)
    both = in_place_of("compile times", "two\n", once)
    again = in_place_of("step times", "three\n", both + "\nmore by hand\n")
    assert again == both.replace("one\n", "three\n") + "\nmore by hand\n"
    assert in_place_of("a", "x\n", "") == "<!-- dicompile bench: a -->\nx\n<!-- end of a -->\n"
