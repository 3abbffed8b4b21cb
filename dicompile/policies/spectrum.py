"""Spectrum: the last hidden state is fitted over the whole run, at full steps that become rarer."""

from __future__ import annotations

from dicompile.plan import Cadence, Policy, Rule, Spectral


def Spectrum(
    interval: int = 2,
    growth: float = 0.75,
    degree: int = 4,
    ridge: float = 0.1,
    share: float = 1.0,
    warmup: int = 5,
    span: int = 50,
) -> Policy:
    """Forecast the stream after the last block from all full steps so far, by a ridge regression on polynomials.

    No block runs between full steps. One tensor is remembered for every full step.

    Args:
        interval: steps from one full step to the next, right after the warmup.
        growth: by how much the interval grows with every full step; rounded down, 0.75 is published for FLUX.
        degree: of the highest polynomial.
        ridge: strength of the regularisation.
        share: of the fit; the rest is the straight line through the last two full steps. The paper has 1, the authors
            recommend 0.5 to 1 since.
        warmup: full steps at the start.
        span: steps that the polynomials are for, 50 in the reference code however many there are.

    Reference:
        Han et al., Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration, arXiv 2603.01623, and
        its code.
    """
    return Policy(
        name=f"spectrum-{interval}-{growth:g}",
        cadence=Cadence(interval=interval, growth=growth, anchor="last", warmup=warmup),
        rules=(Rule(sites=("stack",), do=Spectral(degree=degree, ridge=ridge, share=share, span=span)),),
    )
