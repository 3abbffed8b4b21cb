"""DuCa: ToCa's partial steps take turns with aggressive ones, at which no block runs at all.

Every setting is one of ToCa's with defaults of its own; options that it does not name are those of ToCa.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import Unpack

from dicompile.plan import Policy, Reuse, Rule
from dicompile.policies.toca import (
    ScoreName,
    ToCa,
    ToCaFlux,
    ToCaFluxOptions,
    ToCaOpenSora,
    ToCaOpenSoraOptions,
    ToCaOptions,
    ToCaPixArt,
    ToCaPixArtOptions,
)

Aggressive = Literal["stream", "update"]


def DuCa(
    interval: int = 3,
    ratio: float = 0.05,
    score: ScoreName = "attention",
    aggressive: Aggressive = "stream",
    *,
    grid_bonus: float = 0.8,
    **options: Unpack[ToCaOptions],
) -> Policy:
    """Dual feature caching for class-conditional DiT.

    A step that is not full is conservative (a ToCa step) if its index is odd within the interval, aggressive otherwise.

    Args:
        interval: base number of steps from one full step to the next, K; see `ToCa`.
        ratio: base share of MLP tokens refreshed at conservative steps, R.
        score: "attention" as in the DiT experiments; "value-norm" is V-caching, "random" the authors' later advice;
            with either, no attention map exists anywhere.
        aggressive: what an aggressive step reuses: "stream", the last hidden state, as published, or "update", what all
            blocks added to the stream, on top of the embedding of the current latent.
        grid_bonus: s4, multiple of the cell's best score.
        **options: of the conservative steps; see `ToCa`.

    Reference:
        Zou et al., Accelerating Diffusion Transformers with Dual Feature Caching, arXiv 2412.18911, section 3, and its
        published DiT settings; random selection: version 2, Rethinking Token-wise Feature Caching.
    """
    conservative = ToCa(interval=interval, ratio=ratio, score=score, grid_bonus=grid_bonus, **options)
    return _with_aggressive_steps(conservative, f"duca-{interval}", aggressive)


def DuCaPixArt(
    interval: int = 3,
    ratio: float = 0.75,
    score: ScoreName = "entropy",
    aggressive: Aggressive = "stream",
    **options: Unpack[ToCaPixArtOptions],
) -> Policy:
    """Dual feature caching for text-conditional DiT with cross-attention (PixArt).

    Args:
        interval: steps from one full step to the next, K; it does not change over the run.
        ratio: base share of tokens at conservative steps, R; see `ToCaPixArt`.
        score: see `DuCa`; "entropy" as in the PixArt experiments.
        aggressive: what an aggressive step reuses; see `DuCa`.
        **options: of the conservative steps; see `ToCaPixArt`.

    Reference:
        Zou et al., arXiv 2412.18911, section 4, and its published PixArt-alpha settings.
    """
    conservative = ToCaPixArt(interval=interval, ratio=ratio, score=score, **options)
    steady = conservative.model_copy(update={"cadence": conservative.cadence.model_copy(update={"stretch": 0.0})})
    return _with_aggressive_steps(steady, f"duca-pixart-{interval}", aggressive)


def DuCaOpenSora(
    interval: int = 3,
    ratio: float = 0.1,
    score: ScoreName = "value-norm",
    aggressive: Aggressive = "stream",
    *,
    share_guidance: bool = False,
    **options: Unpack[ToCaOpenSoraOptions],
) -> Policy:
    """Dual feature caching for spatial-temporal DiT (Open-Sora 1.2): full, conservative, aggressive, and again.

    Args:
        interval: steps from one full self-attention and MLP to the next, K; see `ToCaOpenSora`.
        ratio: base share of MLP tokens at conservative steps, R.
        score: see `DuCa`; V-caching as published.
        aggressive: what an aggressive step reuses; see `DuCa`.
        share_guidance: both guidance halves refresh the same tokens; needs the two halves in one batch.
        **options: of the conservative steps; see `ToCaOpenSora`.

    Reference:
        Zou et al., arXiv 2412.18911, section 4, and its published Open-Sora settings.
    """
    conservative = ToCaOpenSora(interval=interval, ratio=ratio, score=score, share_guidance=share_guidance, **options)
    return _with_aggressive_steps(conservative, f"duca-opensora-{interval}", aggressive)


def DuCaFlux(
    interval: int = 5,
    ratio: float = 0.1,
    score: ScoreName = "value-norm",
    aggressive: Aggressive = "update",
    **options: Unpack[ToCaFluxOptions],
) -> Policy:
    """Dual feature caching for models of joint attention (FLUX), for which no code was published.

    Args:
        interval: steps from one full step to the next, K, after three full ones.
        ratio: base share of tokens at conservative steps, R; see `ToCaFlux`.
        score: see `DuCa`.
        aggressive: what an aggressive step reuses; see `DuCa`.
        **options: of the conservative steps; see `ToCaFlux`.

    Reference:
        Zou et al., arXiv 2412.18911; figures on FLUX.1: HyCa (ICLR 2026).
    """
    conservative = ToCaFlux(interval=interval, ratio=ratio, score=score, **options)
    return _with_aggressive_steps(conservative, f"duca-flux-{interval}", aggressive)


def _with_aggressive_steps(conservative: Policy, name: str, aggressive: Aggressive) -> Policy:
    skip = Rule(sites=("stack",), when="even", do=Reuse(what=aggressive))
    return conservative.model_copy(update={"name": name, "rules": (skip, *conservative.rules)})
