"""ToCa: between full steps, self-attention is reused and the MLP runs on the tokens that need it most."""

from __future__ import annotations

from typing import Literal, TypedDict

from dicompile.errors import InvalidPolicy
from dicompile.plan import Cadence, Line, Policy, Refresh, Reuse, Rule, TokenScore, Window

ScoreName = Literal[
    "attention", "entropy", "value-norm", "large-value-norm", "key-norm", "similarity", "norm", "random"
]
STEP_AND_DEPTH = {
    "ddim50": (Line(start=3.0, slope=-4.0), Line(start=0.8, slope=0.4)),
    "ddpm250": (Line(start=1.4, slope=-0.8), Line(start=1.8, slope=-1.6)),
}
"""Factors of the refresh ratio by step and by depth, of the two published DiT settings."""


class ToCaOptions(TypedDict, total=False):
    """Options of `ToCa` that a setting built on it takes over."""

    age_weight: float
    grid_cell: int
    decide: Literal["step", "block"]
    depth_denominator: int | None
    seed: int


def ToCa(
    interval: int = 3,
    ratio: float = 0.07,
    schedule: Literal["ddim50", "ddpm250"] = "ddim50",
    score: ScoreName = "attention",
    age_weight: float = 0.25,
    grid_cell: int = 2,
    grid_bonus: float = 0.6,
    decide: Literal["step", "block"] = "step",
    depth_denominator: int | None = None,
    seed: int = 0,
) -> Policy:
    """Token-wise feature caching for class-conditional DiT.

    Args:
        interval: base number of steps from one full step to the next, K; it is stretched to K/0.6 at the start and
            shrunk to K/1.4 at the end, and is 2 between 20 % and 40 % of the index.
        ratio: base share of MLP tokens refreshed on the steps between, R (the paper's R is 1 - ratio).
        schedule: how R varies. "ddim50": step factor 3 - 4 s/S, depth factor 0.8 + 0.4 d; "ddpm250": 1.4 - 0.8 s/S and
            1.8 - 1.6 d; both times 2.5 for MLPs, 0 for attention.
        score: token score: attention received (s1), or any other.
        age_weight: weight of s3, per reuse step and interval.
        grid_cell: edge of the cells of s4, in tokens; 0 for none.
        grid_bonus: s4, multiple of the cell's best score.
        decide: "block" repeats the reference code's quirk of deciding again in every block.
        depth_denominator: 27 repeats the reference code on models of another depth.
        seed: of the random score.

    Reference:
        Zou et al., Accelerating Diffusion Transformers with Token-wise Feature Caching, arXiv 2410.05317, section 3,
        and its published DiT settings.
    """
    if schedule not in STEP_AND_DEPTH:
        raise InvalidPolicy(f"option 'schedule' cannot be {schedule!r}", where="ToCa", fix="'ddim50' or 'ddpm250'")
    by_step, by_depth = STEP_AND_DEPTH[schedule]
    refresh = Refresh(
        ratio=ratio,
        factor=2.5,
        by_step=by_step,
        by_depth=by_depth,
        depth_denominator=depth_denominator,
        score=TokenScore(base=score, age_weight=age_weight, grid_cell=grid_cell, grid_bonus=grid_bonus),
    )
    cadence = Cadence(
        interval=interval,
        stretch=0.4 if ratio else 0.0,
        dense=Window(start=0.2, end=0.4, interval=2) if ratio else None,
        decide=decide,
    )
    rules = (Rule(sites=("mlp",), do=refresh), Rule(do=Reuse()))
    return Policy(name=f"toca-{interval}", cadence=cadence, rules=rules, seed=seed)


class ToCaPixArtOptions(TypedDict, total=False):
    """Options of `ToCaPixArt` that a setting built on it takes over."""

    age_weight: float
    grid_cell: int
    grid_bonus: float
    depth_denominator: int | None
    share_guidance: bool
    seed: int


def ToCaPixArt(
    interval: int = 3,
    ratio: float = 0.3,
    score: ScoreName = "entropy",
    age_weight: float = 0.25,
    grid_cell: int = 4,
    grid_bonus: float = 0.4,
    decide: Literal["step", "block"] = "step",
    depth_denominator: int | None = None,
    share_guidance: bool = True,
    seed: int = 0,
) -> Policy:
    """Token-wise feature caching for text-conditional DiT with cross-attention (PixArt).

    Cross-attention and MLP each refresh their own tokens; self-attention is reused.

    Args:
        interval: base number of steps from one full step to the next, K, growing from K/0.8 to K/1.2 over the run.
        ratio: base share of tokens, R; times 1.9 - 1.8 s/S, times 1.6 - 1.2 d, times 0.6 (cross-attention) or 1.6
            (MLP).
        score: token score: entropy of the cross-attention map (s2), attention received, value norm, or random.
        age_weight: weight of s3, per reuse step and interval.
        grid_cell: edge of the cells of s4, in tokens; 0 for none.
        grid_bonus: s4, multiple of the cell's best score.
        decide: "block" repeats the reference code's quirk of deciding again in every block.
        depth_denominator: 27 repeats the reference code on models of another depth.
        share_guidance: both guidance halves refresh the same tokens; needs the two halves in one batch.
        seed: of the random score.

    Reference:
        Zou et al., arXiv 2410.05317, section 3, and its published PixArt-alpha settings.
    """

    def refresh(factor: float) -> Refresh:
        return Refresh(
            ratio=ratio,
            factor=factor,
            by_step=Line(start=1.9, slope=-1.8),
            by_depth=Line(start=1.6, slope=-1.2),
            depth_denominator=depth_denominator,
            score=TokenScore(
                base=score,
                age_weight=age_weight,
                grid_cell=grid_cell,
                grid_bonus=grid_bonus,
                share_guidance=share_guidance,
            ),
        )

    return Policy(
        name=f"toca-pixart-{interval}",
        cadence=Cadence(interval=interval, counting="up", stretch=-0.2, decide=decide),
        rules=(
            Rule(sites=("cross-attention",), do=refresh(0.6)),
            Rule(sites=("mlp",), do=refresh(1.6)),
            Rule(do=Reuse()),
        ),
        seed=seed,
    )


class ToCaOpenSoraOptions(TypedDict, total=False):
    """Options of `ToCaOpenSora` that a setting built on it takes over."""

    age_weight: float
    seed: int


def ToCaOpenSora(
    interval: int = 3,
    ratio: float = 0.1,
    score: ScoreName = "entropy",
    age_weight: float = 0.25,
    grid_cell: int = 0,
    grid_bonus: float = 0.3,
    share_guidance: bool = True,
    seed: int = 0,
) -> Policy:
    """Token-wise feature caching for spatial-temporal DiT (Open-Sora 1.2).

    Attention and MLP have one cycle, cross-attention one of twice the length; the first three steps are full. Between,
    attention is reused and 1.495 R of the MLP's tokens are refreshed.

    Args:
        interval: steps from one full self-attention and MLP to the next, K; cross-attention takes twice as many.
        ratio: base share of MLP tokens, R.
        score: token score: entropy of the cross-attention map (s2), or any other.
        age_weight: weight of s3, per reuse step and interval.
        grid_cell: edge of the space-time cells of s4, in tokens; 0 for none, as in the published code.
        grid_bonus: s4, multiple of the cell's best score.
        share_guidance: both guidance halves refresh the same tokens; needs the two halves in one batch.
        seed: of the random score.

    Reference:
        Zou et al., arXiv 2410.05317, section 4, and its published Open-Sora settings.
    """
    refresh = Refresh(
        ratio=ratio,
        factor=1.495,
        score=TokenScore(
            base=score,
            age_weight=age_weight,
            grid_cell=grid_cell,
            grid_bonus=grid_bonus,
            share_guidance=share_guidance,
        ),
    )
    cadence = Cadence(interval=interval, counting="up", warmup=3)
    rare = Cadence(interval=2 * interval, counting="up", warmup=3)
    return Policy(
        name=f"toca-opensora-{interval}",
        cadence=cadence,
        rules=(
            Rule(sites=("cross-attention",), cadence=rare, do=Reuse()),
            Rule(sites=("mlp",), do=refresh),
            Rule(do=Reuse()),
        ),
        seed=seed,
    )


class ToCaFluxOptions(TypedDict, total=False):
    """Options of `ToCaFlux` that a setting built on it takes over."""

    age_weight: float
    depth_denominator: int | None
    seed: int


def ToCaFlux(
    interval: int = 4,
    ratio: float = 0.1,
    score: ScoreName = "attention",
    age_weight: float = 0.25,
    depth_denominator: int | None = None,
    seed: int = 0,
) -> Policy:
    """Token-wise feature caching for models of joint attention (FLUX): streams of text and image, then both as one.

    Double-stream blocks keep the output of their joint attention and project it anew at every step; text and image MLP
    refresh tokens of their own. Single-stream blocks refresh tokens of the joined sequence, with stored attention.

    Args:
        interval: steps from one full step to the next, K, after three full ones.
        ratio: base share of tokens, R; times 1.5 - d, times 0.4 (double-stream) or 1.6 (single-stream).
        score: token score: attention received (s1), norms of keys or values (large first), or any other.
        age_weight: weight of s3, per reuse step and interval.
        depth_denominator: 27 repeats the reference code, whatever the number of blocks.
        seed: of the random score.

    Reference:
        Zou et al., arXiv 2410.05317, and its published FLUX.1 settings.
    """

    def refresh(factor: float) -> Refresh:
        return Refresh(
            ratio=ratio,
            factor=factor,
            by_depth=Line(start=1.5, slope=-1.0),
            depth_denominator=depth_denominator,
            score=TokenScore(base=score, age_weight=age_weight),
        )

    return Policy(
        name=f"toca-flux-{interval}",
        cadence=Cadence(interval=interval, counting="up", anchor="last", warmup=3 if ratio else 1),
        rules=(
            Rule(sites=("joint-attention",), do=Reuse(what="attention")),
            Rule(sites=("mlp",), do=refresh(0.4)),
            Rule(sites=("parallel",), do=refresh(1.6)),
            Rule(do=Reuse()),
        ),
        seed=seed,
    )
