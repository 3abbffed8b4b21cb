"""DiCache: the first blocks tell when the others have to run, and how far to go on from what those added before."""

from __future__ import annotations

from dicompile.plan import Aligned, Cadence, Gate, Policy, Rule


def DiCache(depth: int = 1, threshold: float = 0.4, warmup: int = 7) -> Policy:
    """Run the first blocks; until their output has drifted, go on from the last two full steps as far as they have.

    Decided while sampling, once a call, with one wait for the device. What all blocks together add is recalled, on top
    of the embedding of the current latent; the work of the first blocks goes on where a step turns out to be full, and
    is thrown away where it does not. First and last steps are full.

    Args:
        depth: number of the first blocks; 1 to 5 are recommended.
        threshold: relative L1 distance of the stream behind them from step to step, added up since the last full step,
            unitless; published for FLUX is 0.4.
        warmup: full steps at the start; published for FLUX are 7 of 30.

    Reference:
        Bu et al., DiCache: Let Diffusion Model Determine Its Own Cache, arXiv 2508.17356, section 3, and its code.
    """
    gate = Gate(
        probe="stream", depth=depth, reference="previous", threshold=threshold, accumulates=True, last=1
    )  # fmt: skip
    return Policy(
        name=f"dicache-{depth}-{threshold:g}",
        cadence=Cadence(warmup=warmup, gate=gate),
        rules=(Rule(sites=("stack",), do=Aligned()),),
    )
