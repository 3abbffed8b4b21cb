"""cluster-tokens: clusters of the stream behind a site leave the segment, and nothing else changes."""

from __future__ import annotations

import torch

from dicompile.ops.clusters import cluster_tokens, first_means
from dicompile.passes import LocalStep, Noise, SlotRef, Value
from dicompile.passes.cluster_tokens import ClusterTokens
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.plan import Clusters, Score, ScoreBase, SlotKind
from tests.passes.segments import BATCH, FULL, TOKENS, WIDTH, mlp_block, reported, rewritten, run_segment

CLUSTER, CENTROID = (SlotRef(0, kind) for kind in (SlotKind.CLUSTER, SlotKind.CENTROID))
NOISE = Noise(0, share_guidance=False)
PRODUCED = Score(ScoreBase.CLUSTER, clusters=Clusters(count=3, rounds=9))
FIRST = LocalStep(produces=PRODUCED, writes=(SlotKind.CLUSTER, SlotKind.CENTROID))
NEXT = LocalStep(produces=PRODUCED, goes_on=True, writes=(SlotKind.CLUSTER, SlotKind.CENTROID))

ADDED = """\
%13: (i64[2,16], f32[2,3,8]) = dicompile.cluster_tokens.default(%12, centroid[0], 9)
%14: i64[2,16] = getitem(%13, 0)
%15: f32[2,3,8] = getitem(%13, 1)
return value0 = %12
return cluster[0] = %14
return centroid[0] = %15"""


def test_clusters_go_on_from_the_means_before() -> None:
    block = mlp_block()
    segment, (report,) = reported(block.segment, [NEXT], ClusterTokens())
    assert report.changed == ("site 0: 3 clusters",)
    assert str(segment).endswith(ADDED)
    means = torch.randn(BATCH, 3, WIDTH)
    results = run_segment(segment, {**block.arguments, CENTROID: means})
    assert torch.equal(results[Value(0)], block.output())
    for found, expected in zip(
        (results[CLUSTER], results[CENTROID]), cluster_tokens(block.output(), means, 9), strict=True
    ):
        assert torch.equal(found, expected)


def test_the_first_ones_start_from_tokens_that_are_drawn() -> None:
    block, noise = mlp_block(), torch.rand(BATCH, TOKENS)
    segment = rewritten(block.segment, [FIRST], ClusterTokens())
    assert CENTROID not in segment.inputs
    results = run_segment(segment, {**block.arguments, NOISE: noise})
    expected = cluster_tokens(block.output(), first_means(block.output(), noise, 3), 9)
    assert torch.equal(results[CLUSTER], expected[0])
    assert torch.equal(results[CENTROID], expected[1])


def test_sites_without_clusters_are_left_alone() -> None:
    block = mlp_block()
    assert reported(block.segment, [FULL], ClusterTokens())[1][0].changed == ()
    assert reported(block.segment, [FIRST], ScoreTokens())[1][0].changed == (), "an MLP has no attention to score"
