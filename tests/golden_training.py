"""One recorded training iteration of Learning-to-Cache -> student, loss and gradient of the logits.

What a recorded batch calls its tensors is read from the names: a word says what a tensor is, another to which of the
two steps it belongs, ``full.hidden_states``, ``t_cache``, ``logits``. Tensors of neither step belong to both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.errors import InvalidTrainingData
from dicompile.learn.graph import LearnableModel, learnable
from dicompile.learn.objective import Objective, training_iteration

Batch = dict[str, Tensor]
Words = frozenset[str]

FULL = frozenset({"full", "f", "prev", "previous", "record", "first"})
CACHE = frozenset({"cache", "cached", "c", "student", "next", "current", "second"})
LOGITS = frozenset({"logits", "logit", "router", "prob", "w", "row"})
INDEX = frozenset({"index", "row", "step", "i", "k"})
PENALTY = frozenset({"lambda", "lam", "lmbda", "l1", "penalty"})
STRAIGHT_THROUGH = frozenset({"ste", "straight"})
JOINED = {"xf": {"x", "f"}, "xc": {"x", "c"}, "tf": {"t", "f"}, "tc": {"t", "c"}}


def is_latent(value: Tensor) -> bool:
    return value.ndim >= 3


def is_number(value: Tensor) -> bool:
    return value.numel() == 1


def is_row(value: Tensor) -> bool:
    return value.ndim in (1, 2) and value.numel() > 1 and value.is_floating_point()


def is_per_sample(value: Tensor) -> bool:
    return value.ndim <= 1


ARGUMENTS: dict[str, tuple[Words, Callable[[Tensor], bool]]] = {
    "hidden_states": (frozenset({"hidden", "latent", "latents", "sample", "x", "xt"}), is_latent),
    "timestep": (frozenset({"timestep", "timesteps", "t", "time", "ts"}), is_per_sample),
    "class_labels": (frozenset({"class", "labels", "label", "y"}), is_per_sample),
}


class Training:
    """The contract of ``run_training`` in replay_check.py."""

    def __init__(self, model: nn.Module, meta: dict[str, Any]) -> None:
        self.module, self.meta = model.requires_grad_(False), meta
        self.learnable: LearnableModel | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        full, cache = self.inputs(batch, FULL, CACHE), self.inputs(batch, CACHE, FULL)
        logits = self.needed(batch, LOGITS, is_row, "logits of the router's row").detach().requires_grad_()
        row = logits
        if logits.ndim == 2:
            row = logits[int(self.needed(batch, INDEX, is_number, "row of the table of logits"))]
        if self.learnable is None:
            self.learnable = learnable(self.module, full)
        _, stored = self.learnable.record(full)
        result = training_iteration(self.learnable, cache, stored, row, self.objective(batch))
        (gradient,) = torch.autograd.grad(result.loss, logits)
        return {"student": result.student.detach(), "loss": result.loss.detach(), "grad": gradient}

    def inputs(self, batch: Batch, own: Words, other: Words) -> dict[str, Any]:
        """Arguments of the forward at one of the two steps."""
        found: dict[str, Any] = {**self.meta.get("extra_kwargs", {}), "return_dict": False}
        for argument, (names, fits) in ARGUMENTS.items():
            theirs = [key for key in matching(batch, names, fits) if not spoken(key) & other]
            marked = [key for key in theirs if spoken(key) & own]
            if not theirs:
                raise self.missing(batch, f"{argument} of the {'full' if own is FULL else 'cache'} step")
            found[argument] = batch[(marked or theirs)[0]]
        rows = len(found["hidden_states"])
        if found["timestep"].numel() != rows:
            found["timestep"] = found["timestep"].reshape(-1)[:1].expand(rows).contiguous()
        return found

    def objective(self, batch: Batch) -> Objective:
        given = {key: float(value) for key, value in batch.items() if is_number(value)}
        described = [*given.items(), *numbers(self.meta)]
        penalty = next((value for name, value in described if spoken(name) & PENALTY), None)
        if penalty is None:
            raise self.missing(batch, "lambda")
        straight_through = next((value for name, value in described if spoken(name) & STRAIGHT_THROUGH), None)
        return Objective(penalty, straight_through=straight_through)

    def needed(self, batch: Batch, names: Words, fits: Callable[[Tensor], bool], what: str) -> Tensor:
        found = matching(batch, names, fits)
        if not found:
            raise self.missing(batch, what)
        return batch[found[0]]

    def missing(self, batch: Batch, what: str) -> InvalidTrainingData:
        return InvalidTrainingData(
            f"the recorded iteration names no {what}",
            where=str(self.meta.get("case")),
            why=f"it holds {', '.join(f'{key} {list(value.shape)}' for key, value in batch.items())}",
            fix="teach tests/golden_training.py its names",
        )


def make_train(model: nn.Module, meta: dict[str, Any]) -> Callable[[Batch], dict[str, Tensor]]:
    """Callable for one training case."""
    return Training(model, meta)


def matching(batch: Batch, names: Words, fits: Callable[[Tensor], bool]) -> list[str]:
    return [key for key, value in batch.items() if spoken(key) & names and fits(value)]


def spoken(name: str) -> set[str]:
    """The words of a name: ``full.hidden_states`` -> full, hidden, states."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return words.union(*(JOINED[word] for word in words if word in JOINED))


def numbers(described: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a description, with its key."""
    if isinstance(described, dict):
        for key, value in described.items():
            yield from numbers(value, key)
    elif isinstance(described, int | float) and not isinstance(described, bool):
        yield name, float(described)
