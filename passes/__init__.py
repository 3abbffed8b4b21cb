"""Passes: a segment x what its sites do -> a segment with cache reads and writes and nothing dead left in it.

One ordered pipeline. Leave one out with ``DICOMPILE_PASSES=-name``.
"""

from dicompile.passes.adapt_linears import DOWN, UP, adaptable, parameters_of, with_adapters
from dicompile.passes.base import (
    Chosen,
    InputRef,
    Labels,
    LocalStep,
    Noise,
    OutputRef,
    Partner,
    Pass,
    PassReport,
    Predicted,
    ReuseClock,
    Segment,
    SiteNodes,
    SlotRef,
    TokenCount,
    Value,
    Weights,
)
from dicompile.passes.cluster_tokens import ClusterTokens
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.exchange_heads import ExchangeHeads
from dicompile.passes.gather_masks import GatherMasks
from dicompile.passes.keep_layout import KeepLayout
from dicompile.passes.narrow_linear import NarrowLinear
from dicompile.passes.narrow_slots import NarrowSlots
from dicompile.passes.open_spans import OpenSpans
from dicompile.passes.outline import Outline, boundary, outline, outline_until
from dicompile.passes.pipeline import PassRun, rewrite
from dicompile.passes.propagate_tokens import PropagateTokens
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.passes.rejoin_parts import RejoinParts
from dicompile.passes.reuse_sites import ReuseSites
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.passes.share_log_sum_exp import ShareLogSumExp
from dicompile.passes.share_weights import ShareWeights
from dicompile.passes.store_values import StoreValues
from dicompile.passes.use_attention_kernel import UseFlashAttention, UseFlexAttention

PASSES: tuple[Pass, ...] = (
    ScoreTokens(),  # first: it reads the queries and keys of attention that later passes may cut off
    ClusterTokens(),  # likewise the stream, before anything takes the place of what it ends with
    OpenSpans(),  # makes the spans that are stored or reused look like sites to the following passes
    RefreshTokens(),  # before anything is removed: it copies whole branches
    PropagateTokens(),  # likewise
    ReuseSites(),  # cuts branches off their results
    StoreValues(),  # after the cuts, so that it stores what is really computed
    NarrowSlots(),  # once everything is stored and read: casts on both sides, where the plan asks for fewer bits
    RejoinParts(),  # once nothing needs to know any more where a branch begins
    DropDead(),  # removes what the cuts left behind
    ExchangeHeads(),  # attention among ranks is written out as what is left of it is known
    ShareWeights(),  # of attention that is still there: it would keep the others alive
    ShareLogSumExp(),  # likewise, where attention keeps its weights to itself
    GatherMasks(),  # of ranks, where they are still gathered
    NarrowLinear(),  # needs to know which parts of a layer are still read
    DropDead(),  # removes the wide layers that were narrowed, and masks that were gathered as they are
    KeepLayout(),  # last: no later edit may move anything
)

_SHARED = PASSES.index(ShareLogSumExp())


def passes_for(attention: str) -> tuple[Pass, ...]:
    """The passes, where attention is computed in one of the ways that a user may ask for."""
    own = next((item for item in (UseFlashAttention(), UseFlexAttention()) if item.kernel.name == attention), None)
    return PASSES if own is None else (*PASSES[:_SHARED], own, *PASSES[_SHARED:])  # what shares weights goes before


__all__ = [
    "DOWN",
    "PASSES",
    "UP",
    "Chosen",
    "InputRef",
    "Labels",
    "LocalStep",
    "Noise",
    "Outline",
    "OutputRef",
    "Partner",
    "Pass",
    "PassReport",
    "PassRun",
    "Predicted",
    "ReuseClock",
    "Segment",
    "SiteNodes",
    "SlotRef",
    "TokenCount",
    "Value",
    "Weights",
    "adaptable",
    "boundary",
    "outline",
    "outline_until",
    "parameters_of",
    "passes_for",
    "rewrite",
    "with_adapters",
]
