"""Typed access to fx nodes, whose values and arguments fx itself types as nearly anything, and the walk along them.

Only positional arguments are read: that is where captured ATen graphs keep whatever is not keyword-only.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor that `node` returns.

    Raises:
        TypeError: it returns something else.
    """
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} returns {type(value).__name__}, not one tensor")
    return value


def node_argument(node: fx.Node, position: int) -> fx.Node:
    """An argument that is another node's result.

    Raises:
        TypeError: it is something else.
    """
    argument = node.args[position]
    if not isinstance(argument, fx.Node):
        raise TypeError(f"argument {position} of {node.name} is {argument!r}, not a node")
    return argument


def int_argument(node: fx.Node, position: int, default: int | None = None) -> int:
    """A literal int, or `default` where the call leaves it out.

    Raises:
        TypeError: it is something else, or left out without a default.
    """
    argument = node.args[position] if len(node.args) > position else default
    if not isinstance(argument, int):
        raise TypeError(f"argument {position} of {node.name} is {argument!r}, not an int")
    return argument


def list_argument(node: fx.Node, position: int) -> Sequence[Any]:
    """An argument that is a list: of sizes, axes or nodes.

    Raises:
        TypeError: it is something else.
    """
    argument = node.args[position]
    if not isinstance(argument, (list, tuple)):
        raise TypeError(f"argument {position} of {node.name} is {argument!r}, not a list")
    return argument


def walk(
    start: Iterable[fx.Node],
    neighbours: Callable[[fx.Node], Iterable[fx.Node]] = operator.attrgetter("all_input_nodes"),
) -> Iterator[fx.Node]:
    """Nodes that can be reached, each once, the nearest first.

    Args:
        start: they come first.
        neighbours: where to go on from a node, nowhere if it gives none; by default what it is computed from.
    """
    queue = deque(dict.fromkeys(start))
    seen = set(queue)
    while queue:
        node = queue.popleft()
        yield node
        for neighbour in neighbours(node):
            if neighbour not in seen:
                seen.add(neighbour)
                queue.append(neighbour)


def results_of(graph: fx.Graph) -> list[Any]:
    """What a graph returns: nodes, and constants."""
    returned: Any = graph.output_node().args[0]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]
