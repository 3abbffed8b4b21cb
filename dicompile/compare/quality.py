"""How near pictures are to a reference, by the measures that are usual, from the libraries that are."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from dicompile.compare.results import Quality

SMALLEST = 11
"""Edge of the window of SSIM; smaller pictures have none."""


def quality_of(pictures: Tensor, reference: Tensor) -> Quality:
    """Compare pictures with those of the same noise.

    Args:
        pictures: float32 in [0, 1], [n, 3, h, w].
        reference: the same.

    Reference:
        SSIM with a Gaussian window: Wang et al., IEEE TIP 13(4), 2004. FLIP: Andersson et al., HPG 2020.
    """
    found, wanted = (np.moveaxis(each.double().numpy(), 1, -1) for each in (pictures, reference))
    pairs = list(zip(found, wanted, strict=True))
    apart = [pair for pair in pairs if not np.array_equal(*pair)]
    psnr = [peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in apart]
    ssim = [_ssim(a, b) for a, b in pairs]
    flip = [_flip(a, b) for a, b in pairs] if has_flip() else []
    error = float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30)
    return Quality(
        psnr=float(np.mean(psnr)) if psnr else None,
        ssim=float(np.mean(ssim)),
        error=error,
        flip=float(np.mean(flip)) if flip else None,
    )


def _ssim(picture: Any, reference: Any) -> float:
    if min(reference.shape[:2]) < SMALLEST:
        return math.nan if not np.array_equal(picture, reference) else 1.0
    return float(structural_similarity(
        picture, reference, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    ))  # fmt: skip


@functools.cache
def has_flip() -> bool:
    """True if the package of FLIP (flip-evaluator) is installed."""
    return importlib.util.find_spec("flip_evaluator") is not None


def _flip(picture: Any, reference: Any) -> float:
    import flip_evaluator

    _, mean, _ = flip_evaluator.evaluate(reference.astype(np.float32), picture.astype(np.float32), "LDR")
    return float(mean)
