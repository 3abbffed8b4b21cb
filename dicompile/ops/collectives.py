"""Collectives: operators through which the ranks of a process group exchange values, as torch traces them.

They are functional, so a pass that skips attention skips its collectives with it, and all ranks have to skip the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed, fx
from torch._ops import OpOverload, OpOverloadPacket

from dicompile.compat import process_group
from dicompile.ops.ulysses import ULYSSES

NAMESPACES = ("_c10d_functional", "c10d")


def is_collective_operator(operator: object) -> bool:
    """True for an operator that needs other ranks, whichever overload is called."""
    if isinstance(operator, OpOverload):
        return operator.namespace in NAMESPACES
    return isinstance(operator, OpOverloadPacket) and operator._qualified_op_name.partition("::")[0] in NAMESPACES


def is_collective(node: fx.Node) -> bool:
    """True for an operator that needs other ranks; waiting for its result is one, too."""
    return is_collective_operator(node.target) or node.target is ULYSSES


def is_called(node: fx.Node, name: str) -> bool:
    """True for the functional collective of this name, "all_to_all_single", say; "wait_tensor" waits for its result."""
    return is_collective(node) and str(node.target) == f"_c10d_functional.{name}.default"


def sum_over_ranks(value: Tensor, group: str) -> Tensor:
    """The sum of what all ranks of a group have, which has the same bits on each of them."""
    sent = torch.ops._c10d_functional.all_reduce(value, "sum", group)
    summed: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return summed


def find_sum(nodes: Iterable[fx.Node]) -> tuple[int, str] | None:
    """Number of ranks, and name of their group, of the first sum over ranks; None if there is none.

    Each of them has some heads of the attention in front of it then.
    """
    names = (str(node.args[2]) for node in nodes if is_called(node, "all_reduce"))
    return next(((distributed.get_world_size(process_group(name)), name) for name in names), None)


def ranks_of(attention: fx.Node) -> int:
    """Number of ranks whose tokens an attention is among: each has as many queries, and does its share of the heads."""
    ranks: int = attention.kwargs.get("ranks", 1)  # type: ignore[assignment]
    return ranks if attention.target is ULYSSES else 1


def find_gathered(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What gathers a tensor from all ranks, and what waits for it, in order."""
    for gather in graph.nodes:
        if is_called(gather, "all_gather_into_tensor"):
            yield from ((gather, user) for user in list(gather.users) if is_called(user, "wait_tensor"))


def groups_of(graph: fx.Graph) -> tuple[str, ...]:
    """Names of the process groups whose ranks exchange values, in the order in which they first do."""
    found = (node.kwargs.get("group", node.args[-1]) for node in graph.nodes if is_collective(node))
    return tuple(dict.fromkeys(name for name in found if isinstance(name, str)))
