"""ClusCa: between full steps, everything is forecast, and a few tokens of every MLP are computed to correct that."""

from __future__ import annotations

from dicompile.plan import Cadence, Forecast, Policy, Propagate, Rule


def ClusCa(
    interval: int = 4,
    order: int = 4,
    clusters: int = 16,
    share: float = 0.005,
    warmup: int = 2,
    rounds: int = 100,
    seed: int = 0,
) -> Policy:
    """Forecast as `TaylorSeer` does, and compute one token of every cluster of alike ones in the MLPs.

    Clusters are of the stream behind the last MLP of a kind at full steps, by k-means with L1 distances, and start from
    those before. At other steps one random token of every cluster is computed in every MLP, and becomes the zeroth
    order of its own Taylor series; that of another token of the cluster moves `share` of the way to it. Higher orders
    are added to that, also for the computed tokens. What has become of the zeroth order is what later steps, and the
    differences at the next full step, start from.

    So the published code has it, and its defaults for DiT are these; for FLUX it has ``interval=5, order=1, warmup=3``.
    As there, clusters of text and picture are apart, text moves no other tokens, and single-stream blocks are forecast
    alone. Two things differ. Of a cluster without tokens the code computes token 0 and adds it once more to what the
    cluster of token 0 follows; here it is left out. And the code goes on with k-means until all samples of a batch have
    settled; here each stops by itself, so that no picture depends on others.

    Args:
        interval: steps from one full step to the next.
        order: highest derivative; it builds up, one order per full step.
        clusters: how many, K, per sample and stream; so many tokens are computed. 16 as published.
        share: gamma, of the way that other tokens of a cluster move, unitless.
        warmup: full steps at the start.
        rounds: most rounds of k-means.
        seed: of the tokens from which the first clusters start, and of those that are computed.

    Reference:
        Zheng et al., Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven
        Feature Caching, arXiv 2509.10312; the rule is that of its code (Cache4Diffusion, dit/clusca-dit/models.py,
        `DiTBlock.forward` and `propagation_update_cache`, and flux/clusca-flux for streams of text).
    """
    forecast = Forecast(order=order)
    propagate = Propagate(clusters=clusters, share=share, rounds=rounds, otherwise=forecast)
    return Policy(
        name=f"clusca-{interval}-{order}",
        cadence=Cadence(interval=interval, anchor="last", warmup=warmup),
        rules=(Rule(sites=("mlp",), do=propagate), Rule(do=forecast)),
        seed=seed,
    )
