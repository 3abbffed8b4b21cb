"""FreqCa: of the last hidden state, low frequencies are reused, and high ones are forecast."""

from __future__ import annotations

from typing import Literal

from dicompile.plan import Bands, Cadence, Policy, Rule


def FreqCa(
    interval: int = 6,
    basis: Literal["dct", "fft"] = "dct",
    cutoff: float = 0.1,
    grid: tuple[int, int] | None = None,
    order: int = 2,
    scale: float = 0.71,
    warmup: int = 3,
) -> Policy:
    """Between full steps no block runs: the stream after the last one is made of what full steps stored.

    Its low frequencies over the tokens hardly change from step to step, but jump where they do; the high ones move on
    smoothly. order + 1 tensors are remembered.

    Args:
        interval: steps from one full step to the next; published are 6 and 9 of 50.
        basis: "dct", over the rows and columns of the picture, is published for FLUX.1; "fft", over its tokens in their
            order, for Qwen-Image.
        cutoff: highest of the low frequencies, as a share of the highest that there is.
        grid: rows and columns of the picture's tokens, for "dct" where the latent's shape does not tell them: for
            FLUX.1 a sixteenth of height and width in pixels.
        order: highest derivative of the forecast of the high ones, by Hermite polynomials as in `HiCache`.
        scale: of those.
        warmup: full steps at the start. All but the last two of them are left out of the differences.

    Reference:
        Liu et al., FreqCa: Accelerating Diffusion Models via Frequency-Aware Caching, arXiv 2510.08669, and its code.
    """
    bands = Bands(basis=basis, cutoff=cutoff, grid=grid, order=order, hermite=scale, since=max(warmup - 2, 0))
    return Policy(
        name=f"freqca-{interval}-{basis}",
        cadence=Cadence(interval=interval, anchor="last", warmup=warmup),
        rules=(Rule(sites=("stack",), do=bands),),
    )
