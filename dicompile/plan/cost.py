"""What a step costs: operations, memory traffic, and the roofline time that follows from them."""

from __future__ import annotations

import math
from dataclasses import replace

from dicompile.analysis import ModelStructure, Site, SiteKind, Span, TokenWise
from dicompile.ops.clusters import cluster_flops, counted_rounds
from dicompile.plan.action import Action, Clusters, Context, ScoreBase, SlotKind, What
from dicompile.plan.plan import FLOPS_PER_BYTE, StepPlan


def with_cost(structure: ModelStructure, step: StepPlan) -> StepPlan:
    """The step with its operations, memory traffic and roofline time."""
    rest_flops, rest_bytes = _rest(structure)
    flops, size, time = 0.0, 0.0, 0.0
    leaves = len(structure.sites)
    for site, planned in zip(structure.sites, step.sites[:leaves], strict=True):
        saved_flops, saved_bytes = saving(site, planned.action)
        own_flops, own_bytes = site.flops - saved_flops, site.bytes - saved_bytes
        flops, size, time = flops + own_flops, size + own_bytes, time + _roofline(own_flops, own_bytes)
    for span, planned in zip(structure.spans, step.sites[leaves:], strict=True):
        if planned.action.is_full:
            continue
        # Sites inside have counted already; what is left is their modulation, or the tokens that the span computes.
        saved_flops, saved_bytes = saving(span, planned.action)
        inside = [structure.sites[i] for i in span.inside]
        rest_flops -= saved_flops - sum(site.flops for site in inside)
        rest_bytes -= saved_bytes - sum(site.bytes for site in inside)
    score_flops, score_bytes = scoring(structure, step)
    return replace(
        step,
        flops=round(flops + rest_flops + score_flops),
        score_flops=round(score_flops),
        bytes=round(size + rest_bytes + score_bytes),
        time=time + _roofline(rest_flops, rest_bytes) + _roofline(score_flops, score_bytes),
    )


def scoring(structure: ModelStructure, step: StepPlan) -> tuple[float, float]:
    """Operations and memory traffic of the scores that a step makes from logits of attention, and of its clusters.

    Sites with one attention share its score; a site that refreshes tokens scores these alone.
    """
    shares: dict[tuple[str, ...], tuple[Site, float]] = {}
    flops, size = 0.0, 0.0
    for site, planned in zip(structure.sites, step.sites, strict=False):
        if planned.score is not None and planned.score.clusters is not None:
            own = clustering(site, planned.score.clusters)
            flops, size = flops + own[0], size + own[1]
        tokens, writes = planned.action.tokens, any(slot.kind is SlotKind.SCORE for slot in planned.writes)
        if planned.score is not None and planned.score.base.needs_logits:
            shares[site.attention] = site, 1.0
        elif tokens is not None and tokens.score.base.needs_logits and writes:
            shares[site.attention] = site, tokens.count / site.tokens.count
    flops += sum(site.score_flops * share for site, share in shares.values())
    return flops, size + sum(site.score_bytes * share for site, share in shares.values())


def clustering(site: Site, clusters: Clusters) -> tuple[float, float]:
    """Operations and memory traffic of k-means behind a site, if it takes as many rounds as usual.

    A round holds every token against every mean, and makes the means anew: both read all tokens.
    """
    rows, width = math.prod(site.shape[:-1]), site.shape[-1]
    size = counted_rounds(clusters.rounds) * 2 * rows * width * 4
    return cluster_flops(rows, width, clusters.count, clusters.rounds), size


def with_check(structure: ModelStructure, step: StepPlan, span: Span) -> StepPlan:
    """Note what computing a span beside what is recalled of it costs."""
    inside = [structure.sites[i] for i in span.inside]
    flops = sum(site.flops for site in inside)
    return replace(
        step, verified=int(span.id), check=(flops, sum(_roofline(site.flops, site.bytes) for site in inside))
    )


def with_predictor(structure: ModelStructure, step: StepPlan, cost: float) -> StepPlan:
    """Add what the predictor costs at steps that rank tokens by it."""
    ranked = any(s.action.tokens and s.action.tokens.score.base is ScoreBase.PREDICTED for s in step.sites)
    extra = cost * structure.flops / max(len(structure.blocks), 1) if ranked else 0.0
    return replace(step, flops=step.flops + round(extra), time=step.time + extra)


def with_adapters(structure: ModelStructure, step: StepPlan, numbers: int) -> StepPlan:
    """Let LoRA weights of so many numbers be added where something of a block is cached, and count what that costs."""
    blocks = [span for span in structure.spans if span.kind is SiteKind.BLOCK]
    if not numbers or all(step.sites[span.id].action.is_full for span in blocks):
        return step
    rows = max(math.prod(span.shape[:-1]) for span in blocks)
    extra = 2 * rows * numbers
    return replace(step, flops=step.flops + extra, time=step.time + extra, is_adapted=True)


def saving(site: Site, action: Action) -> tuple[float, float]:
    """Operations and memory traffic that an action saves at a site or span."""
    if action.is_full:
        return 0.0, 0.0
    if not action.computes:
        flops = float(site.attention_flops if action.what is What.ATTENTION else site.flops)
        read = site.core_bytes * sum(weight != 0.0 for weight in action.weights[1:])
        return flops, site.bytes * (flops / site.flops if site.flops else 1) - min(read, site.bytes)
    if action.tokens is None:
        return 0.0, 0.0
    share = 1 - action.tokens.count / site.tokens.count
    flops = site.token_flops * share
    if site.keys[1] and action.tokens.context is Context.STORED and site.tokens.wise is not TokenWise.YES:
        own = site.flops - site.attention_flops
        flops = site.attention_flops + own * share
    elif action.tokens.context is Context.KEPT:
        flops += site.key_flops * share + site.attention_flops * share * (1 - share)
    return flops, site.bytes * (flops / site.flops if site.flops else 0)


def baseline_time(structure: ModelStructure) -> float:
    """Roofline time of a step that computes everything, in operations."""
    return sum(_roofline(site.flops, site.bytes) for site in structure.sites) + _roofline(*_rest(structure))


def _rest(structure: ModelStructure) -> tuple[float, float]:
    """Operations and memory traffic outside of the sites: embeddings, modulation, head."""
    flops = structure.flops - sum(site.flops for site in structure.sites)
    return flops, structure.bytes - sum(site.bytes for site in structure.sites)


def _roofline(flops: float, size: float) -> float:
    return max(flops, size * FLOPS_PER_BYTE)
