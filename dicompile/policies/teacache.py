"""TeaCache: the timestep's part in the first block's input tells, through a polynomial, how the output has drifted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dicompile.errors import InvalidPolicy
from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule


class Fit(NamedTuple):
    """A published fit of the drift of the output to that of a value early in the model.

    Attributes:
        rescale: coefficients, the highest power first.
        probe: the value; see `dicompile.Gate`.
        warmup: full steps at the start.
        last: full steps at the end.
    """

    rescale: tuple[float, ...]
    probe: Literal["modulated", "modulation", "embedding"] = "modulated"
    warmup: int = 1
    last: int = 1


def _embedding(*rescale: float) -> Fit:
    return Fit(rescale, "embedding")


def _modulation(*rescale: float) -> Fit:
    return Fit(rescale, "modulation", 5, 0)


FITS = {
    "flux": Fit((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
    "hunyuan-video": Fit((733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)),
    "mochi": Fit((-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719)),
    "ltx": Fit((21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)),
    "cogvideox-2b": _embedding(-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": _embedding(-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox1.5-5b": _embedding(250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": _embedding(122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "wan2.1-t2v-1.3b": _embedding(2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": _embedding(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": _embedding(-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-720p": _embedding(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "wan2.1-t2v-1.3b-ret": _modulation(-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1-t2v-14b-ret": _modulation(-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "wan2.1-i2v-480p-ret": _modulation(257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    "wan2.1-i2v-720p-ret": _modulation(8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
}
"""By model, as in the code of the authors; "-ret" is what they call ``use_ret_steps``."""


def TeaCache(model: str | Sequence[float] = "flux", threshold: float = 0.4) -> Policy:
    """Add what all blocks together added at the last full step, until drift early in the model has added up.

    Decided while sampling, once a call, with one wait for the device. First and last step are full.

    Args:
        model: whose fit rescales the drift from step to step. By the modulated input of the first block: "flux",
            "hunyuan-video", "mochi", "ltx". By the embedding of the timestep, so that no picture decides differently:
            "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v", "wan2.1-t2v-1.3b",
            "wan2.1-t2v-14b", "wan2.1-i2v-480p", "wan2.1-i2v-720p"; the last four with "-ret" by the modulation, with
            five full steps at the start and none at the end. Or coefficients for the modulated input, the highest power
            first: (1, 0) leaves the drift as it is.
        threshold: of the sum since the last full step, unitless. Published for FLUX: 0.25 (1.5x), 0.4 (1.8x), 0.6
            (2.0x), 0.8 (2.25x); for CogVideoX 1.5: 0.1 (1.3x), 0.2 (1.8x), 0.3 (2.1x); for Wan 2.1: 0.05 to 0.08
            (1.3B), 0.14 to 0.2 (14B).

    Raises:
        InvalidPolicy: no fit of this name was published.

    Reference:
        Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108, section 3.
    """
    if isinstance(model, str) and model not in FITS:
        raise InvalidPolicy(
            f"no polynomial of {model!r} is known",
            where="TeaCache",
            why="it is fitted to the runs of one model",
            fix=f"use one of: {', '.join(FITS)}; or give coefficients, (1, 0) for the plain drift",
        )
    fit = FITS[model] if isinstance(model, str) else Fit(tuple(model))
    gate = Gate(
        probe=fit.probe,
        reference="previous",
        threshold=threshold,
        rescale=fit.rescale,
        accumulates=True,
        last=fit.last,
    )
    return Policy(
        name=f"teacache-{threshold:g}",
        cadence=Cadence(warmup=fit.warmup, gate=gate),
        rules=(Rule(sites=("stack",), do=Reuse(what="update")),),
    )
