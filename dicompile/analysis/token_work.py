"""Whether a branch can be recomputed for some of its tokens, and which of its operations then shrink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.structure import TokenFact, TokenWise
from dicompile.analysis.tokens import Mixing, token_layouts
from dicompile.nodes import node_argument
from dicompile.ops.kinds import is_attention
from dicompile.ops.layout import Layout
from dicompile.ops.tokens import Carried, MixesTokens


@dataclass(frozen=True, slots=True)
class TokenWork:
    """What a branch can do with chosen tokens.

    Attributes:
        fact: whether it is token-wise.
        flops: operations that shrink with its tokens.
        key_flops: operations that make keys and values of all tokens.
    """

    fact: TokenFact
    flops: int = 0
    key_flops: int = 0


def token_axis(shape: Sequence[int]) -> int:
    """The axis of a stream that counts its tokens: [n, c] or [b, n, ...]."""
    return 0 if len(shape) == 2 else 1


def token_work(flow: Dataflow, stream: fx.Node, end: fx.Node, region: Sequence[fx.Node]) -> TokenWork:
    """What a branch can do with chosen tokens of its stream.

    Args:
        flow: of the graph.
        stream: the value that the branch reads.
        end: its core.
        region: its nodes, in graph order.
    """
    shape = stream.meta["val"].shape
    axis = token_axis(shape)
    count = int(shape[axis])
    if len(shape) != 3 or count == 1:
        has = f"{len(shape)} axes instead of batch, token and channel" if count > 1 else "a single token"
        return TokenWork(TokenFact(TokenWise.NO, axis, count, f"the stream has {has}"))
    to_end = [node for node in region if flow.is_ancestor(node, end)]
    found, refusals = _layouts(to_end, stream, end, Layout.of_stream(shape, [axis]))
    stored = Mixing.STORED in found
    for_keys = _key_nodes(flow, to_end)
    if Mixing.FORBIDDEN in found:
        fact, shrinking = TokenFact(TokenWise.YES, axis, count, stored=stored), found[Mixing.FORBIDDEN]
        for_keys = set()
    elif Mixing.QUERIES in found:
        fact = TokenFact(TokenWise.QUERIES, axis, count, refusals[Mixing.FORBIDDEN], stored)
        shrinking = found[Mixing.QUERIES]
    else:
        why = refusals.get(Mixing.QUERIES, refusals[Mixing.FORBIDDEN])
        fact = TokenFact(TokenWise.NO, axis, count, why, stored)
        behind = found.get(Mixing.STORED, {})
        shrinking = {node: carried for node, carried in behind.items() if not is_attention(node)}
        for_keys = for_keys if stored else set()
    flops = sum(
        flow.work[node][0] * carried.layout.token_share
        for node, carried in shrinking.items()
        if node is not stream and node not in for_keys
    )
    return TokenWork(fact, round(flops), sum(flow.work[node][0] for node in for_keys))


def _layouts(
    region: Sequence[fx.Node], stream: fx.Node, end: fx.Node, layout: Layout
) -> tuple[Mapping[Mixing, Mapping[fx.Node, Carried]], Mapping[Mixing, str]]:
    """What the branch does to tokens under every assumption that keeps them apart, and what forbids the others.

    Without attention there is nothing to assume.
    """
    found: dict[Mixing, Mapping[fx.Node, Carried]] = {}
    refusals: dict[Mixing, str] = {}
    assumed = Mixing if any(map(is_attention, region)) else (Mixing.FORBIDDEN,)
    for mixing in assumed:
        try:
            carried = token_layouts(region, stream, layout, mixing)
        except MixesTokens as mixed:
            refusals[mixing] = str(mixed)
            continue
        if end in carried and carried[end].layout == layout:
            found[mixing] = carried
        else:
            refusals[mixing] = "the branch ends with its tokens on another axis"
    return found, refusals


def _key_nodes(flow: Dataflow, region: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that keys and values of the branch's attention are computed with."""
    keys = [node_argument(node, i) for node in region if is_attention(node) for i in (1, 2)]
    return {node for node in region if any(flow.is_ancestor(node, key) for key in keys)}
