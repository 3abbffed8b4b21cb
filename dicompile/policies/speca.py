"""SpeCa: forecast until the last block, computed beside its forecast, tells that they are too far off."""

from __future__ import annotations

from dicompile.plan import Cadence, Forecast, Gate, Policy, Rule


def SpeCa(
    threshold: float = 0.3,
    decay: float = 0.05,
    shortest: int = 3,
    longest: int = 8,
    order: int = 4,
    full: tuple[int, ...] = (0, 2),
) -> Policy:
    """Forecast the output of every branch as `TaylorSeer` does, and verify the stream behind the last block.

    Decided while sampling, once a step, before anything runs, with one wait for the device where something was
    verified. A forecast is verified by computing the last block on what enters it, beside its forecast; what is found
    decides about the next step, and what was computed is thrown away. So it is in the authors' code for DiT, which this
    follows; the paper takes a rejected step back. As there, one step at least is forecast after every full one, in the
    warmup, too.

    Args:
        threshold: mean over all numbers of the stream of the relative error from which the next step is full, unitless.
            The authors' code for HunyuanVideo has 1; the default here is not a published one.
        decay: what the threshold is multiplied by over the run, unitless; 0.1 for HunyuanVideo. It does not fall below
            0.01.
        shortest: forecast steps after a full one before one is verified; published are 2 and 3 for DiT, 4 for
            HunyuanVideo.
        longest: most steps in a row that are forecast; published are 5 and 8 for DiT, 12 for HunyuanVideo.
        order: highest derivative; it builds up, one order per full step. 1 for HunyuanVideo.
        full: numbers of the steps that are full in any case, counted from 0.

    Reference:
        Liu et al., SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching, arXiv 2509.11628, and
        its code.
    """
    gate = Gate(
        probe="forecast", threshold=threshold, decay=decay, floor=0.01, shortest=max(shortest, 1), longest=longest
    )
    return Policy(
        name=f"speca-{threshold:g}-{longest}",
        cadence=Cadence(at=full, gate=gate),
        rules=(Rule(do=Forecast(order=order)),),
    )
