"""Policies: when x where x what instead, as frozen data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, InstanceOf, NonNegativeInt, PositiveInt, model_validator

from dicompile.analysis import Probe, Site, Trunk
from dicompile.errors import InvalidPolicy
from dicompile.plan.cadence import Cadence, Moment
from dicompile.plan.frozen import Frozen, Origin
from dicompile.plan.gate import Gate
from dicompile.plan.predictor import Predictor
from dicompile.plan.recall import Aligned, AnyRecall, Forecast, Recall, Reuse, Velocity, WhatName
from dicompile.plan.schedule import Stint, follow_each_other
from dicompile.plan.yaml_json import YamlJson


class Line(Frozen):
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


class TokenScore(Frozen):
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


class Refresh(Frozen):
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


class Propagate(Frozen):
    """Compute one random token of every cluster of tokens that are alike, and let the others follow it part of the way.

    Clusters are found where the last branch of the kind on a stream is computed whole, by k-means on the stream behind
    it. At the steps between, a computed token takes the place of its zeroth order in the stored history, and that of
    every other token of its cluster moves `share` of the way to it; differences of the history, and so the higher
    orders, stay. What `otherwise` makes of the new history is the value. The change stays for later steps. Tokens that
    no latent is among (text) are computed likewise, and move no others.

    Attributes:
        clusters: how many, per sample and stream.
        share: of the way that the others of a cluster move, unitless.
        rounds: most rounds of k-means; a sample stops when its means move by no more than 1e-4 of themselves.
        otherwise: what recalls.

    Reference:
        Zheng et al., Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven
        Feature Caching, arXiv 2509.10312.
    """

    do: Literal["propagate"] = "propagate"
    clusters: Annotated[int, Field(ge=2)] = 16
    share: Annotated[float, Field(ge=0, le=1)] = 0.005
    rounds: PositiveInt = 100
    otherwise: Annotated[Reuse | Forecast, Field(discriminator="do")] = Forecast()

    @property
    def context(self) -> Literal["stored"]:
        """Which attention the tokens see."""
        return "stored"


class Table(Frozen):
    """Compute what a table says, recall the rest; the cadence has no say.

    Attributes:
        compute: per step, one entry for each site that the rule names, in order, or a single one for all of them.
        otherwise: value of the sites that are not computed.
        origin: of a learned table.
    """

    do: Literal["table"] = "table"
    compute: tuple[tuple[bool, ...], ...]
    otherwise: Recall = Reuse()
    origin: Origin | None = None

    def computes(self, step: int, place: int) -> bool:
        """Whether a site is computed; `place` is that among the sites which the rule names."""
        row = self.compute[step]
        return row[place if len(row) > 1 else 0]


class TokenTable(Frozen):
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


Share = Annotated[float, Field(ge=0, le=1)]
ALL = (0.0, 1.0)
"""From the first to the last."""

SiteName = Literal[
    "self-attention", "cross-attention", "joint-attention", "mlp", "parallel", "unknown", "block", "stack", "model"
]  # fmt: skip


class Rule(Frozen):
    """What sites do on steps that are not full; the first rule that holds for a site wins.

    Attributes:
        sites: kinds of site; empty means all but spans. "block" is all that a block adds to a stream, "stack" all that
            the blocks add, "model" all that the model adds to its latent.
        when: only on steps whose index is odd, or even, within the current interval.
        during: only in this part of the schedule, from one share of its steps to another, each rounded to a step.
        blocks: only in this part of the model, from one share of its blocks to another, each rounded to a block.
        cadence: which steps are full for these sites, instead of the policy's.
        do: what happens instead of computing.
    """

    sites: tuple[SiteName, ...] = ()
    when: Literal["always", "odd", "even"] = "always"
    during: tuple[Share, Share] = ALL
    blocks: tuple[Share, Share] = ALL
    cadence: Cadence | None = None
    do: Annotated[AnyRecall | Refresh | Propagate | Table | TokenTable, Field(discriminator="do")]

    def names(self, site: Site, blocks: int) -> bool:
        """True if the rule is for `site`, of a model with so many blocks."""
        if not (site.kind.value in self.sites if self.sites else not site.kind.is_span):
            return False
        first, end = (round(share * blocks) for share in self.blocks)
        return self.blocks == ALL or first <= site.block < end

    @model_validator(mode="after")
    def _check_blocks(self) -> Rule:
        whole = [name for name in self.sites if name in ("stack", "model")]
        if whole and self.blocks != ALL:
            raise InvalidPolicy(
                f"a rule for the whole {whole[0]} is for some blocks only",
                where="blocks",
                why=f"what the {whole[0]} adds is what all of its blocks add",
                fix="name blocks, Rule(sites=('block',), blocks=(0, 0.5), ...), or set 'outside' of the policy",
            )
        return self

    @property
    def recall(self) -> Recall | TokenTable:
        """What says which stored value stands in for one that is not computed."""
        return self.do.otherwise if isinstance(self.do, (Refresh, Propagate, Table)) else self.do

    def holds(self, moment: Moment) -> bool:
        """True if the rule is for this step."""
        first, end = (round(share * moment.steps) for share in self.during)
        is_its_turn = self.when == "always" or (moment.residue % 2 == 1) == (self.when == "odd")
        return is_its_turn and first <= moment.step < end


class Elsewhere(Frozen):
    """A policy that takes over on models of another kind.

    Attributes:
        sites: kinds of site that such a model has, all of them; empty for any model that nothing else fits.
        grid_axes: axes of its token grid (3 for films), or None for any.
        policy: what it gets.
    """

    sites: tuple[SiteName, ...] = ()
    grid_axes: PositiveInt | None = None
    policy: Policy

    @property
    def kind_of_model(self) -> str:
        """One line about the models that it is for; empty for any."""
        return ", ".join(self.sites) + (f" on {self.grid_axes} axes" if self.grid_axes else "")


class Policy(YamlJson):
    """A caching policy.

    Attributes:
        name: how it is called in plans and reports.
        cadence: which steps compute everything.
        rules: what happens on the other steps; a site that no rule names is computed.
        seed: of random scores.
        predictor: what predicts importance, where a rule ranks tokens by it: its file, or the predictor itself.
        predictor_cost: what one prediction costs, in blocks of the model.
        adapters: numbers in the LoRA weights that come with the predictor, and are added to layers of the last blocks
            at steps that cache anything of a block; 0 if there are none.
        where_mixed: what becomes of a branch whose tokens a rule refreshes, but which mixes them: "refuse" the policy
            or "reuse" the branch whole, which the plan then says.
        outside: blocks at the start, and at the end, that run at every step: no rule is for their sites, and what "the
            stack" adds is what the others do.
        elsewhere: settings of the same method for other kinds of model; see `choose_setting`.
        stints: of a policy for a pipeline with several denoisers: who has which steps, in order. Each of them remembers
            nothing of the others, and a call at steps of another one is refused.
    """

    name: str
    cadence: Cadence = Cadence()
    rules: tuple[Rule, ...] = ()
    seed: int = 0
    predictor: str | InstanceOf[Predictor] | None = None
    predictor_cost: Annotated[float, Field(ge=0)] = 0.0
    adapters: NonNegativeInt = 0
    where_mixed: Literal["refuse", "reuse"] = "refuse"
    outside: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    elsewhere: tuple[Elsewhere, ...] = ()
    stints: tuple[Stint, ...] = ()

    @model_validator(mode="after")
    def _check_stints(self) -> Policy:
        if self.stints and any(isinstance(rule.recall, Velocity) for rule in self.rules):
            raise InvalidPolicy(
                f"policy {self.name!r} has stints, and weighs velocities by the levels of noise around them",
                where="stints",
                why="at the last step of a denoiser the next level is another one's",
                fix="use another recall, or leave out stints",
            )
        if not follow_each_other(self.stints):
            raise InvalidPolicy(
                f"policy {self.name!r} has stints that do not follow each other: {', '.join(map(str, self.stints))}",
                where="stints",
                why="every step is one denoiser's, and none comes back",
                fix="let each begin where the one before ends",
            )
        return self

    @model_validator(mode="after")
    def _check_gate(self) -> Policy:
        if self.gate is not None:
            check_gated(self)
        if self.is_aligned and (self.gate is None or not self.gate.watches_blocks):
            raise InvalidPolicy(
                f"policy {self.name!r} aligns what it recalls with what the first blocks add, and does not watch them",
                where="rules",
                fix="give its cadence a Gate(probe='stream', depth=1, ...)",
            )
        for other in self.elsewhere:
            if other.policy.trunk != self.trunk:
                raise InvalidPolicy(
                    f"policy {self.name!r} has a setting {other.policy.name!r} with another probe or other blocks "
                    "outside",
                    where="elsewhere",
                    why="which blocks are the stack, and what is watched, is analysed once for all settings",
                    fix="give all settings the same 'outside', and the same probe or none",
                )
        return self

    @model_validator(mode="after")
    def _check_partner(self) -> Policy:
        waits = self.gate is not None and self.gate.probe == "partner"
        if any((rule.recall.what == "difference") != waits for rule in self.rules):
            raise InvalidPolicy(
                f"policy {self.name!r} waits for a guidance partner, but does not recall its difference to it"
                if waits
                else f"policy {self.name!r} recalls a difference to a guidance partner, but waits for none",
                where="rules",
                fix="Gate(probe='partner', leads='cond') and Rule(sites=('model',), do=Reuse(what='difference'))",
            )
        return self

    @model_validator(mode="after")
    def _check_outside(self) -> Policy:
        if self.outside != (0, 0) and any("model" in rule.sites for rule in self.rules):
            raise InvalidPolicy(
                f"policy {self.name!r} has blocks that run at every step, and a rule for the whole model",
                where="outside",
                why="where the whole model is recalled, none of its blocks runs",
                fix="leave 'outside' out, or recall what the blocks between add: Rule(sites=('stack',), ...)",
            )
        return self

    @property
    def gate(self) -> Gate | None:
        """What decides about steps while sampling, if anything does."""
        return self.cadence.gate

    def per_sample(self, halves: Literal["", "uncond-cond", "cond-uncond"] = "") -> Policy:
        """The same policy, whose gate decides about every sample of a batch by itself; see `dicompile.Gate`.

        Args:
            halves: which guidance half comes first where one call has both; those of a picture decide together.

        Raises:
            InvalidPolicy: it has no gate, or one that waits for a guidance partner.
        """
        if self.gate is None:
            raise InvalidPolicy(
                f"policy {self.name!r} decides nothing while sampling",
                where="Policy.per_sample",
                why="its plan holds for every sample",
                fix="use it as it is, for any batch",
            )
        gate = Gate(**{**dict(self.gate), "decides": "sample", "halves": halves})
        cadence = self.cadence.model_copy(update={"gate": gate})
        return self.model_copy(update={"name": f"{self.name}-per-sample", "cadence": cadence})

    @property
    def is_aligned(self) -> bool:
        """True if it recalls by what the first blocks add."""
        return any(isinstance(rule.recall, Aligned) for rule in self.rules)

    @property
    def trunk(self) -> Trunk:
        """What has to be known of a model: which of its blocks run at every step, and what is watched or added."""
        watches_output = self.gate is not None and self.gate.relative_to == "output"
        return Trunk(
            *self.outside,
            None if self.gate is None or self.gate.probe in ("partner", "forecast") else Probe(self.gate.probe),
            watches_output or any("model" in rule.sites for rule in self.rules),
            0 if self.gate is None else self.gate.depth or 0,
            self.is_aligned,
        )

    def of(self, component: str) -> Policy:
        """What one denoiser of a pipeline gets: all of it, or its own stint.

        Raises:
            InvalidPolicy: the policy has steps for others alone.
        """
        if not self.stints:
            return self
        own = tuple(stint for stint in self.stints if stint.component == component)
        if not own:
            raise InvalidPolicy(
                f"policy {self.name!r} has no steps for {component!r}",
                where="Policy.of",
                fix=f"ask for one of: {', '.join(stint.component for stint in self.stints)}",
            )
        return self.model_copy(update={"stints": own})

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what JSON and YAML hold.

        Raises:
            InvalidPolicy: its predictor is an object, of which no file is known.
        """
        try:
            return super().to_dict()
        except ValueError:  # as pydantic reports an object that is no plain data
            raise InvalidPolicy(
                f"policy {self.name!r} cannot be written",
                where="predictor",
                why="its predictor is an object, and plain data can only name the file of one",
                fix="predictor.save('predictor.safetensors'), then TokenCache('predictor.safetensors')",
            ) from None


def check_gated(policy: Policy) -> None:
    """Raise if a policy with a gate asks for what has to be known before the run.

    Raises:
        InvalidPolicy: blocks decide by themselves, or a rule has a cadence or a table of its own, holds at some steps
            only, or refreshes tokens.
    """
    reasons = [("its blocks decide by themselves", policy.cadence.decide == "block")]
    for rule in policy.rules:
        reasons += [
            ("one of its rules has a cadence of its own", rule.cadence is not None),
            (f"one of its rules holds at {rule.when} steps only", rule.when != "always"),
            ("one of its rules holds in a part of the run only", rule.during != ALL),
            (
                f"one of its rules does {rule.do.do!r}",
                rule.do.do not in ("reuse", "forecast", "align", "weighted-bands"),
            ),
        ]
    if policy.gate is not None and policy.gate.verifies:
        spans = any(site in ("stack", "model") for rule in policy.rules for site in rule.sites)
        reasons += [
            ("nothing enters the last block where more than that is recalled as a whole", spans),
            ("the last block, which it verifies, runs at every step", policy.outside[1] > 0),
        ]
    for reason, holds in reasons:
        if holds:
            raise InvalidPolicy(
                f"policy {policy.name!r} has a gate, but {reason}",
                where="cadence.gate",
                why="a gate decides once for the whole step, and which steps are full is known only then",
                fix="leave the gate out, or give it rules of Reuse, Forecast, Aligned and WeightedBands alone",
            )


Elsewhere.model_rebuild()
