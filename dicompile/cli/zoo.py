"""``dicompile models``: the well-known models whose configs are bundled."""

from __future__ import annotations

from rich.table import Table

from dicompile.cli.show import FAINT, make_console
from dicompile.zoo import MODELS

PICTURE = ("height", "width")
"""The last axes of every latent."""


def models() -> None:
    """List the well-known models, which inspect and plan know without weights or network."""
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    table.add_column("MODEL", no_wrap=True)
    for head in ("parameters", "pixels", "frames", "tokens", "of text"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, model in MODELS.items():
        size = model.size
        film = len(size.latent) > len(PICTURE)
        picture = "x".join(f"{length * model.pixels}" for length in size.latent[-len(PICTURE) :])
        frames = f"{(size.latent[0] - 1) * model.frames + 1}" if film else ""
        text = f"{size.text}" if size.text else ""
        table.add_row(name, f"{model.billions} B", picture, frames, f"{model.tokens(size)}", text)
    make_console().print(table)
