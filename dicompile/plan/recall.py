"""What stands in for a value that is not computed: a stored one, or a sum of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dicompile.errors import InvalidPolicy
from dicompile.plan.action import Action, LowBand, What
from dicompile.plan.frozen import Frozen, Origin
from dicompile.plan.weights import chebyshev_weights, polynomial_weights, taylor_weights, unrolled_weights

WhatName = Literal["core", "update", "attention", "stream", "difference"]


class Reuse(Frozen):
    """Take the stored value.

    Attributes:
        what: which value is stored; see `dicompile.plan.action.What`. "stream" is for spans only.
    """

    do: Literal["reuse"] = "reuse"
    what: WhatName = "core"

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del stored, step, place
        return Action((0.0, 1.0), What(self.what))


class Forecast(Frozen):
    """Continue the stored values as a Taylor series in the number of steps.

    Derivatives are differences of what full steps stored; the order builds up, one per stored value.

    Attributes:
        order: highest derivative, 0 is `Reuse`.
        differences: "backward" takes all differences over the last distance between full steps, as published; "divided"
            takes each over the steps that it spans: the forecast is then the polynomial through the stored values,
            however they are spaced.
        hermite: scale of the Hermite polynomials that stand in for the powers of the series; None for powers. For
            backward differences only.
        since: values that were stored before this step count for nothing, but for a single one.
        what: which value is stored.

    Raises:
        InvalidPolicy: Hermite polynomials of divided differences.

    Reference:
        Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.
    """

    do: Literal["forecast"] = "forecast"
    order: NonNegativeInt = 1
    differences: Literal["backward", "divided"] = "backward"
    hermite: Annotated[float, Field(gt=0)] | None = None
    since: NonNegativeInt = 0
    what: WhatName = "core"

    @model_validator(mode="after")
    def _check_basis(self) -> Forecast:
        if self.hermite is not None and self.differences != "backward":
            raise InvalidPolicy(
                "a forecast by Hermite polynomials takes backward differences",
                where="Forecast",
                fix="leave out differences='divided', or hermite",
            )
        return self

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del place
        if self.since:
            stored = [other for other in stored if other >= self.since] or stored[:1]
        if self.differences == "divided":
            return Action((0.0, *polynomial_weights(stored, step, self.order)), What(self.what))
        return Action((0.0, *taylor_weights(stored, step, self.order, self.hermite)), What(self.what))


class Spectral(Frozen):
    """Continue all stored values as a sum of Chebyshev polynomials over the whole run, fitted by ridge regression.

    The weights follow from the steps alone. Everything that full steps stored is kept to the end.

    Attributes:
        degree: of the highest polynomial.
        ridge: strength of the regularisation.
        share: of the fit in the forecast; the rest is the straight line through the last two stored values.
        span: steps 0 to `span` are -1 to 1 to the polynomials.
        what: which value is stored.

    Reference:
        Han et al., Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration, arXiv 2603.01623.
    """

    do: Literal["spectral"] = "spectral"
    degree: NonNegativeInt = 4
    ridge: Annotated[float, Field(gt=0)] = 0.1
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    span: PositiveInt = 50
    what: WhatName = "stream"

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del place
        weights = [self.share * w for w in chebyshev_weights(stored, step, self.degree, self.ridge, self.span)]
        for i, weight in enumerate(polynomial_weights(stored, step, 1)):
            weights[i] += (1 - self.share) * weight
        return Action((0.0, *weights), What(self.what))


class Bands(Frozen):
    """Reuse the low frequencies of a value over its tokens, and forecast the high ones as `Forecast` does.

    Of tokens that lead to no picture (text) all frequencies are forecast.

    Attributes:
        basis: "dct": the cosine transform over the rows and columns of the token grid, of which frequencies with
            ``sqrt(i**2 + j**2)`` up to the cutoff are low. "fft": the Fourier transform over the tokens in their order.
        cutoff: highest of the low frequencies, as a share of the highest that there is.
        grid: rows and columns of the picture's tokens, where the latent's shape does not tell them.
        order: highest derivative.
        hermite: scale of the polynomials; see `Forecast`.
        since: values that were stored before this step count for nothing; see `Forecast`.
        what: which value is stored.

    Reference:
        Liu et al., FreqCa: Accelerating Diffusion Models via Frequency-Aware Caching, arXiv 2510.08669.
    """

    do: Literal["bands"] = "bands"
    basis: Literal["dct", "fft"] = "dct"
    cutoff: Annotated[float, Field(ge=0, le=1)] = 0.1
    grid: tuple[PositiveInt, PositiveInt] | None = None
    order: NonNegativeInt = 2
    hermite: Annotated[float, Field(gt=0)] | None = 0.71
    since: NonNegativeInt = 0
    what: WhatName = "stream"

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        rule = Forecast(order=self.order, hermite=self.hermite, since=self.since, what=self.what)
        forecast = rule.action(stored, step, place)
        if forecast.weights == (0.0, 1.0):
            return forecast
        return replace(forecast, low=LowBand(self.basis, self.cutoff, self.grid))


class WeightedBands(Frozen):
    """Reuse a picture with weights on its low and its high frequencies, each at steps between two timesteps.

    For values with two last axes that are the picture's height and width, such as what most models return.

    Attributes:
        low: weight of the frequencies in a circle around the constant one, unitless.
        high: weight of the others.
        low_between: `low` holds between these timesteps, as the scheduler counts them; elsewhere it is 1.
        high_between: the same for `high`.
        compound: multiply the weights of all steps since the picture was stored, as diffusers does; else this step's
            count alone.
        radius: of the circle, as a share of the picture's shorter side, rounded down to whole frequencies.
        what: which value is stored.

    Reference:
        Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355,
        equations 9 to 11, as diffusers has them; its circle is that of the authors' code.
    """

    do: Literal["weighted-bands"] = "weighted-bands"
    low: float = 1.1
    high: float = 1.1
    low_between: tuple[float, float] = (99, 901)
    high_between: tuple[float, float] = (-1, 301)
    compound: bool = True
    radius: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    what: WhatName = "difference"

    def during(self, timesteps: Sequence[float], begin: int = 0) -> DuringRun:
        """The same for a run whose timesteps are known, the first of which is step `begin` of the schedule."""
        return DuringRun(self, tuple(timesteps), begin)


@dataclass(frozen=True, slots=True)
class DuringRun:
    """`WeightedBands` of one run; see there."""

    bands: WeightedBands
    timesteps: tuple[float, ...]
    begin: int

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del place
        bands = self.bands
        first = stored[0] + 1 if bands.compound else step
        times = self.timesteps[first - self.begin : step + 1 - self.begin]
        low, high = (
            weight ** sum(min(between) < time < max(between) for time in times)
            for weight, between in ((bands.low, bands.low_between), (bands.high, bands.high_between))
        )
        return Action((0.0, high), What(bands.what), low=LowBand("fft2", bands.radius), low_weight=low)


class Trend(Frozen):
    """Go on from the last stored value by a share of how far it is from the one stored before it.

    ``h1 + w (h1 - h2)``. Where a single value is stored, it is reused.

    Attributes:
        weight: w at step 0, unitless.
        growth: what w grows by with every step of the schedule.
        what: which value is stored.

    Reference:
        Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355,
        section on dynamic feature reuse.
    """

    do: Literal["trend"] = "trend"
    weight: float = 0.5
    growth: float = 0.0
    what: WhatName = "core"

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del place
        weight = self.weight + self.growth * step
        weights = (0.0, 1.0 + weight, -weight) if len(stored) > 1 and weight else (0.0, 1.0)
        return Action(weights, What(self.what))


class Aligned(Frozen):
    """Go on from the last stored value but one in the direction of the last, as far as the first blocks have gone.

    ``h2 + g (h1 - h2)`` with ``g = mean|p - p2| / mean|p1 - p2|``, where p is what the blocks that a gate watches add
    at this step, p1 and p2 what they added when the values were stored. Where a single value is stored, it is reused.

    Attributes:
        least: smallest g, unitless.
        most: largest g.
        what: which value is stored.

    Reference:
        Bu et al., DiCache: Let Diffusion Model Determine Its Own Cache, arXiv 2508.17356.
    """

    do: Literal["align"] = "align"
    least: float = 1.0
    most: float = 1.5
    what: WhatName = "update"

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del step, place
        example = (self.least + self.most) / 2
        weights = (0.0, example, 1 - example) if len(stored) > 1 and example not in (0.0, 1.0) else (0.0, 1.0)
        return Action(weights, What(self.what), is_aligned=len(weights) > 2)


Weights = tuple[float, ...]
"""Of stored values, newest first."""


class Fitted(Frozen):
    """Combine the stored values with weights that were fitted for every step.

    Attributes:
        weights: per step, weights of the stored values, newest first, or one row of them for each site or span that the
            rule names, in order; of a full step none. Values that were not stored yet must not have weights.
        what: which value is stored.
        origin: what the weights were fitted to, if somebody wrote it down.

    Reference:
        L2P, arXiv 2604.26365: published forecasts are linear in the history, so the best ones can be fitted.
    """

    do: Literal["fitted"] = "fitted"
    weights: tuple[Weights | tuple[Weights, ...], ...]
    what: WhatName = "core"
    origin: Origin | None = None

    def weights_at(self, step: int, place: int = 0) -> Weights:
        """Weights of one site at a step.

        Args:
            step: counted from 0.
            place: of the site among those that the rule names.
        """
        row = self.weights[step]
        own = row[place] if row and isinstance(row[0], tuple) else row
        return cast("Weights", own)

    def sites_at(self, step: int) -> int | None:
        """For how many sites there are weights at a step; None where all share them, or it is full."""
        row = self.weights[step]
        return len(row) if row and isinstance(row[0], tuple) else None

    def action(self, stored: Sequence[int], step: int, place: int = 0) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first; `place` as in `weights_at`."""
        del stored
        return Action((0.0, *self.weights_at(step, place)), What(self.what))

    def for_stored(self, stored: Sequence[int], step: int, place: int = 0) -> Fitted | Forecast:
        """The fitted weights, or, where other steps are stored than they were fitted to, the polynomial through those.

        A run that begins in the middle of the schedule has a shorter history until as many full steps have passed.
        """
        fitted_to = [other for other in range(step - 1, -1, -1) if not self.weights_at(other, place)]
        count = len(self.weights_at(step, place))
        if count and list(stored[:count]) == fitted_to[:count]:
            return self
        return Forecast(order=max(count - 1, 0), differences="divided", what=self.what)


class Velocity(Frozen):
    """Go on from the velocity of the step before by how much the average one of some steps differs from their first.

    For flow matching with Euler's method: ``v = v1 + (u - v0) (s2 - s) / (s - s0)``. At noise level s, v1 is the
    velocity of the step before, computed or not, v0 that of the step `back` steps before, at level s0, and s2 the next
    level; ``u = (x - x0) / (s - s0)`` is the average velocity in between, by which the latent has moved.

    Attributes:
        back: per step of the schedule, over how many steps the average is taken: 1 is `Reuse`. Of no matter at full
            steps, and never further than to the first step of the run.
        what: which value is stored.

    Reference:
        Gao et al., MeanCache: From Instantaneous to Average Velocity for Accelerating Flow Matching Inference,
        arXiv 2601.19961.
    """

    do: Literal["velocity"] = "velocity"
    back: tuple[PositiveInt, ...]
    what: WhatName = "stream"

    def fitted(self, stored: Sequence[int], step: int, timesteps: Sequence[float], begin: int = 0) -> Fitted:
        """The weights for values stored at the steps `stored`, up to `step`; they follow from the timesteps.

        Args:
            stored: steps at which velocities were computed.
            step: the last one with weights.
            timesteps: of the run: noise levels up to a factor; 0 comes after the last.
            begin: step of the schedule at which the run begins.
        """
        times = (*timesteps, 0.0)
        rows = [self._row(times, number, self.back[begin + number]) for number in range(step - begin + 1)]
        weights = unrolled_weights(rows, {other - begin for other in stored})
        return Fitted(weights=((),) * begin + weights, what=self.what)

    @staticmethod
    def _row(times: Sequence[float], step: int, back: int) -> Weights:
        """Weights of the velocities of all steps before one, the oldest first."""
        if step == 0:
            return ()
        first = max(step - back, 0)
        length = times[step] - times[first]
        ahead = (times[step + 1] - times[step]) / length
        weights = [0.0] * step
        for other in range(first, step):
            weights[other] = ahead * (times[other + 1] - times[other]) / length
        weights[first] -= ahead
        weights[-1] += 1.0
        return tuple(weights)


AnyRecall = Reuse | Forecast | Trend | Spectral | Bands | WeightedBands | Aligned | Fitted | Velocity
Recall = Annotated[AnyRecall, Field(discriminator="do")]
"""What stands in for a value that is not computed."""

GatedRecall = Reuse | Forecast | Aligned | DuringRun
"""What stands in where a gate decides while sampling: its weights follow from the steps that really were full."""
