"""Remove everything that no output needs any more, inputs included.

Before::

    %3: f32[2,64,128] = aten.linear.default(%2, @mlp.0.weight)
    %4: f32[2,64,32] = aten.linear.default(%3, @mlp.2.weight)
    return value0 = stream

After::

    return value0 = stream

A dropped input means that the runtime need not fetch it: a reuse step does not even touch the weights of what it skips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dicompile.passes.base import PassReport, Segment


@dataclass(frozen=True)
class DropDead:
    """Dead code elimination on nodes and inputs."""

    name: ClassVar[str] = "drop-dead"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Remove dead nodes and unused inputs."""
        before = len(segment.graph.nodes)
        for node in reversed(list(segment.graph.nodes)):
            if node.op == "call_function" and not node.users:
                segment.graph.erase_node(node)
        placeholders = [node for node in segment.graph.nodes if node.op == "placeholder"]
        kept = [bool(node.users) for node in placeholders]
        for node, keep in zip(placeholders, kept, strict=True):
            if not keep:
                segment.graph.erase_node(node)
        segment.inputs = [ref for ref, keep in zip(segment.inputs, kept, strict=True) if keep]
        removed = before - len(segment.graph.nodes)
        return PassReport((f"{removed} nodes",) if removed else ())
