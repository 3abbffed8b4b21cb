"""A learned router: one logit per evaluation of the network and site, and the schedule that a threshold makes of it.

Rows are numbered as the research code numbers them. Only rows of cache steps were trained; the others hold noise::

    "ddim"            steps T  call p is row T-1-p   odd rows compute everything, even rows are cache steps
    "dpm-solver-2"    T = 2 N  calls 2n, 2n+1 are evaluations A, B of solver step n; A of n >= 1 is a cache step, row n
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dicompile.errors import InvalidRouter

Grid = Literal["ddim", "dpm-solver-2"]


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What a router was trained for and how; whatever a file does not say is empty.

    Attributes:
        sites: labels of the model's sites in execution order, "3.mlp".
        timesteps: of the sampler in calling order, as its scheduler counts them.
        sampler: class of the scheduler.
        model: class or published name of the model.
        penalty: factor of the sum of scores in the loss, lambda.
        iterations: optimiser steps, each of which trained one row.
        batch: samples per iteration.
        seed: of the training.
    """

    sites: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    sampler: str = ""
    model: str = ""
    penalty: float | None = None
    iterations: int | None = None
    batch: int | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Router:
    """Logits of a Learning-to-Cache router.

    Attributes:
        logits: float32 [steps, sites]; the sigmoid is the score of computing the site.
        grid: which calls are cache steps, and which row is theirs; see the module docstring.
        threshold: a site is computed if its score is strictly greater, in [0, 1).
        facts: what it was trained for.
        source: what messages call it, usually a file.

    Raises:
        InvalidRouter: the logits are no finite matrix, the number of steps is odd, or labels do not match.

    Reference:
        Ma et al., Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching, arXiv 2406.01733.
    """

    logits: Tensor
    grid: Grid = "ddim"
    threshold: float = 0.1
    facts: RouterFacts = field(default_factory=RouterFacts)
    source: str = "router"

    def __post_init__(self) -> None:
        check_logits(self.logits, self.source)
        _check_threshold(self.threshold, self.source)
        for name, count, size in (
            ("sites", len(self.facts.sites), self.sites),
            ("timesteps", len(self.facts.timesteps), self.steps),
        ):
            if count not in (0, size):
                raise InvalidRouter(
                    f"the router names {count} {name}, its logits are for {size}",
                    where=self.source,
                    fix="train it again, or remove what does not belong to it",
                )

    @property
    def steps(self) -> int:
        """Evaluations of the network in one run, T."""
        return int(self.logits.shape[0])

    @property
    def sites(self) -> int:
        """Sites of the model, S."""
        return int(self.logits.shape[1])

    @property
    def rows(self) -> dict[int, int]:
        """Row of every cache step, by call position."""
        return cache_rows(self.grid, self.steps)

    def schedule(self, threshold: float | None = None) -> Tensor:
        """What is computed, in calling order.

        Args:
            threshold: instead of the router's own; larger values cache more.

        Returns:
            bool [steps, sites].

        Raises:
            InvalidRouter: the threshold is not in [0, 1).
        """
        limit = self.threshold if threshold is None else threshold
        _check_threshold(limit, self.source)
        compute = torch.ones(self.logits.shape, dtype=torch.bool)
        for call, row in self.rows.items():
            compute[call] = self.logits[row].sigmoid() > limit
        return compute

    def cached(self, threshold: float | None = None) -> dict[int, int]:
        """Number of cached sites of every cache step, by call position; see `schedule`."""
        compute = self.schedule(threshold)
        return {call: int((~compute[call]).sum()) for call in self.rows}

    def summary(self, threshold: float | None = None) -> str:
        """One line of figures; see `schedule`."""
        cached, possible = sum(self.cached(threshold).values()), len(self.rows) * self.sites
        return (
            f"{self.grid}, {self.steps} steps, {self.sites} sites, threshold "
            f"{self.threshold if threshold is None else threshold:g}: {cached} of {possible} sites of {len(self.rows)} "
            f"cache steps are cached ({cached / max(possible, 1):.2%})"
        )


def cache_rows(grid: Grid, steps: int) -> dict[int, int]:
    """Row of every cache step of a run, by call position, for an even number of steps."""
    if grid == "ddim":
        return {call: steps - 1 - call for call in range(1, steps, 2)}
    return {2 * n: n for n in range(1, steps // 2)}


def check_logits(logits: Tensor, source: str) -> None:
    """Raise if these are no logits of a router.

    Raises:
        InvalidRouter: they are no finite float32 matrix with an even number of rows.
    """
    why = ""
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.numel():
        why = f"they are {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}, not float32 [steps, sites]"
    elif not logits.isfinite().all():
        why = f"row {int((~logits.isfinite()).any(1).nonzero()[0])} holds a value that is not finite"
    elif len(logits) % 2:
        why = f"{len(logits)} steps are odd: every cache step needs a full step of its own before it"
    if why:
        raise InvalidRouter(
            "these are not the logits of a router", where=source, why=why, fix="train it again with an even --steps"
        )


def _check_threshold(threshold: float, source: str) -> None:
    if not 0 <= threshold < 1:
        raise InvalidRouter(
            f"a threshold of {threshold} has no meaning",
            where=source,
            why="scores lie between 0 and 1",
            fix="use 0.1, or a larger number below 1 to cache more",
        )
