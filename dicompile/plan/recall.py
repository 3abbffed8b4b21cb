"""What stands in for a value that is not computed: a stored one, or a sum of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from dicompile.plan.action import Action, What
from dicompile.plan.frozen import Frozen
from dicompile.plan.weights import polynomial_weights, taylor_weights

WhatName = Literal["core", "update", "attention", "stream"]


class Reuse(Frozen):
    """Take the stored value.

    Attributes:
        what: which value is stored; see `dicompile.plan.action.What`. "stream" is for spans only.
    """

    do: Literal["reuse"] = "reuse"
    what: WhatName = "core"

    def action(self, stored: Sequence[int], step: int) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del stored, step
        return Action((0.0, 1.0), What(self.what))


class Forecast(Frozen):
    """Continue the stored values as a Taylor series in the number of steps.

    Derivatives are differences of what full steps stored; the order builds up, one per stored value.

    Attributes:
        order: highest derivative, 0 is `Reuse`.
        differences: "backward" takes all differences over the last distance between full steps, as published; "divided"
            takes each over the steps that it spans: the forecast is then the polynomial through the stored values,
            however they are spaced.
        what: which value is stored.

    Reference:
        Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.
    """

    do: Literal["forecast"] = "forecast"
    order: NonNegativeInt = 1
    differences: Literal["backward", "divided"] = "backward"
    what: WhatName = "core"

    def action(self, stored: Sequence[int], step: int) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        weights = taylor_weights if self.differences == "backward" else polynomial_weights
        return Action((0.0, *weights(stored, step, self.order)), What(self.what))


class Fitted(Frozen):
    """Combine the stored values with weights that were fitted for every step.

    Attributes:
        weights: per step, weights of the stored values, newest first; of a full step none. Values that were not stored
            yet must not have weights.
        what: which value is stored.

    Reference:
        L2P, arXiv 2604.26365: published forecasts are linear in the history, so the best ones can be fitted.
    """

    do: Literal["fitted"] = "fitted"
    weights: tuple[tuple[float, ...], ...]
    what: WhatName = "core"

    def action(self, stored: Sequence[int], step: int) -> Action:
        """Action at `step` for values stored at the steps `stored`, newest first."""
        del stored
        return Action((0.0, *self.weights[step]), What(self.what))

    def for_stored(self, stored: Sequence[int], step: int) -> Fitted | Forecast:
        """The fitted weights, or, where other steps are stored than they were fitted to, the polynomial through those.

        A run that begins in the middle of the schedule has a shorter history until as many full steps have passed.
        """
        fitted_to = [other for other in range(step - 1, -1, -1) if not self.weights[other]]
        count = len(self.weights[step])
        if count and list(stored[:count]) == fitted_to[:count]:
            return self
        return Forecast(order=max(count - 1, 0), differences="divided", what=self.what)


Recall = Annotated[Reuse | Forecast | Fitted, Field(discriminator="do")]
"""What stands in for a value that is not computed."""
