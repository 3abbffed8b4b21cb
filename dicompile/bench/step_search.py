"""Rivals of `auto`: how others choose the steps that compute everything, given the very recording that it is given.

Both follow the description in their papers. What these measure and a recording does not hold, the next best thing in
it stands for; where that is so, the docstrings say it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dicompile.errors import InvalidSetting
from dicompile.learn.frontier import Frontier
from dicompile.learn.search import Array

Steps = tuple[int, ...]
"""Numbers of the steps that compute everything, rising; the first is 0."""
Loss = Callable[[Steps], float]
"""What is wrong in the end with these full steps."""

LONGEST = 10
"""Steps from one full step to the next that CEM looks at, at most."""


@dataclass(frozen=True, slots=True)
class Annealing:
    """How BudCache searches; what is published, where nothing else is said.

    Attributes:
        iterations: of annealing.
        hottest: temperature at the start, as a share of the loss of the first mask: the published 0.05 is in squared
            units of a latent, so this is inferred.
        coldest: temperature at the end, likewise.
        rounds: of hill climbing, at most.
        restarts: from random masks.
        reach: how far a full step moves in one step of hill climbing, and in most moves of annealing.
        jumps: moves of every full step to anywhere, in one round of hill climbing.
        seed: of everything that is drawn.
    """

    iterations: int = 200
    hottest: float = 0.5
    coldest: float = 1e-4
    rounds: int = 20
    restarts: int = 1
    reach: int = 3
    jumps: int = 2
    seed: int = 0


def anneal(loss: Loss, steps: int, full: int, how: Annealing = Annealing()) -> Steps:
    """Full steps by simulated annealing over masks with a fixed number of them, then by hill climbing.

    The first quarter of the full steps come first in the run, and stay there, as published.

    Args:
        loss: what is minimised; it is asked once for every mask. Published is the squared error of the last latent of
            sampled runs, which is expensive; see `reuse_loss` for what a recording says of it.
        steps: of the run.
        full: how many of them compute everything.
        how: see `Annealing`.

    Reference:
        Lei et al., Budget-Constrained Step-Level Diffusion Caching (BudCache), arXiv 2606.13496.
    """
    search = _Search(loss, steps, full, how)
    return min((search.run() for _ in range(how.restarts)), key=search.loss)


class _Search:
    """One search, which remembers what it has asked for."""

    def __init__(self, loss: Loss, steps: int, full: int, how: Annealing) -> None:
        self._asked, self._known = loss, dict[Steps, float]()
        self._steps, self._full, self._how = steps, full, how
        self._fixed, self._random = max(1, full // 4), random.Random(how.seed)

    def loss(self, mask: Steps) -> float:
        if mask not in self._known:
            self._known[mask] = self._asked(mask)
        return self._known[mask]

    def run(self) -> Steps:
        """The best mask of one restart."""
        drawn = self._random.sample(range(self._fixed, self._steps), self._full - self._fixed)
        mask = best = (*range(self._fixed), *sorted(drawn))
        first = self.loss(mask)
        for iteration in range(self._how.iterations):
            cooled = (self._how.coldest / self._how.hottest) ** (iteration / self._how.iterations)
            moved = self._moved(mask)
            worse = self.loss(moved) - self.loss(mask)
            if worse < 0 or self._random.random() < math.exp(-worse / max(self._how.hottest * cooled * first, 1e-300)):
                mask = moved
                best = min(best, mask, key=self.loss)
        return min(best, self._climbed(mask), self._climbed(best), key=self.loss)

    def _moved(self, mask: Steps) -> Steps:
        """A mask with one full step elsewhere, seldom two; near where it was in most cases."""
        movable, free = mask[self._fixed :], self._free(mask)
        count = 1 if self._random.random() < 0.9 else 2
        if min(len(movable), len(free)) < count:
            return mask
        leaving = self._random.sample(movable, count)
        near = [step for step in free if abs(step - leaving[0]) <= self._how.reach]
        if count == 1 and near and self._random.random() < 0.7:
            free = near
        return _exchanged(mask, leaving, self._random.sample(free, count))

    def _climbed(self, mask: Steps) -> Steps:
        """Take the best of all small moves until there is none that is better."""
        for _ in range(self._how.rounds):
            found = min(self._neighbours(mask), key=self.loss, default=mask)
            if self.loss(found) >= self.loss(mask):
                break
            mask = found
        return mask

    def _neighbours(self, mask: Steps) -> Iterator[Steps]:
        free = self._free(mask)
        for step in mask[self._fixed :]:
            near = [other for other in free if abs(other - step) <= self._how.reach]
            far = self._random.sample(free, min(self._how.jumps, len(free)))
            for other in dict.fromkeys((*near, *far)):
                yield _exchanged(mask, [step], [other])

    def _free(self, mask: Steps) -> list[int]:
        return [step for step in range(self._fixed, self._steps) if step not in mask]


def _exchanged(mask: Steps, leaving: Sequence[int], coming: Sequence[int]) -> Steps:
    return tuple(sorted({*mask} - {*leaving} | {*coming}))


def reuse_loss(frontier: Frontier) -> Loss:
    """Squared error of the last latent, relative to it, where every other step takes the stack's update from the last.

    That is what BudCache measures by sampling, to first order: each step's error, carried to the output by its
    sensitivity and to the latent by how far the sampler moves, all of them added as vectors, which inner products
    allow. What the sampler makes of an error at later steps is not in it, as it is not in what `auto` expects.

    Args:
        frontier: of the recording; of a model with a stack of blocks.
    """
    grams, effect = frontier.grams["stack"], frontier.effect("stack")
    sizes = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), np.finfo(np.float64).tiny))

    def loss(mask: Steps) -> float:
        shares = effect / sizes  # [spans, steps]: of every step's value in the last latent
        signed = shares.copy()
        for step, latest in enumerate(_latest(mask, grams.shape[-1])):
            signed[:, latest] -= shares[:, step]
        return float(np.einsum("vi,vij,vj->", signed, grams, signed) / len(grams))

    return loss


def _latest(mask: Steps, steps: int) -> Iterator[int]:
    """For every step the last full one, itself included."""
    chosen = set(mask)
    return itertools.accumulate((step if step in chosen else 0 for step in range(steps)), max)


def priors(frontier: Frontier) -> Array:
    """Prior errors of CEM: one minus the cosine of a value at a step with itself some steps before.

    The paper takes the last block's output, averaged over tokens; here it is the model's, over all of them.

    Args:
        frontier: of the recording.

    Returns:
        [distances, steps], from 0 steps to one less than `LONGEST`; 0 where there is no step so long before.
    """
    gram = frontier.output_gram
    cosine = gram / np.maximum(np.sqrt(np.outer(np.diag(gram), np.diag(gram))), np.finfo(np.float64).tiny)
    steps = len(gram)
    found = np.zeros((min(LONGEST, steps), steps))
    for distance in range(1, len(found)):
        found[distance, distance:] = 1 - np.diagonal(cosine, distance)
    return found


def least_cumulative_error(
    prior: Array, full: int, spread: int = 1, weight: Literal["none", "linear", "quadratic"] = "quadratic"
) -> Steps:
    """Full steps by dynamic programming over prior errors, accumulated over the run.

    Between two full steps, g steps apart, lies the error ``w(g - 1) sum_{s <= t} prior[g - 1, s]``, with t the second
    one. The first step and the last one are full, and g is near steps / full.

    Args:
        prior: see `priors`.
        full: how many steps compute everything.
        spread: by how much g may differ from that; 1 as published.
        weight: how errors grow with the distance: w(c) = 1, c or c * c.

    Raises:
        InvalidSetting: no such steps exist.

    Reference:
        Shao et al., Plug-and-Play Fidelity Optimization for Diffusion Transformer Acceleration via Cumulative Error
        Minimization (CEM), arXiv 2512.23258.
    """
    distances, steps = prior.shape
    power = {"none": 0, "linear": 1, "quadratic": 2}[weight]
    costs = np.cumsum(prior, axis=1) * np.arange(distances)[:, None] ** float(power)
    near = round(steps / full)
    gaps = range(max(1, near - spread), min(distances, near + spread) + 1)
    best: dict[int, tuple[float, Steps]] = {0: (0.0, (0,))}
    for _ in range(full - 1):
        longer: dict[int, tuple[float, Steps]] = {}
        for (last, (cost, path)), gap in itertools.product(best.items(), gaps):
            step = last + gap
            if step < steps:
                longer[step] = min(longer.get(step, (math.inf, ())), (cost + costs[gap - 1, step], (*path, step)))
        best = longer
    if steps - 1 not in best:
        raise InvalidSetting(
            f"no {full} full steps of {steps} are {gaps.start} to {gaps.stop - 1} steps apart",
            where="least_cumulative_error",
            why="the first step and the last one are full",
            fix="another number, or a larger spread",
        )
    return best[steps - 1][1]
