"""Find clusters of tokens behind a site, on steps that compute it.

Later steps compute one token of every cluster (`propagate_tokens`), at sites before this one as well.

Before::

    %9: f32[2,64,32] = aten.add.Tensor(stream, %8)          # the site's add

After::

    %9: f32[2,64,32] = aten.add.Tensor(stream, %8)
    %10 = dicompile.cluster_tokens.default(%9, centroid[0], 100)
    %11: i64[2,64] = getitem(%10, 0)
    %12: f32[2,16,32] = getitem(%10, 1)
    return cluster[0] = %11
    return centroid[0] = %12

The first time, means are tokens that ``noise[0]`` has drawn. The stream itself is not touched.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dicompile.nodes import tensor_of
from dicompile.ops.clusters import first_means
from dicompile.passes.base import Noise, PassReport, Segment, SlotRef
from dicompile.passes.edit import Editor
from dicompile.plan import Clusters, SlotKind


@dataclass(frozen=True)
class ClusterTokens:
    """Add the clusters that later steps ask for as outputs of computing sites."""

    name: ClassVar[str] = "cluster-tokens"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Cluster the stream behind every site whose step produces clusters."""
        changed = []
        for position, step in enumerate(segment.steps):
            if step.produces is not None and step.produces.clusters is not None:
                _cluster(segment, position, step.produces.clusters, goes_on=step.goes_on)
                changed.append(f"site {position}: {step.produces.clusters.count} clusters")
        return PassReport(tuple(changed))


def _cluster(segment: Segment, position: int, clusters: Clusters, *, goes_on: bool) -> None:
    editor, stream = Editor(segment), segment.sites[position].add
    batch, tokens, width = (int(size) for size in tensor_of(stream).shape)
    with editor.before(segment.graph.output_node()):
        if goes_on:
            shape = batch, clusters.count, width
            means = editor.tensor_input(SlotRef(position, SlotKind.CENTROID), shape, torch.float32, stream)
        else:
            noise = editor.tensor_input(Noise(position, share_guidance=False), (batch, tokens), torch.float32, stream)
            means = _drawn(editor, stream, noise, clusters.count)
        found = editor.call(torch.ops.dicompile.cluster_tokens.default, stream, means, clusters.rounds)
        labels, means = (editor.call(operator.getitem, found, i) for i in range(2))
    editor.output(SlotRef(position, SlotKind.CLUSTER), labels)
    editor.output(SlotRef(position, SlotKind.CENTROID), means)


def _drawn(editor: Editor, stream: fx.Node, noise: fx.Node, count: int) -> fx.Node:
    def means(tokens: Tensor, noise: Tensor) -> Tensor:
        return first_means(tokens, noise, count)

    return editor.trace(means, stream, noise)
