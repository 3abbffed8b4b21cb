"""Spans: runs of sites on one residual stream, which can be reused as a whole.

A run goes on while the next branch starts from the value that the last add left, moved about but not computed with, and
of the same shape. Streams that are joined (FLUX: text and image, then both as one) therefore make several runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch, carried
from dicompile.analysis.structure import Site


def find_runs(branches: Sequence[Branch], sites: Sequence[Site], members: Iterable[int]) -> list[list[int]]:
    """Cut sites into runs.

    Args:
        branches: all branches of the model.
        sites: the sites made of them.
        members: numbers of the sites to cut, in execution order.

    Returns:
        Runs in the order in which they end.
    """
    runs: list[list[int]] = []
    for i in members:
        branch = branches[i]
        run = next(
            (r for r in runs if _continues(branches[r[-1]], branch) and sites[r[-1]].stream == sites[i].stream), []
        )
        if not run:
            runs.append(run)
        run.append(i)
    return sorted(runs, key=lambda run: run[-1])


def last_adds(flow: Dataflow, branches: Sequence[Branch]) -> set[fx.Node]:
    """Residual adds that the model's output reads without passing through another one."""
    adds = {branch.add for branch in branches}
    queue, seen, found = [flow.nodes[-1]], {flow.nodes[-1]}, set()
    while queue:
        node = queue.pop()
        if node in adds:
            found.add(node)
            continue
        parents = [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(parents)
        queue += parents
    return found


def _continues(before: Branch, after: Branch) -> bool:
    same_shape = before.add.meta["val"].shape == after.stream.meta["val"].shape
    return same_shape and before.add in carried(after.stream, {before.add})
