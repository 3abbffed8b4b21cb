"""How far samples are from a reference, from their labels, and from the distribution they should follow."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from dicompile.demo import shapes
from dicompile.errors import DicompileError

PICTURE_RANGE = 2.0
"""Pictures lie in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Fractions of samples, in [0, 1], that show what their label asks for."""

    every: float
    """Shape and colour and texture are right."""
    shape: float
    colour: float
    texture: float

    def __str__(self) -> str:
        return f"all {self.every:.4f}, shape {self.shape:.4f}, colour {self.colour:.4f}, texture {self.texture:.4f}"


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio over the whole batch.

    Args:
        pictures: in [-1, 1], [b, 3, h, w].
        reference: same shape and range.

    Returns:
        Decibels, ``10 log10(2^2 / mean squared error)``; infinite for equal pictures.
    """
    error = (pictures.double() - reference.double()).square().mean().item()
    return 10 * math.log10(PICTURE_RANGE**2 / error) if error > 0 else math.inf


def mean_psnr(pictures: Tensor, reference: Tensor) -> float:
    """Mean of the `psnr` of each picture in dB, which a few that became other ones do not decide; same arguments."""
    return statistics.mean(map(psnr, pictures, reference))


def relative_error(pictures: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of ``reference``, unitless; both [b, 3, h, w]."""
    pictures, reference = pictures.double(), reference.double()
    return float(torch.linalg.vector_norm(pictures - reference) / torch.linalg.vector_norm(reference))


def is_right(predicted: shapes.Attributes, labels: Tensor) -> Tensor:
    """Whether shape and colour and texture all match the class ``labels`` (int, [b]); bool, [b]."""
    matches = [found == wanted for found, wanted in zip(predicted, shapes.attributes_of(labels), strict=True)]
    return torch.stack(matches).all(0)


def accuracy(predicted: shapes.Attributes, labels: Tensor) -> Accuracy:
    """Fractions of right predictions, for all attributes together and for each.

    Args:
        predicted: attribute indices, each [b].
        labels: class labels, int, [b].
    """
    wanted = shapes.attributes_of(labels)
    each = [(found == target).double().mean().item() for found, target in zip(predicted, wanted, strict=True)]
    return Accuracy(is_right(predicted, labels).double().mean().item(), *each)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``; the trace of the root is the sum of the roots of the eigenvalues of
    ``C1 C2``, which are real and not negative because both factors are positive semi-definite. The estimate is biased
    upwards for few samples, so only distances at equal sample counts compare.

    Args:
        features: [n, d], n >= 2.
        reference: [m, d], m >= 2.

    Returns:
        Squared feature units, >= 0.

    Raises:
        DicompileError: not two matrices of the same width with at least two rows each.

    Reference:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        arXiv 1706.08500, equation 6.
    """
    for name, matrix in (("features", features), ("reference", reference)):
        if matrix.ndim != 2 or len(matrix) < 2 or matrix.shape[1] != reference.shape[-1]:
            raise DicompileError(
                "frechet_distance needs two matrices of equal width with at least two rows each",
                where=f"{name} {list(matrix.shape)}",
                why="a covariance needs two samples, and both Gaussians live in one feature space",
                fix="pass features [n, d] and reference [m, d], n and m at least 2",
            )
    features, reference = features.double(), reference.double()
    shift = (features.mean(0) - reference.mean(0)).square().sum()
    first, second = torch.cov(features.T), torch.cov(reference.T)
    first, second = first.reshape(features.shape[1], -1), second.reshape(features.shape[1], -1)  # cov of d = 1 is 0-d
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * roots))
