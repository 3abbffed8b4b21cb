"""What stands in for a value that is not computed: a stored one, or a sum of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dicompile.errors import InvalidPolicy
from dicompile.plan.action import Action, What
from dicompile.plan.frozen import Frozen, Origin
from dicompile.plan.weights import chebyshev_weights, polynomial_weights, taylor_weights

WhatName = Literal["core", "update", "attention", "stream"]


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
        fitted_to = [other for other in range(step - 1, -1, -1) if not self.weights[other]]
        count = len(self.weights_at(step, place))
        if count and list(stored[:count]) == fitted_to[:count]:
            return self
        return Forecast(order=max(count - 1, 0), differences="divided", what=self.what)


Recall = Annotated[Reuse | Forecast | Spectral | Fitted, Field(discriminator="do")]
"""What stands in for a value that is not computed."""
