"""A model's structure as HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from dicompile.html import fragment, table
from dicompile.text import operations_text, ranges_text

if TYPE_CHECKING:
    from dicompile.analysis.structure import ModelStructure


def structure_html(structure: ModelStructure) -> str:
    """The structure as a piece of a page: one row per kind of site and run of equal blocks."""
    rows = []
    for blocks in structure.runs():
        label = ranges_text(int(block.id) for block in blocks)
        for i, site in enumerate(structure.sites_of(blocks[0])):
            flops = sum(structure.sites_of(block)[i].flops for block in blocks)
            shape, share = "x".join(map(str, site.shape)), f"{flops / structure.flops:.1%}"
            rows.append((label, site.kind.value, f"{site.stream}", str(site.tokens), shape, share))
    grid = f", token grid {'x'.join(map(str, structure.grid))}" if structure.grid else ""
    return fragment(
        f"<p>{len(structure.blocks)} blocks of {structure.block_kinds} kinds, {len(structure.streams)} streams, "
        f"{len(structure.sites)} sites, {operations_text(structure.flops)} a call{escape(grid)}</p>",
        table(("blocks", "site", "stream", "single tokens?", "shape", "share of work"), rows, numbers=2),
    )
