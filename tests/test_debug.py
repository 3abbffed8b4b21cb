"""The page of a debug folder links every file once, and leads nowhere else."""

from __future__ import annotations

import re

from dicompile.debug import index_page

FILES = [
    "000-captured.txt",
    "001-plan.txt",
    "002-block1-ff-captured.txt",
    "003-block1-ff-drop-dead.txt",
    "004-block1-ff-variant.txt",
    "005-block1-ff2-captured.txt",
    "006-step0-full.txt",
    "007-a<b>-captured.txt",
]


def test_every_file_is_linked_once_in_order() -> None:
    linked = re.findall(r'href="([^"]+)"', index_page(reversed(FILES)))
    assert linked == [*FILES[:-1], "007-a%3Cb%3E-captured.txt"]


def test_passes_over_a_piece_share_a_line() -> None:
    page = index_page(FILES)
    rows = [re.findall(r">([^<]+)</a>", row) for row in page.split("<tr>")]
    assert ["captured", "drop-dead", "variant"] in rows
    assert sum(map(bool, rows)) == 6  # of the pieces, block1-ff2 has a line of its own


def test_names_are_escaped() -> None:
    assert "a<b>" not in index_page(FILES)
