"""Policies: when x where x what instead, as frozen data that hashes, prints, and goes to and from YAML and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from dicompile.analysis import ModelStructure, Site, SiteKind, TokenWise
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan.action import REUSE, Action, Score, ScoreBase, Selection


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
        warmup: number of steps at the start that are always full.
        stretch: how much the interval changes over the run, unitless.
        dense: part of the run with an interval of its own.
        decide: "step": once for all blocks. "block": again in every block, as the reference code of ToCa does; where
            the interval changes, the first block is then full and the others are not.
    """

    interval: PositiveInt = 1
    counting: Literal["down", "up"] = "down"
    warmup: PositiveInt = 1
    stretch: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    dense: Window | None = None
    decide: Literal["step", "block"] = "step"

    def index(self, step: int, steps: int) -> int:
        """Step index s of the step-th call."""
        return steps - 1 - step if self.counting == "down" else step

    def full_steps(self, steps: int) -> tuple[tuple[bool, bool], ...]:
        """For each step: whether the first block is full, and whether the others are."""
        current, result = self.interval, []
        for step in range(steps):
            index = self.index(step, steps)
            first = step < self.warmup or index % current == 0
            if first:
                current = self._interval_at(index, steps)
            again = self.decide == "step" or step < self.warmup or index % current == 0
            result.append((first, first and again))
        return tuple(result)

    def _interval_at(self, index: int, steps: int) -> int:
        window = self.dense
        if window is not None and int(window.start * steps) <= index < int(window.end * steps):
            return window.interval
        factor = 1 + self.stretch - 2 * self.stretch * index / steps
        return max(1, int(np.rint(np.float32(self.interval / factor))))


class Line(_Data):
    """``start + slope * x``."""

    start: float = 1.0
    slope: float = 0.0

    def at(self, x: float) -> float:
        """Value at x."""
        return self.start + self.slope * x


class TokenScore(_Data):
    """How tokens are ranked for refreshing; see `dicompile.plan.action.Score`.

    Attributes:
        base: score base.
        age_weight: weight per reuse step since the last refresh, divided by the cadence's interval.
        grid_cell: edge of the cells of the token grid, 0 for no bonus.
        grid_bonus: multiple of its score that the best token of a cell gets on top.
        share_guidance: average the base over the two guidance halves of the batch.
    """

    base: Literal["attention", "entropy", "value-norm", "random"] = "attention"
    age_weight: float = 0.25
    grid_cell: NonNegativeInt = 0
    grid_bonus: float = 0.0
    share_guidance: bool = False


class Reuse(_Data):
    """Take the stored value of the site."""

    do: Literal["reuse"] = "reuse"


class Refresh(_Data):
    """Compute the highest-ranked tokens and keep the stored value of the others.

    The number of tokens is ``int(clamp(float32(ratio * by_step(q) * by_depth(d) * factor), 0, 1) * n)``; none means
    `Reuse`.

    Attributes:
        ratio: share of tokens before the factors.
        factor: factor of this kind of site.
        by_step: factor as a function of q = s / S.
        by_depth: factor as a function of the block's depth, 0 for the first and 1 for the last of its list.
        depth_denominator: divide the block number by this instead (27 in the reference code).
        score: how tokens are ranked.
    """

    do: Literal["refresh"] = "refresh"
    ratio: Annotated[float, Field(ge=0, le=1)]
    factor: float = 1.0
    by_step: Line = Line()
    by_depth: Line = Line()
    depth_denominator: PositiveInt | None = None
    score: TokenScore = TokenScore()

    def count(self, q: float, depth: tuple[int, int], tokens: int) -> int:
        """Number of tokens to refresh."""
        denominator = self.depth_denominator or max(depth[1] - 1, 1)
        share = self.ratio * self.by_step.at(q) * self.by_depth.at(depth[0] / denominator) * self.factor
        return int(np.clip(np.float32(share), np.float32(0), np.float32(1)) * tokens)


class Rule(_Data):
    """What sites do on steps that are not full; the first rule that names a site's kind wins.

    Attributes:
        sites: kinds of site; empty means all.
        do: what happens instead of computing.
    """

    sites: tuple[Literal["self-attention", "cross-attention", "joint-attention", "mlp", "parallel"], ...] = ()
    do: Annotated[Reuse | Refresh, Field(discriminator="do")]

    def applies_to(self, site: Site) -> bool:
        """True if the rule names the kind of `site`."""
        return not self.sites or site.kind.value in self.sites


class Policy(_Data):
    """A caching policy.

    Attributes:
        name: how it is called in plans and reports.
        cadence: which steps compute everything.
        rules: what happens on the other steps; a site that no rule names is computed.
        seed: of random scores.
    """

    name: str
    cadence: Cadence = Cadence()
    rules: tuple[Rule, ...] = ()
    seed: int = 0

    def action(self, site: Site, depth: tuple[int, int], step: int, steps: int) -> Action:
        """Action of a site on a step that is not full."""
        rule = next((rule for rule in self.rules if rule.applies_to(site)), None)
        if rule is None:
            return Action()
        if isinstance(rule.do, Reuse):
            return REUSE
        q = self.cadence.index(step, steps) / steps
        count = rule.do.count(q, depth, site.tokens.count)
        if count == 0:
            return REUSE
        score = rule.do.score
        return Action(
            tokens=Selection(
                Score(
                    base=ScoreBase(score.base),
                    age_weight=score.age_weight / self.cadence.interval,
                    grid_cell=score.grid_cell,
                    grid_bonus=score.grid_bonus,
                    share_guidance=score.share_guidance,
                ),
                count,
            )
        )

    def check_fits(self, structure: ModelStructure) -> None:
        """Raise if the policy asks for something that the model cannot do.

        Raises:
            PolicyDoesNotFit: a site to be refreshed mixes tokens, has no attention to be scored by, or shares it with
                a site that wants another score, or the token grid or batch does not allow the score.
        """
        refreshed = []
        for site in structure.sites:
            rule = next((rule for rule in self.rules if rule.applies_to(site)), None)
            if rule is not None and isinstance(rule.do, Refresh):
                self._check_refresh(structure, site, rule.do.score)
                refreshed.append((site, rule.do.score))
        self._check_one_score(structure, refreshed)

    def _check_refresh(self, structure: ModelStructure, site: Site, score: TokenScore) -> None:
        where = _where(site)
        if site.tokens.wise is not TokenWise.YES:
            raise PolicyDoesNotFit(
                f"policy {self.name!r} refreshes single tokens, which this branch does not allow",
                where=where,
                why=site.tokens.reason,
                fix="use a policy that reuses whole branches on this model, such as dicompile.FORA(interval=3)",
            )
        if score.base != "random":
            self._check_source(structure, site, score, where)
        if score.grid_cell:
            self._check_grid(structure.grid, site, score, where)
        if score.share_guidance and site.shape[0] % 2:
            raise PolicyDoesNotFit(
                f"policy {self.name!r} shares tokens between guidance halves, but the batch is {site.shape[0]}",
                where=where,
                why="the two halves of classifier-free guidance must be in one batch",
                fix="set share_guidance=False",
            )

    def _check_source(self, structure: ModelStructure, site: Site, score: TokenScore, where: str) -> None:
        source = score_source(structure, site, ScoreBase(score.base))
        if source is None:
            wanted = "cross-attention" if score.base == "entropy" else "self-attention"
            present = (s.kind.value for s in structure.sites_of(structure.blocks[site.block]))
            raise PolicyDoesNotFit(
                f"policy {self.name!r} ranks tokens by {score.base}, for which there is no {wanted} in the block",
                where=where,
                why=f"the block has {', '.join(present)}",
                fix="choose another score, for example score='random'",
            )
        if source.tokens.wise is TokenWise.NO:
            raise PolicyDoesNotFit(
                f"policy {self.name!r} ranks tokens by {score.base}, but the attention is not over the same tokens",
                where=where,
                why=source.tokens.reason,
                fix="choose another score, for example score='random'",
            )

    def _check_grid(self, grid: tuple[int, int] | None, site: Site, score: TokenScore, where: str) -> None:
        if grid is None:
            why = "the token grid is unknown"
        elif grid[0] * grid[1] != site.tokens.count:
            why = f"the branch has {site.tokens.count} tokens, the token grid is {grid[0]}x{grid[1]}"
        elif any(edge % score.grid_cell for edge in grid):
            why = f"the token grid is {grid[0]}x{grid[1]}"
        else:
            return
        raise PolicyDoesNotFit(
            f"policy {self.name!r} gives a bonus per {score.grid_cell}x{score.grid_cell} cell of tokens",
            where=where,
            why=why,
            fix="set grid_cell=0 to switch the bonus off",
        )

    def _check_one_score(self, structure: ModelStructure, refreshed: Sequence[tuple[Site, TokenScore]]) -> None:
        asked: dict[int, tuple[Site, TokenScore]] = {}
        for site, score in refreshed:
            source = score_source(structure, site, ScoreBase(score.base))
            if source is None:
                continue
            first, other = asked.setdefault(int(source.id), (site, score))
            shares_differ = score.base == "entropy" and score.share_guidance != other.share_guidance
            if score.base != other.base or shares_differ:
                raise PolicyDoesNotFit(
                    f"policy {self.name!r} asks two different scores of one attention",
                    where=_where(site),
                    why=f"site {source.id} keeps one score per token: {other.base} for site {first.id}, "
                    f"{score.base} for this one",
                    fix="rank both kinds of site by the same base, with the same share_guidance",
                )

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


def score_source(structure: ModelStructure, site: Site, base: ScoreBase) -> Site | None:
    """The attention site of the same block whose keys, values or map rank the tokens of `site`, or None."""
    kind = SiteKind.CROSS_ATTENTION if base is ScoreBase.ENTROPY else SiteKind.SELF_ATTENTION
    if base is ScoreBase.RANDOM:
        return None
    block = structure.blocks[site.block]
    return next((s for s in structure.sites_of(block) if s.kind is kind and s.stream == site.stream), None)


def _where(site: Site) -> str:
    return f"site {site.id}, {site.name} ({site.kind.value})"


def invalid_policy(source: str, error: ValidationError) -> InvalidPolicy:
    """The first complaint of pydantic as one of our errors."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidPolicy(f"unknown option {key!r}", where=source, fix="remove it, or check its spelling")
    return InvalidPolicy(
        f"option {key!r} cannot be {first['input']!r}", where=source, why=first["msg"], fix="see the policy's docstring"
    )
