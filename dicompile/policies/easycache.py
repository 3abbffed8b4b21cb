"""EasyCache: what the whole model adds to its latent is reused, until the latent has moved too far."""

from __future__ import annotations

from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule


def EasyCache(threshold: float = 0.05, warmup: int = 10) -> Policy:
    """Add to the latent what the model added to it at the last full step; nothing of the model runs.

    Decided while sampling, once a step, before anything runs. How far the output will have moved is told by how far the
    latent has, times the rate at which it moved with it between the last two full steps; steps add up. No calibration.
    Guidance partners follow the first of them, as in the reference code. The last step is full. Four latents are
    remembered for each context.

    Args:
        threshold: relative L1 distance from which a step is full, added up since the last full one, unitless. The
            authors' code for HunyuanVideo has 0.025; 0.05 is what ports to Wan 2.1 begin with.
        warmup: full steps at the start; 5 and 10 in these.

    Reference:
        Zhou et al., Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching,
        arXiv 2507.02860, section 3, and its code.
    """
    gate = Gate(
        probe="latent",
        reference="previous",
        relative_to="output",
        partners="first",
        threshold=threshold,
        accumulates=True,
        last=1,
    )
    return Policy(
        name=f"easycache-{threshold:g}",
        cadence=Cadence(warmup=warmup, gate=gate),
        rules=(Rule(sites=("model",), do=Reuse(what="update")),),
    )
