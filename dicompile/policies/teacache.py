"""TeaCache: the modulated input of the first block tells, through a polynomial, how far the output has drifted."""

from __future__ import annotations

from collections.abc import Sequence

from dicompile.errors import InvalidPolicy
from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule

POLYNOMIALS = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "ltx": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
}
"""Published fits of the drift of the output to that of the modulated input, the highest power first."""


def TeaCache(model: str | Sequence[float] = "flux", threshold: float = 0.4) -> Policy:
    """Add what all blocks together added at the last full step, until drift of their input has added up.

    Decided while sampling, once a call, with one wait for the device. First and last step are full.

    Args:
        model: whose polynomial rescales the drift from step to step: "flux", "hunyuan-video", "mochi", "ltx"; or its
            coefficients, the highest power first: (1, 0) leaves the drift as it is.
        threshold: of the sum since the last full step, unitless. Published for FLUX: 0.25 (1.5x), 0.4 (1.8x), 0.6
            (2.0x), 0.8 (2.25x).

    Raises:
        InvalidPolicy: no polynomial of this name was published.

    Reference:
        Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108, section 3.
    """
    if isinstance(model, str) and model not in POLYNOMIALS:
        raise InvalidPolicy(
            f"no polynomial of {model!r} is known",
            where="TeaCache",
            why="it is fitted to the runs of one model",
            fix=f"use one of: {', '.join(POLYNOMIALS)}; or give coefficients, (1, 0) for the plain drift",
        )
    rescale = POLYNOMIALS[model] if isinstance(model, str) else tuple(model)
    gate = Gate(
        probe="modulated", reference="previous", threshold=threshold, rescale=rescale, accumulates=True, last=1
    )  # fmt: skip
    return Policy(
        name=f"teacache-{threshold:g}",
        cadence=Cadence(gate=gate),
        rules=(Rule(sites=("stack",), do=Reuse(what="update")),),
    )
