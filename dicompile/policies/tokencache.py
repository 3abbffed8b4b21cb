"""TokenCache: a trained predictor says which tokens of which block need computing, a schedule says when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dicompile.errors import InvalidPolicy
from dicompile.plan import Origin, Policy, Predictor, Rule, TokenScore, TokenTable, load_predictor

Steps = tuple[int, ...]
"""Numbers of the steps that compute everything, in calling order."""


def TokenCache(
    predictor: Predictor | str | Path,
    ratio: float = 0.5,
    schedule: Literal["round-robin", "percentile"] = "round-robin",
    intervals: tuple[int, int] = (3, 1),
    switch: float = 0.5,
    independent_steps: int | None = None,
    block_ratio: float | None = None,
    kv: Literal["all", "kept"] = "all",
    guidance: Literal["shared", "separate"] = "shared",
    multiple: int = 1,
) -> Policy:
    """Token caching by learned importance.

    Independent steps compute everything. At prediction steps every block runs on its most important tokens; for the
    others the block's last update (what it added to the stream) is added again. If the predictor was trained with LoRA
    weights for the last blocks, these blocks compute all tokens, and at prediction steps with the LoRA. At independent
    steps, at which there is no error of caching to make up for, the model is what it is; the paper does not say.

    Args:
        predictor: the file that ``dicompile train-predictor`` wrote, or what it holds; only a policy that names a file
            can be written to one.
        ratio: share of (block, token) pairs that are cached at a prediction step. How many tokens each block keeps
            follows from the importance on calibration runs, fixed per step. Blocks with LoRA weights count as computed,
            and are, however large the ratio is.
        schedule: "round-robin": two phases with intervals of their own (version 1 of the paper); "percentile":
            independent steps at uniform percentiles of the accumulated importance (version 2).
        intervals: prediction steps after each independent step in the early and in the late phase. Inferred: the paper
            says only that the first is larger.
        switch: where the late phase begins, as a share of the steps. Inferred.
        independent_steps: their number, for "percentile"; by default as many as "round-robin" would make.
        block_ratio: select whole blocks first, as in version 1: this share of blocks, the least important ones, caches
            `ratio` of its tokens, the others compute everything. Inferred.
        kv: "all": refreshed tokens attend to keys and values of all tokens, "kept": to those of refreshed tokens only.
            The paper leaves it open; "all" is what the predictor is trained for.
        guidance: "shared": both guidance halves of a batch compute the same tokens; "separate": each its own. Inferred.
        multiple: numbers of tokens are rounded to multiples of this.

    Raises:
        InvalidPolicy: an option is outside its range.
        InvalidPredictor: the file cannot be read.

    Reference:
        Lou et al., Token Caching for Diffusion Transformer Acceleration, arXiv 2409.18523, version 2, sections 3 and 4.
    """
    for name, share in (("ratio", ratio), ("switch", switch), ("block_ratio", block_ratio or 0.0)):
        if not 0 <= share <= 1:
            raise InvalidPolicy(f"option {name!r} cannot be {share!r}", where="TokenCache", fix="give a share, 0 to 1")
    known = predictor if isinstance(predictor, Predictor) else load_predictor(predictor)
    independent = round_robin(known.steps, intervals, switch)
    cached = known.blocks - known.facts.adapted
    if schedule == "percentile":
        independent = percentiles(known.importance[:, :cached], independent_steps or len(independent))
    if block_ratio is None:
        kept = keep_counts(known.importance, ratio, multiple)
    else:
        kept = keep_counts_of_blocks(known.importance, block_ratio, ratio, multiple)
    whole = (known.tokens,) * known.blocks
    counts = tuple(whole if step in independent else row[:cached] + whole[cached:] for step, row in enumerate(kept))
    table = TokenTable(
        counts=counts,
        score=TokenScore(base="predicted", age_weight=0.0, share_guidance=guidance == "shared"),
        context=kv,
        origin=Origin(file=known.source, sites=known.facts.blocks, timesteps=known.facts.timesteps),
    )
    return Policy(
        name="tokencache",
        rules=(Rule(sites=("block",), do=table),),
        predictor=predictor if isinstance(predictor, Predictor) else str(predictor),
        predictor_cost=1.0 if known.facts.kind == "network" else 0.0,
        adapters=known.adapter_numbers,
    )


def round_robin(steps: int, intervals: tuple[int, int], switch: float) -> Steps:
    """Independent steps of the two-phase round-robin schedule.

    Args:
        steps: number of steps, T.
        intervals: prediction steps after each independent step in the early and in the late phase, K1 and K2.
        switch: the late phase begins at step floor(switch * T).
    """
    start = math.floor(switch * steps)
    early, late = intervals[0] + 1, intervals[1] + 1
    return tuple(
        step
        for step in range(steps)
        if step == 0 or (step % early == 0 if step < start else (step - start) % late == 0)
    )


def percentiles(importance: Tensor, count: int) -> Steps:
    """Independent steps at uniform percentiles of the importance accumulated over the run.

    Args:
        importance: [steps, blocks, tokens].
        count: their number, M; fewer if two fall together.
    """
    mean = importance.mean(dim=(1, 2)).double()
    before = (mean.cumsum(0) - mean) / mean.sum()
    chosen = {int((before >= m / count - 1e-12).nonzero()[0]) for m in range(count) if (before >= m / count).any()}
    return tuple(sorted({0, *chosen}))


def keep_counts(importance: Tensor, ratio: float, multiple: int = 1) -> tuple[tuple[int, ...], ...]:
    """Tokens to keep per step and block under one global cache ratio.

    The ``(1 - ratio) L N`` most important pairs of a step are kept, wherever they are; a block keeps as many tokens as
    it has pairs among them.

    Args:
        importance: [steps, blocks, tokens].
        ratio: share of pairs that are cached.
        multiple: counts are rounded to multiples of this.
    """
    steps, blocks, tokens = importance.shape
    wanted = round((1 - ratio) * blocks * tokens)
    order = importance.reshape(steps, -1).argsort(dim=1, descending=True, stable=True)
    marked = torch.zeros(steps, blocks * tokens).scatter(1, order[:, :wanted], 1.0)
    shares = marked.reshape(steps, blocks, tokens).sum(-1)
    return tuple(tuple(_rounded(float(share), tokens, multiple) for share in row) for row in shares)


def keep_counts_of_blocks(
    importance: Tensor, block_ratio: float, ratio: float, multiple: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Tokens to keep when whole blocks are selected first: the least important blocks cache, the others do not.

    Args:
        importance: [steps, blocks, tokens].
        block_ratio: share of blocks that cache.
        ratio: share of tokens that such a block caches.
        multiple: counts are rounded to multiples of this.
    """
    steps, blocks, tokens = importance.shape
    order = importance.mean(-1).argsort(dim=1, stable=True)
    caching = torch.zeros(steps, blocks).scatter(1, order[:, : math.floor(block_ratio * blocks)], 1.0)
    kept = _rounded(math.ceil((1 - ratio) * tokens - 1e-9), tokens, multiple)
    return tuple(tuple(kept if caches else tokens for caches in row) for row in caching.bool().tolist())


def _rounded(count: float, tokens: int, multiple: int) -> int:
    return min(tokens, max(0, round(count / multiple) * multiple))
