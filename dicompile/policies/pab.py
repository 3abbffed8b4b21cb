"""PAB: attention is reused for longer the less it changes, in the middle of the schedule."""

from __future__ import annotations

from typing import Literal

from dicompile.plan import Cadence, Policy, Reuse, Rule


def PAB(
    self_attention: int = 2,
    cross_attention: int = 6,
    timesteps: tuple[float, float] = (100, 850),
    what: Literal["update", "core"] = "update",
) -> Policy:
    """Pyramid Attention Broadcast: every kind of attention is reused with a period of its own, MLPs are computed.

    Attention within a frame and along time count as self-attention alike, and joint attention does, too. The published
    table of MLPs that are reused at single timesteps is left out. Beside an MLP in one branch (the second half of
    FLUX), the output of attention itself is stored.

    Args:
        self_attention: steps from one computed step to the next; published are 2 within frames, 2 to 4 along time.
        cross_attention: the same for attention to the text; published is 6, Latte 6 too.
        timesteps: attention is reused between these, as the scheduler counts them; published are (100, 850) for
            CogVideoX and Open-Sora-Plan, (100, 800) for Latte, (450, 930) for Open-Sora.
        what: "update" stores what the gate let through, as published; "core" gates it anew, as diffusers does.

    Reference:
        Zhao et al., Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588, section 3.
    """

    def every(interval: int) -> Cadence:
        return Cadence(interval=interval, counting="up", timesteps=timesteps)

    own, text = every(self_attention), every(cross_attention)
    return Policy(
        name=f"pab-{self_attention}-{cross_attention}",
        rules=(
            Rule(sites=("self-attention", "joint-attention"), cadence=own, do=Reuse(what=what)),
            Rule(sites=("parallel",), cadence=own, do=Reuse(what="attention")),
            Rule(sites=("cross-attention",), cadence=text, do=Reuse(what=what)),
        ),
    )
