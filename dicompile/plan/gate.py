"""Gates: which steps compute is decided while sampling, by how far a value early in the model has drifted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from dicompile.plan.frozen import Frozen


class Gate(Frozen):
    """Recall at steps at which a probe has drifted little, compute everything at the others.

    With ``d = mean|probe - reference| / mean|reference|`` over the whole batch, a step recalls if ``P(d)``, or the sum
    of it over the steps since the last full one, is below the threshold. One decision holds for all samples of a call;
    guidance partners that are called one by one decide for themselves.

    Attributes:
        probe: "residual": what the blocks before the stack add to the latent's stream (`Policy.outside`); "modulated":
            what enters the first attention, the latent's tokens normalised and modulated by the timestep.
        reference: the probe at the last full step ("full"), or at the step before ("previous").
        threshold: drift from which a step is full, unitless.
        rescale: coefficients of P, the highest power first.
        accumulates: add up the drift since the last full step.
        resume: after a full step, recall only below this; None for the threshold.
        longest: most steps in a row that recall; None for any number.
        most: most steps of a run that do.
        last: steps at the end that are full.
    """

    probe: Literal["residual", "modulated"] = "residual"
    reference: Literal["full", "previous"] = "full"
    threshold: Annotated[float, Field(ge=0)]
    rescale: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 0.0)
    accumulates: bool = False
    resume: Annotated[float, Field(ge=0)] | None = None
    longest: PositiveInt | None = None
    most: NonNegativeInt | None = None
    last: NonNegativeInt = 0

    def may_recall(self, run: int, recalled: int) -> bool:
        """True if its limits allow another step that recalls.

        Args:
            run: steps that recalled since the last full one.
            recalled: steps of the run that did.
        """
        return (self.longest is None or run < self.longest) and (self.most is None or recalled < self.most)

    def rescaled(self, drift: float) -> float:
        """P of a drift."""
        result = 0.0
        for coefficient in self.rescale:
            result = result * drift + coefficient
        return result

    def limit(self, run: int) -> float:
        """Drift from which a step is full, after so many in a row that recalled."""
        return self.threshold if run or self.resume is None else self.resume

    def most_recalled(self, gated: Sequence[bool]) -> list[bool]:
        """At which steps of a run it recalls at most, within its limits.

        Args:
            gated: for every step, whether it decides.
        """
        run, recalled, result = 0, 0, []
        for is_gated in gated:
            recalls = is_gated and self.may_recall(run, recalled)
            run, recalled = (run + 1, recalled + 1) if recalls else (0, recalled)
            result.append(recalls)
        return result
