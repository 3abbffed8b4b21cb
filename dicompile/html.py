"""Small pieces of HTML: what structure and plan show in a notebook, and whole pages that need nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
.dicompile{color-scheme:light dark}
.dicompile{--ink:#1c2330;--faint:#5b6472;--line:#d5dae2;--back:#fff;--F:#1f5fae;--t:#2b8aa3;--b:#8a4fb0;--f:#2f7d4a;
--r:#c5cdd8;--s:#eef1f5;--x:#c98a1b;color:var(--ink);background:var(--back);font:14px/1.45 system-ui,sans-serif}
@media (prefers-color-scheme:dark){.dicompile{--ink:#e6e9ef;--faint:#a2abb9;--line:#3a4250;--back:#14181f;--F:#6fa8ee;
--t:#5cbcd6;--b:#c08be6;--f:#69c08a;--r:#465061;--s:#222933;--x:#e6b04d}}
.dicompile h1{font-size:1.4em;margin:0 0 .6em}.dicompile h2{font-size:1.15em;margin:1.2em 0 .3em}
.dicompile p{margin:.3em 0}
.dicompile .wide{overflow-x:auto}.dicompile table{border-collapse:collapse;margin:.4em 0}
.dicompile th,.dicompile td{text-align:left;padding:.15em .7em .15em 0;border:0;vertical-align:top}
.dicompile .lanes th,.dicompile .number{white-space:nowrap}
.dicompile tr{background:none!important}.dicompile thead th{border-bottom:1px solid var(--line);color:var(--faint)}
.dicompile .number{text-align:right;font-variant-numeric:tabular-nums}
.dicompile .lanes td,.dicompile .lanes thead th{padding:1px}.dicompile .lanes th{vertical-align:middle}
.dicompile .lanes tbody th{font-weight:normal}
.dicompile .lanes i{display:block;width:11px;height:16px;border-radius:2px}
.dicompile .lanes .bar{vertical-align:bottom;height:42px}.dicompile .lanes .bar i{background:var(--faint)}
.dicompile i.F,.dicompile .bar i.F{background:var(--F)}.dicompile i.t{background:var(--t)}
.dicompile i.b{background:var(--b)}.dicompile i.f{background:var(--f)}.dicompile i.r{background:var(--r)}
.dicompile i.s{background:var(--s)}.dicompile i.x{background:var(--x)}
.dicompile .key{display:flex;flex-wrap:wrap;gap:.2em 1.2em;color:var(--faint)}
.dicompile .key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:.4em}
@media print{.dicompile i{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def fragment(*parts: str) -> str:
    """What a notebook shows: the parts with their style."""
    return f'<div class="dicompile"><style>{STYLE}</style>{"".join(parts)}</div>'


def page(title: str, *fragments: str) -> str:
    """A whole page that loads nothing from anywhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}body{{margin:0;padding:1.2em}}</style></head>"
        f'<body class="dicompile"><h1>{escape(title)}</h1>{"".join(fragments)}</body></html>\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table of text.

    Args:
        head: names of the columns.
        rows: their cells.
        numbers: how many columns, counted from the last one, hold numbers.
    """
    first = len(head) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="number"' if i >= first else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'
