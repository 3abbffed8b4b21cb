"""FasterCache's attention: late in the run every other step goes on as attention changed between the steps before."""

from __future__ import annotations

from dicompile.plan import Cadence, Policy, Rule, Trend, WhatName


def FasterCache(
    interval: int = 2, timesteps: tuple[float, float] = (-1, 681), weight: float = 0.5, growth: float = 0.0
) -> Policy:
    """Compute attention at every other step, and take ``h1 + w (h1 - h2)`` of the last two computed ones in between.

    Attention within a frame and along time count alike, and joint attention does, too; that to the text and MLPs are
    computed. Beside an MLP in one branch (the second half of FLUX), the output of attention itself is stored.

    This is dynamic feature reuse, one half of the method. The other one, CFG-Cache, is `GuidanceReuse`.

    Args:
        interval: steps from one computed step to the next.
        timesteps: attention is reused between these, as the scheduler counts them.
        weight: w at step 0, unitless.
        growth: what w grows by with every step: the paper has w grow from 0 to 1 over the run, which is ``weight=0``
            and ``growth=1 / steps``.

    Reference:
        Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355,
        section on dynamic feature reuse; interval, timesteps and weight are those of diffusers.
    """

    def go_on(what: WhatName) -> Trend:
        return Trend(weight=weight, growth=growth, what=what)

    return Policy(
        name=f"fastercache-{interval}",
        cadence=Cadence(interval=interval, counting="up", timesteps=timesteps),
        rules=(
            Rule(sites=("self-attention", "joint-attention"), do=go_on("core")),
            Rule(sites=("parallel",), do=go_on("attention")),
        ),
    )
