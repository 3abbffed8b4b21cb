"""What is known of recorded runs: the facts of a model and a sampler, and one Gram matrix for every value.

``gram[value, s, t]`` is the inner product of a value at step s with itself at step t, over all tokens and samples. From
it follow the error of reuse, and of any forecast, and its best weights: nothing else of a feature is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from dicompile.plan import SAME_TIMESTEP, Level, Stint, follow_each_other
from dicompile.plan.yaml_json import YamlJson

VERSION = 2
READABLE = (1, VERSION)
"""Formats that can be read; in the first one a recording was of one denoiser."""
EXTRAS = ("output", "latent")
"""What is recorded beside sites and the stack: what the model returns, and what it denoises."""


class Costs(YamlJson):
    """A denoiser, and what its steps cost.

    Attributes:
        model: its class.
        full_flops: operations of a step that computes everything.
        site_flops: of one at which no branch is computed, but every one is gated and added.
        stack_flops: of one at which no block runs.
        site_bytes: what remembering one value of every branch takes, for one guidance context.
        stack_bytes: what remembering one update of the stack takes.
    """

    model: str
    full_flops: NonNegativeInt
    site_flops: NonNegativeInt
    stack_flops: NonNegativeInt
    site_bytes: NonNegativeInt
    stack_bytes: NonNegativeInt

    def recalled_flops(self, level: Level) -> int:
        """Operations of a step that recalls every branch, or the stack."""
        return self.site_flops if level == "site" else self.stack_flops

    def stored_bytes(self, level: Level) -> int:
        """What remembering one value of everything takes."""
        return self.site_bytes if level == "site" else self.stack_bytes


class Part(Costs):
    """What one of several denoisers had of the runs.

    Attributes:
        stint: its steps.
    """

    stint: Stint


class Facts(Costs):
    """What was recorded, of which model and sampler: what a recording is compatible with.

    Attributes:
        sites: labels of its sites, "3.mlp", in order.
        spans: labels of the spans of the stack, one for each stream; may be none.
        timesteps: of the sampler, in calling order, as its scheduler counts them; empty if only their number is known.
        steps: number of steps.
        sigmas: of the sampler, one more than steps, as far as it has any.
        latent: shape of the latent.
        parts: of a pipeline with several denoisers: each, in the order of their steps. They have the same sites; model
            and costs of the run itself are those of the first one.
        version: of the format.
    """

    sites: tuple[str, ...]
    spans: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    steps: PositiveInt
    sigmas: tuple[float, ...] = ()
    latent: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    version: int = VERSION

    @property
    def is_whole(self) -> bool:
        """True if every step is one denoiser's."""
        ends = (self.stints[0].first, self.stints[-1].end) if self.stints else (0, self.steps)
        return ends == (0, self.steps) and follow_each_other(self.stints)

    @property
    def shares(self) -> tuple[tuple[range, Costs], ...]:
        """Steps of every denoiser, and what they cost."""
        return tuple((part.stint.steps, part) for part in self.parts) or ((range(self.steps), self),)

    @property
    def stints(self) -> tuple[Stint, ...]:
        """Who has which steps, where there are several denoisers."""
        return tuple(part.stint for part in self.parts)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the denoisers; a single one needs none."""
        return tuple(stint.component for stint in self.stints) or ("",)

    def model_of(self, component: str) -> str:
        """Class of a denoiser; of any other component that of the first one."""
        return next((part.model for part in self.parts if part.stint.component == component), self.model)

    @property
    def full_run(self) -> int:
        """Operations of a run that computes everything."""
        return sum(len(steps) * costs.full_flops for steps, costs in self.shares)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What can be forecast: single branches, and the whole stack where there is one."""
        return ("site", "stack") if self.spans else ("site",)

    @property
    def values(self) -> tuple[str, ...]:
        """Labels of all that is recorded, as in the rows of a Gram matrix."""
        return (*self.sites, *self.spans, *EXTRAS)

    def why_not(self, other: Facts) -> str:
        """Why recordings of two of these do not go together; empty if they do."""
        named = (("model", self.model, other.model), ("steps", self.steps, other.steps))
        for what, mine, theirs in named:
            if mine != theirs:
                return f"one is of {what} {mine}, the other of {theirs}"
        if (self.sites, self.spans) != (other.sites, other.spans):
            return f"one has {len(self.sites)} branches, the other {len(other.sites)}, or of other kinds"
        if self.stints != other.stints:
            served = [" and ".join(map(str, facts.stints)) or "a single denoiser" for facts in (self, other)]
            return f"one is of {served[0]}, the other of {served[1]}"
        if self.latent != other.latent:
            return f"one is of latents {list(self.latent)}, the other of {list(other.latent)}"
        same = SAME_TIMESTEP * max(map(abs, self.timesteps), default=1.0)
        pairs = enumerate(zip(self.timesteps, other.timesteps, strict=False))
        step = next((i for i, (mine, theirs) in pairs if abs(mine - theirs) > same), None)
        if step is not None:
            times = self.timesteps[step], other.timesteps[step]
            return f"step {step + 1} is at timestep {times[0]:g} in one, {times[1]:g} in the other"
        return ""


@dataclass(frozen=True, eq=False)
class Trace:
    """One guidance context of one run.

    Attributes:
        run: number of the run.
        context: its label.
        gram: float64, [values, steps, steps]; see the module docstring.
        reused: float64, [levels, steps]: relative error of the model's output at a step that takes every branch, or the
            update of the stack, from the step before; 0 at the first one.
    """

    run: int
    context: str
    gram: Tensor = field(repr=False)
    reused: Tensor = field(repr=False)


@dataclass(frozen=True)
class Growth:
    """What became of an error that one step made; see `dicompile.learn.probe`.

    Attributes:
        step: that made it.
        factor: its norm in the last latent that the model saw over that in the latent after the step, unitless; the
            geometric mean over samples and contexts.
    """

    step: int
    factor: float


def pooled(traces: Sequence[Trace], values: Sequence[int]) -> Tensor:
    """Inner products over several traces, in each of which a value counts by its relative size.

    Args:
        traces: at least one.
        values: numbers of values.

    Returns:
        float64, [values, steps, steps]; the mean of a diagonal is 1.
    """
    grams = torch.stack([trace.gram[list(values)] for trace in traces])
    energy = grams.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return (grams / energy[..., None, None]).mean(0)
