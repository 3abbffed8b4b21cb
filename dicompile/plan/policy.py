"""Policies: when x where x what instead, as frozen data that hashes, prints, and goes to and from YAML and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from dicompile.analysis import Site
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan.action import Action, What


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise invalid_policy(type(self).__name__, error) from None


class Window(_Data):
    """A stretch of the schedule with an interval of its own.

    Attributes:
        start: first step index as a fraction of the number of steps.
        end: first step index after it, as a fraction.
        interval: steps from one full step to the next inside it.
    """

    start: Annotated[float, Field(ge=0, le=1)]
    end: Annotated[float, Field(ge=0, le=1)]
    interval: PositiveInt


class Cadence(_Data):
    """Which steps compute everything.

    With ``s`` the step index (counted as `counting` says), ``S`` the number of steps and ``q = s / S``, a step is full
    if it is among the first `warmup` ones or if ``s`` is a multiple of the interval set by the latest full step,
    ``round(interval / (1 + stretch * (1 - 2 q)))`` or that of `dense`.

    Attributes:
        interval: steps from one full step to the next; 1 computes always.
        counting: "down": s = S-1 .. 0, as DDIM code counts; "up": s = 0 .. S-1.
        anchor: "index": multiples of the interval are full; "last": every interval-th step after the latest full one.
        warmup: number of steps at the start that are always full.
        stretch: how much the interval changes over the run, unitless.
        dense: part of the run with an interval of its own.
        at: numbers of the full steps, counted from 0; then no other rule holds.
        decide: "step": once for all blocks. "block": again in every block, as the reference code of ToCa does; where
            the interval changes, the first block is then full and the others are not.
    """

    interval: PositiveInt = 1
    counting: Literal["down", "up"] = "down"
    anchor: Literal["index", "last"] = "index"
    warmup: PositiveInt = 1
    stretch: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    dense: Window | None = None
    at: tuple[NonNegativeInt, ...] = ()
    decide: Literal["step", "block"] = "step"

    def index(self, step: int, steps: int) -> int:
        """Step index s of the step-th call."""
        return steps - 1 - step if self.counting == "down" else step

    def moments(self, steps: int, begin: int = 0) -> tuple[Moment, ...]:
        """What every step of a run is.

        Args:
            steps: number of steps of the schedule.
            begin: step at which the run begins; the warmup follows it, everything else keeps its place.
        """
        current, latest, result = self.interval, begin, []
        for step in range(begin, steps):
            index = self.index(step, steps)
            warm = step - begin < self.warmup
            first = warm or self._residue(index, step - latest, current) == 0
            if self.at:
                first = step == begin or step in self.at
            if first:
                current, latest = self._interval_at(index, steps), step
            residue = self._residue(index, step - latest, current)
            again = self.decide == "step" or warm or residue == 0
            result.append(Moment(step, steps, index / steps, first, first and again, residue))
        return tuple(result)

    def _residue(self, index: int, since: int, interval: int) -> int:
        return (index if self.anchor == "index" else since) % interval

    def _interval_at(self, index: int, steps: int) -> int:
        window = self.dense
        if window is not None and int(window.start * steps) <= index < int(window.end * steps):
            return window.interval
        factor = 1 + self.stretch - 2 * self.stretch * index / steps
        return max(1, int(np.rint(np.float32(self.interval / factor))))


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a run, as a cadence sees it.

    Attributes:
        step: number, counted from 0.
        steps: number of steps of the run.
        q: step index over number of steps, counted as the cadence counts.
        first: whether the first block is full.
        others: whether the other blocks are.
        residue: step index modulo the current interval.
    """

    step: int
    steps: int
    q: float
    first: bool
    others: bool
    residue: int

    def is_full(self, block: int) -> bool:
        """Whether a block computes everything."""
        return self.first if block == 0 else self.others


class Line(_Data):
    """``start + slope * x``."""

    start: float = 1.0
    slope: float = 0.0

    def at(self, x: float) -> float:
        """Value at x."""
        return self.start + self.slope * x


BaseName = Literal[
    "attention",
    "entropy",
    "value-norm",
    "large-value-norm",
    "key-norm",
    "similarity",
    "norm",
    "random",
    "predicted",
]


class TokenScore(_Data):
    """How tokens are ranked for refreshing; see `dicompile.plan.action.Score`.

    Attributes:
        base: score base.
        age_weight: weight per reuse step since the last refresh, divided by the cadence's interval.
        grid_cell: edge of the cells of the token grid, 0 for no bonus.
        grid_bonus: multiple of its score that the best token of a cell gets on top.
        share_guidance: average the base over the two guidance halves of the batch.
    """

    base: BaseName = "attention"
    age_weight: float = 0.25
    grid_cell: NonNegativeInt = 0
    grid_bonus: float = 0.0
    share_guidance: bool = False


WhatName = Literal["core", "update", "attention", "stream"]


class Reuse(_Data):
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


class Forecast(_Data):
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


class Fitted(_Data):
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
        weights = self.weights[step]
        if not weights or len(weights) > len(stored):
            raise PolicyDoesNotFit(
                f"fitted weights for step {step + 1} are for {len(weights)} stored values, there are {len(stored)}",
                where="Fitted",
                why="weights were fitted for another cadence",
                fix="fit them again with dicompile.learn.fit_forecast for this cadence",
            )
        return Action((0.0, *weights), What(self.what))

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


class Refresh(_Data):
    """Compute the highest-ranked tokens and recall the others.

    The number of tokens is ``int(clamp(float32(ratio * by_step(q) * by_depth(d) * factor), 0, 1) * n)``; none means
    that all are recalled.

    Attributes:
        ratio: share of tokens before the factors.
        factor: factor of this kind of site.
        by_step: factor as a function of q = s / S.
        by_depth: factor as a function of the block's depth, 0 for the first and 1 for the last of its list.
        depth_denominator: divide the block number by this instead (27 in the reference code).
        score: how tokens are ranked.
        context: which attention the tokens see; see `dicompile.plan.action.Context`.
        otherwise: value of the other tokens. With `Reuse` refreshed tokens stay stored; beside forecasts they serve
            their own step only, so that the history stays one of full steps.
    """

    do: Literal["refresh"] = "refresh"
    ratio: Annotated[float, Field(ge=0, le=1)]
    factor: float = 1.0
    by_step: Line = Line()
    by_depth: Line = Line()
    depth_denominator: PositiveInt | None = None
    score: TokenScore = TokenScore()
    context: Literal["stored", "all", "kept"] = "stored"
    otherwise: Recall = Reuse()

    def count(self, q: float, depth: tuple[int, int], tokens: int) -> int:
        """Number of tokens to refresh."""
        denominator = self.depth_denominator or max(depth[1] - 1, 1)
        share = self.ratio * self.by_step.at(q) * self.by_depth.at(depth[0] / denominator) * self.factor
        return int(np.clip(np.float32(share), np.float32(0), np.float32(1)) * tokens)


class Origin(_Data):
    """Where a learned table comes from and what it was learned for; it holds for nothing else.

    Attributes:
        file: what messages call it.
        sites: labels of the sites that the rule names, "3.mlp", in order; empty if nobody wrote them down.
        timesteps: of the sampler, in calling order, as its scheduler counts them; empty if nobody wrote them down.
    """

    file: str
    sites: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()


class Table(_Data):
    """Compute what a table says, recall the rest; the cadence has no say.

    Attributes:
        compute: per step, one entry for each site that the rule names, in order.
        otherwise: value of the sites that are not computed.
        origin: of a learned table.
    """

    do: Literal["table"] = "table"
    compute: tuple[tuple[bool, ...], ...]
    otherwise: Recall = Reuse()
    origin: Origin | None = None


class TokenTable(_Data):
    """Refresh as many tokens as a table says; the cadence has no say.

    Attributes:
        counts: per step, tokens to compute of each site or span that the rule names, in order; all of them means that
            it is computed whole, none that it is reused.
        score: how tokens are ranked.
        context: which attention the tokens see.
        what: which value is stored.
        origin: of a learned table.
    """

    do: Literal["tokens"] = "tokens"
    counts: tuple[tuple[NonNegativeInt, ...], ...]
    score: TokenScore = TokenScore(base="predicted", age_weight=0.0)
    context: Literal["all", "kept"] = "all"
    what: WhatName = "update"
    origin: Origin | None = None


SiteName = Literal["self-attention", "cross-attention", "joint-attention", "mlp", "parallel", "block", "stack"]


class Rule(_Data):
    """What sites do on steps that are not full; the first rule that holds for a site wins.

    Attributes:
        sites: kinds of site; empty means all but spans. "block" is all that a block adds to a stream, "stack" all that
            the blocks add.
        when: only on steps whose index is odd, or even, within the current interval.
        cadence: which steps are full for these sites, instead of the policy's.
        do: what happens instead of computing.
    """

    sites: tuple[SiteName, ...] = ()
    when: Literal["always", "odd", "even"] = "always"
    cadence: Cadence | None = None
    do: Annotated[Reuse | Forecast | Fitted | Refresh | Table | TokenTable, Field(discriminator="do")]

    def names(self, site: Site) -> bool:
        """True if the rule is for the kind of `site`."""
        return site.kind.value in self.sites if self.sites else not site.kind.is_span

    @property
    def recall(self) -> Reuse | Forecast | Fitted | TokenTable:
        """What says which stored value stands in for one that is not computed."""
        return self.do.otherwise if isinstance(self.do, (Refresh, Table)) else self.do

    def holds(self, moment: Moment) -> bool:
        """True if the rule is for this step."""
        return self.when == "always" or (moment.residue % 2 == 1) == (self.when == "odd")


class Elsewhere(_Data):
    """A policy that takes over on models of another kind.

    Attributes:
        sites: kinds of site that such a model has, all of them; empty for any model that nothing else fits.
        grid_axes: axes of its token grid (3 for films), or None for any.
        policy: what it gets.
    """

    sites: tuple[SiteName, ...] = ()
    grid_axes: PositiveInt | None = None
    policy: Policy


class Policy(_Data):
    """A caching policy.

    Attributes:
        name: how it is called in plans and reports.
        cadence: which steps compute everything.
        rules: what happens on the other steps; a site that no rule names is computed.
        seed: of random scores.
        predictor: file of the network that predicts importance, where a rule ranks tokens by it.
        predictor_cost: what one prediction costs, in blocks of the model.
        where_mixed: what becomes of a branch whose tokens a rule refreshes, but which mixes them: "refuse" the policy
            or "reuse" the branch whole, which the plan then says.
        elsewhere: settings of the same method for other kinds of model; see `choose_setting`.
    """

    name: str
    cadence: Cadence = Cadence()
    rules: tuple[Rule, ...] = ()
    seed: int = 0
    predictor: str | None = None
    predictor_cost: Annotated[float, Field(ge=0)] = 0.0
    where_mixed: Literal["refuse", "reuse"] = "refuse"
    elsewhere: tuple[Elsewhere, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what JSON and YAML hold."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Any, source: str = "policy") -> Policy:
        """Policy from plain data.

        Raises:
            InvalidPolicy: a key is unknown or a value is outside its range; the text names it.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid_policy(source, error) from None
        except TypeError as error:  # pydantic calls our constructors with keywords
            raise InvalidPolicy("an option's name is not text", where=source, why=str(error)) from None

    @classmethod
    def from_yaml(cls, text: str, source: str = "YAML") -> Policy:
        """Policy from YAML text.

        Raises:
            InvalidPolicy: the text is not valid YAML, or see `from_dict`.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise InvalidPolicy(
                "this is not valid YAML", where=source, why=why, fix="compare policy.to_yaml()"
            ) from None
        return cls.from_dict(data, source)

    @classmethod
    def from_json(cls, text: str, source: str = "JSON") -> Policy:
        """Policy from JSON text; YAML would read its escapes of characters beyond the basic plane as two.

        Raises:
            InvalidPolicy: the text is not valid JSON, or see `from_dict`.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidPolicy("this is not valid JSON", where=source, why=str(error)) from None
        return cls.from_dict(data, source)


Elsewhere.model_rebuild()


def polynomial_weights(stored: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """Weights of stored values, newest first, in the polynomial through them, at `step` (Lagrange's form).

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the polynomial is evaluated.
        order: its degree at most.
    """
    times = stored[: order + 1]
    return tuple(math.prod((step - other) / (time - other) for other in times if other != time) for time in times)


def taylor_weights(stored: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """Weights of stored values, newest first, in a Taylor series at `step`.

    Args:
        stored: steps at which values were stored, newest first; at least one.
        step: where the series is evaluated.
        order: highest derivative. The k-th one is the difference of the last two of order k - 1 over the steps between
            the last two stored values, however the older ones are spaced, as in the reference code of TaylorSeer.
    """
    times = list(stored[: order + 1])[::-1]
    older: list[np.ndarray] = []
    for number, time in enumerate(times):
        newer = [np.eye(len(times))[number]]
        for lower in older[:order]:
            newer.append((newer[-1] - lower) / (time - times[number - 1]))
        older = newer
    distance = step - times[-1]
    weights = sum(factor * distance**k / math.factorial(k) for k, factor in enumerate(older))
    return tuple(float(weight) for weight in np.asarray(weights)[::-1])


def invalid_policy(source: str, error: ValidationError) -> InvalidPolicy:
    """The first complaint of pydantic as one of our errors."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidPolicy(f"unknown option {key!r}", where=source, fix="remove it, or check its spelling")
    return InvalidPolicy(
        f"option {key!r} cannot be {first['input']!r}", where=source, why=first["msg"], fix="see the policy's docstring"
    )
