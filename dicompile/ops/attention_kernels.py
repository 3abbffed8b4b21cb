"""Attention by a kernel that the user chose in the place of torch's choice: what it has to tell of itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from dicompile.errors import InvalidSetting
from dicompile.ops.kinds import ATTENTION
from dicompile.ops.ulysses import ULYSSES
from dicompile.text import module_path

log = logging.getLogger("dicompile")


@dataclass(frozen=True)
class AttentionKernel:
    """An operator that computes attention.

    Attributes:
        name: what users call it.
        operator: returns the output, [b, h, n, e], with heads after tokens in memory, and the logsumexp of the logits,
            float32, [b, h, n].
        arguments: those of the operator for an attention node that it can compute, where a score reads the logsumexp,
            or does not.
        why_not: why it cannot compute an attention node; None if it can.
        is_for: whether it is meant for an attention node at all. That others stay with torch is no news.
        makes_lse: whether it makes the logsumexp of a node that it can compute, where that is asked for.
    """

    name: str
    operator: OpOverload
    arguments: Callable[[fx.Node, bool], tuple[Any, ...]]
    why_not: Callable[[fx.Node], str | None]
    is_for: Callable[[fx.Node], bool] = lambda _: True
    makes_lse: Callable[[fx.Node], bool] = lambda _: True


def check_fits(graph: fx.Graph, kernel: AttentionKernel) -> None:
    """Say which attention of a graph a kernel cannot compute.

    Raises:
        InvalidSetting: all of it, or there is none.
    """
    reasons = {node: kernel.why_not(node) for node in graph.nodes if node.target in (ATTENTION, ULYSSES)}
    staying = {node: why for node, why in reasons.items() if why is not None}
    unexpected = {node: why for node, why in staying.items() if kernel.is_for(node)}
    node, why = next(iter((unexpected or staying).items()), (None, "it has none"))
    where = "the model" if node is None else module_path(node) or node.name
    if len(staying) == len(reasons):
        raise InvalidSetting(
            f"attention {kernel.name!r} can compute no attention of this model",
            where=where,
            why=why,
            fix="leave attention out: torch chooses a kernel that can",
        )
    if unexpected:
        log.warning("%d of %d attentions stay with torch: %s, %s", len(staying), len(reasons), where, why)
