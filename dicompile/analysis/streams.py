"""Residual streams: which branches add to the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch
from dicompile.analysis.structure import SiteId, Stream, StreamId
from dicompile.analysis.transport import carried
from dicompile.capture import Role


def chain_streams(branches: Sequence[Branch]) -> list[int]:
    """Number the streams: a branch continues the stream whose last add reaches it by casts, splits and joins only."""
    owner: dict[fx.Node, int] = {}
    numbers: list[int] = []
    count = 0
    for branch in branches:
        number = _stream_behind(branch.stream, owner)
        if number is None:
            number, count = count, count + 1
        owner[branch.stream] = owner[branch.add] = number
        numbers.append(number)
    return numbers


def _stream_behind(node: fx.Node, owner: Mapping[fx.Node, int]) -> int | None:
    """Number of the stream carried by `node`; of several that were joined, the last one."""
    return max((owner[found] for found in carried(node, owner)), default=None)


def make_streams(
    flow: Dataflow, branches: Sequence[Branch], numbers: Sequence[int], dependence: Mapping[str, frozenset[Role]]
) -> tuple[Stream, ...]:
    """Streams by number.

    Args:
        flow: of the graph.
        branches: all branches of the model.
        numbers: the stream of every branch.
        dependence: what every node depends on, by name.
    """
    result = []
    for number in sorted(set(numbers)):
        own = [i for i, n in enumerate(numbers) if n == number]
        origin = branches[own[0]].stream
        result.append(
            Stream(
                id=StreamId(number),
                origin=origin.name,
                roles=dependence[origin.name] - {Role.PARAMETER, Role.CONSTANT},
                sites=tuple(SiteId(i) for i in own),
                reaches_output=flow.is_ancestor(branches[own[-1]].add, flow.nodes[-1]),
            )
        )
    return tuple(result)
