"""The page that links what ``DICOMPILE_DEBUG`` wrote: a line for every stage, and one for all passes over a piece."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from urllib.parse import quote

from dicompile.html import page

INDEX = "index.html"

_FIRST = "-captured"
_MEANS = {
    "captured": "the model's graph",
    "structure": "blocks, branches, tokens",
    "plan": "what every site does at every step",
}


def index_page(names: Iterable[str]) -> str:
    """The page for a folder.

    Args:
        names: of its text files, ``017-block1-ff-drop-dead.txt``.
    """
    rows = "".join(
        f"<tr><td>{escape(what)}</td><td>{escape(about)}</td><td>{' &rarr; '.join(links)}</td></tr>"
        for what, about, links in _rows(sorted(names))
    )
    head = "<thead><tr><th>stage</th><th></th><th>files, in the order in which they were made</th></tr></thead>"
    return page("dicompile, stage by stage", f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>')


def _rows(names: list[str]) -> Iterable[tuple[str, str, list[str]]]:
    """Name of a stage, what it is, and its files; passes over one piece follow each other."""
    rows: list[tuple[str, str, list[str]]] = []
    piece = ""
    for name in names:
        stage = name.partition("-")[2].removesuffix(".txt")
        if piece and stage.startswith(f"{piece}-"):
            rows[-1][2].append(_link(name, stage.removeprefix(f"{piece}-")))
            continue
        piece = stage.removesuffix(_FIRST) if stage.endswith(_FIRST) else ""
        if piece:
            rows.append((piece, "rewritten", [_link(name, _FIRST[1:])]))
        else:
            about = "what runs" if stage.startswith("step") else _MEANS.get(stage, "")
            rows.append((stage, about, [_link(name, name)]))
    return rows


def _link(name: str, label: str) -> str:
    return f'<a href="{quote(name)}">{escape(label)}</a>'
