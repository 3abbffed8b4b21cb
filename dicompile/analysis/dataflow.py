"""Reachability between all pairs of nodes of a graph, as bit sets: one integer per node."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from dicompile.ops.cost import node_bytes, node_flops


class Dataflow:
    """Ancestors and descendants of every node, itself included.

    A set of nodes is an int whose bit i stands for the i-th node of the graph, so that union, intersection and test are
    single machine operations even for graphs of ten thousand nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: dict[fx.Node, int] = {}
        self.descendants: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 1 << self.position[node]
            for parent in node.all_input_nodes:
                bits |= self.ancestors[parent]
            self.ancestors[node] = bits
        for node in reversed(self.nodes):
            bits = 1 << self.position[node]
            for user in node.users:
                bits |= self.descendants[user]
            self.descendants[node] = bits

    @functools.cached_property
    def work(self) -> dict[fx.Node, tuple[int, int]]:
        """Operations and bytes of every node."""
        return {node: (node_flops(node), node_bytes(node)) for node in self.nodes}

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """The set of `nodes`."""
        result = 0
        for node in nodes:
            result |= 1 << self.position[node]
        return result

    def select(self, predicate: Callable[[fx.Node], bool]) -> int:
        """The set of nodes for which `predicate` holds."""
        return self.bits(node for node in self.nodes if predicate(node))

    def contains(self, bits: int, node: fx.Node) -> bool:
        """True if `node` is in a set."""
        return bool(bits >> self.position[node] & 1)

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a set, in graph order."""
        return (self.nodes[i] for i in numbers(bits))

    def names(self, bits: int) -> tuple[str, ...]:
        """Names of the nodes of a set, in graph order."""
        return tuple(node.name for node in self.members(bits))

    def is_ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        """True if `of` is computed from `node` (or is it)."""
        return bool(self.ancestors[of] >> self.position[node] & 1)

    def between(self, start: fx.Node, end: fx.Node) -> int:
        """Every node on a path from `start` to `end`, `start` left out."""
        return self.descendants[start] & self.ancestors[end] & ~(1 << self.position[start])


def numbers(bits: int) -> Iterator[int]:
    """Numbers of the bits that are set, rising."""
    digits = bin(bits)[:1:-1]  # in one go: every operation on such an int walks all of it
    i = digits.find("1")
    while i >= 0:
        yield i
        i = digits.find("1", i + 1)


def union(sets: Iterable[int]) -> int:
    """Nodes that are in any of the sets."""
    return functools.reduce(operator.or_, sets, 0)
