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
    Span,
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


def toy(
    blocks: Sequence[Sequence[str]], *, batch: int = 2, grid: tuple[int, ...] | None = (4, 4), spans: bool = False
) -> ModelStructure:
    """A model with these kinds of site in its blocks; every site's value is [batch, TOKENS, 8] floats.

    Args:
        blocks: kinds of site per block.
        batch: samples.
        grid: token grid.
        spans: whether every block, and the stack of them, is a span.
    """
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
        spans=_spans(members, sites) if spans else (),
    )


def _spans(blocks: Sequence[Block], sites: Sequence[Site]) -> tuple[Span, ...]:
    """One span per block, then one for all of them; that of the stack and the last block reach the output."""
    runs = [(SiteKind.BLOCK, block.sites) for block in blocks] + [(SiteKind.STACK, tuple(site.id for site in sites))]
    result = []
    for number, (kind, inside) in enumerate(runs, len(sites)):
        members = [sites[i] for i in inside]
        wise = TokenWise.QUERIES if kind is SiteKind.BLOCK else TokenWise.NO
        flops, keys = (sum(getattr(site, name) for site in members) for name in ("flops", "key_flops"))
        span = Span(
            id=SiteId(number),
            block=members[-1].block,
            name=f"{members[0].name} .. {members[-1].name}",
            kind=kind,
            stream=members[-1].stream,
            source="",
            core="",
            update="",
            add="",
            attention=(),
            shape=members[-1].shape,
            itemsize=members[-1].itemsize,
            tokens=TokenFact(wise, 1, TOKENS, "the toy mixes tokens"),
            flops=flops,
            token_flops=flops - keys if kind is SiteKind.BLOCK else 0,
            bytes=sum(site.bytes for site in members),
            attention_flops=sum(site.attention_flops for site in members),
            key_flops=keys,
            inside=inside,
            is_last=sites[-1].id in inside,
        )
        result.append(span)
    return tuple(result)


def _site(number: int, block: int, kind: SiteKind, batch: int) -> Site:
    mixes = kind.is_attention and kind is not SiteKind.CROSS_ATTENTION
    flops = FLOPS[kind.value]
    keys = flops // 4 if mixes else 0
    reason = "the toy mixes tokens" if mixes else ""
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
        attention=(f"attention_{number}",) if kind.is_attention else (),
        shape=(batch, TOKENS, 8),
        itemsize=4,
        tokens=TokenFact(
            TokenWise.QUERIES if mixes else TokenWise.YES, 1, TOKENS, reason, stored=kind is SiteKind.PARALLEL
        ),
        flops=flops,
        token_flops=flops - keys,
        bytes=SITE_BYTES,
        attention_flops=flops // 2 if kind.is_attention else 0,
        key_flops=keys,
        keys=(0, TOKENS) if mixes else (0, 0),
    )
