"""Gates: which steps compute is decided while sampling, by how far a value early in the model has drifted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dicompile.errors import InvalidPolicy
from dicompile.plan.frozen import Frozen


class Gate(Frozen):
    """Recall at steps at which a probe has drifted little, compute everything at the others.

    With ``d = mean|probe - reference| / mean|reference|`` over the whole batch, a step recalls if ``P(d)``, or the sum
    of it over the steps since the last full one, is below the threshold. One decision holds for all samples of a call,
    unless each `decides` for itself.

    Attributes:
        probe: "residual": what the first blocks add to the latent's stream; "stream": that behind them; "modulated":
            what enters the first attention, the latent's tokens normalised and modulated by the timestep; "modulation"
            and "embedding": what the timestep has become by which they are modulated, after the last product, and
            before it and its activation; "latent": the latent itself. "partner": nothing is compared; a step recalls
            where the guidance partner `leads`, of the same latent, has been called at it before. "forecast": at steps
            that recall, the last block is computed, too, and its stream held against the recalled one:
            ``d = mean(|recalled - computed| / |computed|)``, for the step after; what was computed is thrown away.
        leads: name of the context that never recalls, and after which the others do; for "partner" only.
        depth: number of the first blocks that the probe goes through; None for those that run at every step for
            themselves (`Policy.outside`).
        reference: the probe at the last full step ("full"), or at the step before ("previous").
        relative_to: "probe": as above. "output": ``d = k mean|probe - reference| / mean|output|``, with the model's
            output at the last full step, and k how far that had moved since the full step before it, over how far the
            probe had. Without two full steps there is no k, and a step is full.
        decides: one decision holds for the whole "call", or every "sample" of its batch decides for itself, by its own
            drift: decisions are those of single runs. Those that compute are one batch then, those that recall another.
        halves: both guidance halves come in one call, with the samples in the same order in either: "uncond-cond" (as
            diffusers concatenates them) or "cond-uncond". The halves of one picture decide together; one that waits for
            a partner has it in the same call. Empty where every half has a call of its own.
        partners: guidance partners that are called one by one decide "each" for themselves, or do at every step what
            the "first" of them has decided, within the limits of their own.
        threshold: drift from which a step is full, unitless.
        decay: what the threshold is multiplied by over the run: at step s of S, by ``decay ** (s / S)``.
        floor: least threshold, whatever it has decayed to.
        rescale: coefficients of P, the highest power first.
        accumulates: add up the drift since the last full step.
        resume: after a full step, recall only below this; None for the threshold.
        shortest: steps in a row that recall before anything is compared; "forecast" has at least 1, and makes its first
            comparison at the one after these.
        longest: most steps in a row that recall; None for any number.
        most: most steps of a run that do.
        last: steps at the end that are full.
    """

    probe: Literal["residual", "stream", "modulated", "modulation", "embedding", "latent", "partner", "forecast"] = (
        "residual"
    )
    leads: str = ""
    depth: PositiveInt | None = None
    reference: Literal["full", "previous"] = "full"
    relative_to: Literal["probe", "output"] = "probe"
    decides: Literal["call", "sample"] = "call"
    halves: Literal["", "uncond-cond", "cond-uncond"] = ""
    partners: Literal["each", "first"] = "each"
    threshold: Annotated[float, Field(ge=0)] = 0.0
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    floor: Annotated[float, Field(ge=0)] = 0.0
    rescale: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 0.0)
    accumulates: bool = False
    resume: Annotated[float, Field(ge=0)] | None = None
    shortest: NonNegativeInt = 0
    longest: PositiveInt | None = None
    most: NonNegativeInt | None = None
    last: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_probe(self) -> Gate:
        if self.depth is not None and not self.watches_blocks:
            raise InvalidPolicy(
                f"a gate watches the {self.probe} through {self.depth} blocks",
                where="Gate",
                why="that is known before any block runs",
                fix="leave depth out, or set probe='residual' or 'stream'",
            )
        if bool(self.leads) != (self.probe == "partner"):
            raise InvalidPolicy(
                f"a gate watches the {self.probe}" + (f" and waits for {self.leads!r}" if self.leads else ""),
                where="Gate",
                why="the name of a context is for gates that wait for a guidance partner, and for these alone",
                fix="Gate(probe='partner', leads='cond')",
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Gate:
        waits = self.probe == "partner"
        reasons = {
            "nothing of a sample is compared where a guidance partner decides": waits and self.decides == "sample",
            f"{self.leads!r} is none of the halves of {self.halves!r}": waits
            and bool(self.halves)
            and self.leads not in self.halves.split("-"),
            "one decision holds for the whole call, however its batch is made up": not waits
            and bool(self.halves)
            and self.decides == "call",
        }
        for reason, holds in reasons.items():
            if holds:
                raise InvalidPolicy(
                    f"a gate that watches the {self.probe} has decides={self.decides!r} and halves={self.halves!r}",
                    where="Gate",
                    why=reason,
                    fix="policy.per_sample(halves='uncond-cond'), or GuidanceReuse(halves='uncond-cond')",
                )
        return self

    @model_validator(mode="after")
    def _check_verifies(self) -> Gate:
        if not self.verifies:
            return self
        other = self.relative_to == "output" or self.reference == "previous"
        reasons = {
            "compares with something else than what is recalled": other,
            "has guidance partners follow one that recalls something else": self.partners == "first",
            "has no step that is compared before it decides": self.shortest == 0,
            "starts again below another threshold, but never decides right after a full step": self.resume is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise InvalidPolicy(
                    f"a gate that verifies forecasts {reason}",
                    where="Gate",
                    fix="Gate(probe='forecast', shortest=1, longest=8, threshold=0.3)",
                )
        return self

    @property
    def verifies(self) -> bool:
        """True if it computes some of what is recalled, to see how far off that is."""
        return self.probe == "forecast"

    @property
    def tells_rows_apart(self) -> bool:
        """True if rows of one call may do different things at a step."""
        return self.decides == "sample" or bool(self.halves)

    @property
    def unit(self) -> int:
        """Rows of a call that belong to one picture."""
        return 2 if self.halves else 1

    def leading(self, rows: int) -> tuple[range, range]:
        """Rows of the guidance half that leads, and of the other one, where both come in one call.

        Args:
            rows: of the batch.
        """
        first, second = range(rows // 2), range(rows // 2, rows)
        return (first, second) if self.halves.startswith(f"{self.leads}-") else (second, first)

    @property
    def watches_blocks(self) -> bool:
        """True if blocks run before it decides."""
        return self.probe in ("residual", "stream")

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

    def must_recall(self, run: int) -> bool:
        """True if nothing is compared yet, after so many steps in a row that recalled."""
        return run < self.shortest

    def is_verified(self, run: int, recalled: int) -> bool:
        """True if what a step recalls is compared with what it would have computed: the next one decides by that.

        Args:
            run: steps that recalled since the last full one, before it.
            recalled: steps of the run that did, before it.
        """
        return self.verifies and not self.must_recall(run) and self.may_recall(run + 1, recalled + 1)

    def limit(self, run: int, share: float) -> float:
        """Drift from which a step is full.

        Args:
            run: steps that recalled since the last full one.
            share: of the run that is over with this step.
        """
        threshold = self.threshold if run or self.resume is None else self.resume
        return max(threshold * math.pow(self.decay, share), self.floor)

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
