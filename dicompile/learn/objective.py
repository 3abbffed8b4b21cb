"""One teacher, one student, one loss: what a single iteration of Learning-to-Cache computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dicompile.learn.graph import Inputs, LearnableModel


@dataclass(frozen=True, slots=True)
class Objective:
    """``distance(teacher, student) + penalty * sum of scores``.

    Attributes:
        penalty: lambda; larger values cache more. On the scale of the distance, so one for "sum" is as many times
            larger as a sample has elements.
        reduce: of the squared error: "mean" over everything (DiT), or "sum" over a sample, then the mean (U-ViT).
        straight_through: threshold that the student's forward uses instead of the scores, which receive the gradient
            as if it had not; None blends softly, as the published routers were trained.
    """

    penalty: float = 1e-6
    reduce: Literal["mean", "sum"] = "mean"
    straight_through: float | None = None


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration computed; all but the teacher carry gradients to the logits.

    Attributes:
        teacher: output without cache.
        student: output with values blended in.
        data_loss: squared error between the two, scalar.
        scores: sigmoid of the logits, [sites].
        loss: what is minimised, scalar.
    """

    teacher: Tensor
    student: Tensor
    data_loss: Tensor
    scores: Tensor
    loss: Tensor


def training_iteration(
    model: LearnableModel, inputs: Inputs, stored: Sequence[Tensor], logits: Tensor, objective: Objective
) -> Iteration:
    """Compare the model without a cache to itself with stored values blended in.

    Args:
        model: the frozen model.
        inputs: of the cache step.
        stored: what the full step before it recorded, per site.
        logits: float32 [sites], of the cache step's row.
        objective: the loss.

    Reference:
        Ma et al., Learning-to-Cache, arXiv 2406.01733, equation 9.
    """
    scores = logits.sigmoid()
    gates = scores
    if objective.straight_through is not None:
        gates = scores + ((scores > objective.straight_through).to(scores.dtype) - scores).detach()
    teacher = model.predict(inputs)
    student = model.blend(inputs, stored, torch.stack([gates, 1 - gates], dim=1).unbind())
    squares = (teacher - student).square()
    data_loss = squares.mean() if objective.reduce == "mean" else squares.flatten(1).sum(1).mean()
    return Iteration(teacher, student, data_loss, scores, data_loss + objective.penalty * scores.sum())
