"""Operations and memory traffic that only serve a part of the model: what skipping it saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from dicompile.analysis.dataflow import Dataflow, numbers, union
from dicompile.analysis.residual import Branch


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes that a site would save: all of it, and the part up to its attention's output."""

    core: tuple[float, float]
    attention: tuple[float, float]


def work_of_branches(flow: Dataflow, branches: Sequence[Branch]) -> list[Work]:
    """What every branch would save."""
    cores = owned_work(flow, [branch.core for branch in branches])
    # Where a stream ends in keys, as that of text does in the last block, its last branches only serve this attention.
    ends = [branch.attention[0] if len(branch.attention) == 1 else None for branch in branches]
    attention = owned_work(flow, ends, [branch.add for branch in branches])
    return [Work(core, part) for core, part in zip(cores, attention, strict=True)]


def owned_work(
    flow: Dataflow, ends: Sequence[fx.Node | None], starts: Iterable[fx.Node] = ()
) -> list[tuple[float, float]]:
    """Operations and bytes that only serve each end; work that several ends share is split evenly between them.

    A node is owned by the ends that it feeds, and by nobody if its value also goes elsewhere, or is one of `starts`.
    """
    owned: dict[fx.Node, int] = {}
    for i, end in enumerate(ends):
        if end is not None:
            owned[end] = owned.get(end, 0) | 1 << i
    elsewhere = 1 << len(ends)
    outside = set(starts)
    owners: dict[fx.Node, int] = {}
    work = [(0.0, 0.0)] * len(ends)
    for node in reversed(flow.nodes):
        owner = owned.get(node) or union(owners[user] for user in node.users) or elsewhere
        stops = node.op == "output" or (node in outside and node not in owned)
        owners[node] = elsewhere if stops else owner
        if owners[node] & elsewhere or node.op != "call_function":
            continue
        (flops, size), count = flow.work[node], owner.bit_count()
        for i in numbers(owner):
            work[i] = work[i][0] + flops / count, work[i][1] + size / count
    return work
