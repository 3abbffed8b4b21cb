"""A structure as a notebook shows it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

from dicompile.html import page, table
from tests.plan.toys import toy


def cells(html: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in ET.fromstring(html).iter("tr")]


def test_equal_blocks_are_one_row_per_site() -> None:
    structure = toy([("self-attention", "mlp"), ("self-attention", "mlp"), ("parallel",)])
    head, *rows = cells(structure._repr_html_())
    assert head[:2] == ["blocks", "site"]
    shares = [f"{flops / structure.flops:.1%}" for flops in (2 * 1_000, 2 * 2_000, 3_000)]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("0-1", "self-attention", shares[0]),
        ("0-1", "mlp", shares[1]),
        ("2", "parallel", shares[2]),
    ]


def test_nothing_that_a_model_is_called_becomes_markup() -> None:
    structure = toy([("mlp",)])
    fact = replace(structure.sites[0].tokens, reason="<script>alert(1)</script>")
    strange = replace(structure, sites=(replace(structure.sites[0], tokens=fact),))
    assert "<script" not in strange._repr_html_()
    assert "<b>" not in page("<b>", table(("<b>",), [("<b>",)]))


def test_numbers_stand_on_the_right() -> None:
    row = next(iter(ET.fromstring(table(("a", "b"), [("1", "2")], numbers=1)).iter("tbody")))[0]
    assert [cell.get("class") for cell in row] == [None, "number"]
