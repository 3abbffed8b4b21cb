"""Hand-made structures, so that plans can be tested without a model."""

from __future__ import annotations

from collections.abc import Sequence

from dicompile.analysis import (
    Block,
    BlockId,
    ModelStructure,
    Site,
    SiteId,
    SiteKind,
    StreamId,
    TokenFact,
    TokenWise,
)

TOKENS = 16
FLOPS = {"self-attention": 1_000, "cross-attention": 400, "mlp": 2_000, "joint-attention": 1_000, "parallel": 3_000}
REST = 500
"""Operations of the toy outside its sites."""
SITE_BYTES = 3_000
"""Memory traffic of a site; its value is [2, 16, 8] floats, 1024 bytes."""


def toy(blocks: Sequence[Sequence[str]], *, batch: int = 2, grid: tuple[int, int] | None = (4, 4)) -> ModelStructure:
    """A model with these kinds of site in its blocks; every site's value is [batch, TOKENS, 8] floats."""
    sites: list[Site] = []
    members: list[Block] = []
    for b, kinds in enumerate(blocks):
        first = len(sites)
        sites += [_site(first + i, b, SiteKind(kind), batch) for i, kind in enumerate(kinds)]
        ids = tuple(site.id for site in sites[first:])
        members.append(Block(BlockId(b), f"blocks.{b}", ids, "kind", (), (b, len(blocks))))
    return ModelStructure(
        inputs=(),
        streams=(),
        blocks=tuple(members),
        sites=tuple(sites),
        prologue=(),
        epilogue=(),
        grid=grid,
        flops=sum(site.flops for site in sites) + REST,
        bytes=SITE_BYTES * len(sites) + 300,
        dependence={},
    )


def _site(number: int, block: int, kind: SiteKind, batch: int) -> Site:
    wise = TokenWise.QUERIES if kind.is_attention and kind is not SiteKind.CROSS_ATTENTION else TokenWise.YES
    flops = FLOPS[kind.value]
    return Site(
        id=SiteId(number),
        block=BlockId(block),
        name=f"blocks.{block}.{kind.value}",
        kind=kind,
        stream=StreamId(0),
        source="",
        core="",
        update="",
        add="",
        attention=(),
        shape=(batch, TOKENS, 8),
        itemsize=4,
        tokens=TokenFact(wise, 1, TOKENS),
        flops=flops,
        token_flops=flops if wise is TokenWise.YES else 0,
        bytes=SITE_BYTES,
    )
