"""``dicompile cache info|clear``: what is kept for the next process, and removing it."""

from __future__ import annotations

from collections import Counter

import typer
from rich.console import Console
from rich.table import Table

from dicompile.config import Settings
from dicompile.store import Store, version
from dicompile.text import size_text

cache_app = typer.Typer(no_args_is_help=True, help="Captures and compiled code that the next process uses again.")


@cache_app.command()
def info() -> None:
    """Show the folder, and what is in it."""
    store = Settings.from_environment().store
    typer.echo(_about(store))
    versions = dict.fromkeys([version(), *(entry.path.parent.name for entry in store.entries())])
    table = Table("made by", "captures", "compiled code", "size")
    for name in versions:
        entries = [entry for entry in store.entries() if entry.path.parent.name == name]
        kinds = Counter(entry.kind for entry in entries)
        label = f"{name} (this one)" if name == version() else name
        table.add_row(label, f"{kinds['capture']}", f"{kinds['code']}", size_text(sum(e.size for e in entries)))
    Console().print(table)


@cache_app.command()
def clear() -> None:
    """Remove everything in it, of all versions."""
    removed = Settings.from_environment().store.clear()
    typer.echo(f"removed {len(removed)} files, {size_text(sum(entry.size for entry in removed))}")


def _about(store: Store) -> str:
    if store.folder is None:
        return "the cache is off (DICOMPILE_CACHE_DIR)"
    return f"{store.folder}, at most {size_text(store.most_bytes)}"
