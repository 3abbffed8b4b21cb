"""What a step costs: operations, memory traffic, and the roofline time that follows from them."""

from __future__ import annotations

import math
from dataclasses import replace

from dicompile.analysis import ModelStructure, Site, SiteKind, Span, TokenWise
from dicompile.plan.action import Action, Context, ScoreBase, SlotKind, What
from dicompile.plan.plan import FLOPS_PER_BYTE, StepPlan


def with_cost(structure: ModelStructure, step: StepPlan) -> StepPlan:
    """The step with its operations, memory traffic and roofline time."""
    flops, size, time = float(structure.flops), float(structure.bytes), baseline_time(structure)
    leaves = len(structure.sites)
    for site, planned in zip(structure.sites, step.sites[:leaves], strict=True):
        saved_flops, saved_bytes = saving(site, planned.action)
        before = _roofline(site.flops, site.bytes)
        after = _roofline(site.flops - saved_flops, site.bytes - saved_bytes)
        flops, size, time = flops - saved_flops, size - saved_bytes, time - before + after
    for span, planned in zip(structure.spans, step.sites[leaves:], strict=True):
        saved_flops, saved_bytes = saving(span, planned.action)
        inside = [structure.sites[i] for i in span.inside]
        if planned.action.is_full:
            continue
        # Sites inside have counted already; what is left is their modulation, or the tokens that the span computes.
        saved_flops -= sum(site.flops for site in inside)
        saved_bytes -= sum(site.bytes for site in inside)
        flops, size, time = flops - saved_flops, size - saved_bytes, time - saved_flops
    score_flops, score_bytes = scoring(structure, step)
    return replace(
        step,
        flops=round(flops + score_flops),
        score_flops=round(score_flops),
        bytes=round(size + score_bytes),
        time=time + _roofline(score_flops, score_bytes),
    )


def scoring(structure: ModelStructure, step: StepPlan) -> tuple[float, float]:
    """Operations and memory traffic of the scores that a step makes from logits of attention.

    Sites with one attention share its score; a site that refreshes tokens scores these alone.
    """
    shares: dict[tuple[str, ...], tuple[Site, float]] = {}
    for site, planned in zip(structure.sites, step.sites, strict=False):
        tokens, writes = planned.action.tokens, any(slot.kind is SlotKind.SCORE for slot in planned.writes)
        if planned.score is not None and planned.score.base.needs_logits:
            shares[site.attention] = site, 1.0
        elif tokens is not None and tokens.score.base.needs_logits and writes:
            shares[site.attention] = site, tokens.count / site.tokens.count
    flops = sum(site.score_flops * share for site, share in shares.values())
    return flops, sum(site.score_bytes * share for site, share in shares.values())


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
        return flops, site.bytes * (flops / site.flops if site.flops else 1) - min(site.core_bytes, site.bytes)
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
    inside = sum(_roofline(site.flops, site.bytes) for site in structure.sites)
    rest_flops = structure.flops - sum(site.flops for site in structure.sites)
    rest_bytes = structure.bytes - sum(site.bytes for site in structure.sites)
    return inside + _roofline(rest_flops, rest_bytes)


def _roofline(flops: float, size: float) -> float:
    return max(flops, size * FLOPS_PER_BYTE)
