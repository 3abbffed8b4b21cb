"""Policy x structure -> one action per step and site: what the rules say, spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dicompile.analysis import ModelStructure, Site, SiteId, SiteKind, Span, TokenWise
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan.action import COMPUTE, SKIP, Action, Context, Score, ScoreBase, Selection, What
from dicompile.plan.policy import Cadence, Fitted, Moment, Policy, Refresh, Rule, Table, TokenScore, TokenTable
from dicompile.plan.tables import check_table

Row = tuple[Action, ...]
"""One action per site, then one per span."""


def make_rows(
    structure: ModelStructure, policy: Policy, steps: int, dropped: frozenset[int] = frozenset(), begin: int = 0
) -> list[Row]:
    """Actions of a run.

    Args:
        structure: the model.
        policy: the caching policy.
        steps: number of steps of the schedule.
        dropped: sites and spans that are computed at every step, whatever the policy says.
        begin: step of the schedule at which the run begins, as in image to image; everything is computed there.

    Raises:
        PolicyDoesNotFit: a table is for another number of steps or sites, or recalls what nobody stored.
    """
    return _Rows(structure, policy, steps, dropped, begin).rows()


class _Rows:
    """Walks through the steps and remembers when each site was computed last."""

    def __init__(
        self, structure: ModelStructure, policy: Policy, steps: int, dropped: frozenset[int], begin: int
    ) -> None:
        self.structure, self.policy, self.steps, self.dropped = structure, policy, steps, dropped
        self.begin = begin
        self.stored: list[list[int]] = [[] for _ in structure.everything]
        self.moments: dict[Cadence, tuple[Moment, ...]] = {}
        named = {rule: [site for site in structure.everything if rule.names(site)] for rule in policy.rules}
        self.positions = {rule: {site.id: n for n, site in enumerate(sites)} for rule, sites in named.items()}
        self.mixed = reused_whole(structure, policy)
        for rule in policy.rules:
            check_table(policy, rule, named[rule], steps)

    def rows(self) -> list[Row]:
        """One row per step of the run."""
        result = []
        for step in range(self.begin, self.steps):
            spans = [self.span(span, step) for span in self.structure.spans]
            covered = {
                int(i)
                for span, action in zip(self.structure.spans, spans, strict=True)
                if not action.is_full and (not action.computes or action.tokens is not None)
                for i in span.inside
            }
            row = (*(self.site(site, step, site.id in covered) for site in self.structure.sites), *spans)
            for stored, action in zip(self.stored, row, strict=True):
                if action.is_full:
                    stored.insert(0, step)
            result.append(row)
        return result

    def site(self, site: Site, step: int, covered: bool) -> Action:
        """Action of a leaf; inside a reused span it is skipped, but for a first block that decides by itself."""
        if not covered:
            return self.by_rules(site, step)
        moment = self.moment(self.policy.cadence, step)
        return COMPUTE if site.block == 0 and moment.first and not moment.others else SKIP

    def span(self, span: Span, step: int) -> Action:
        """Action of a span; of a reused stream only the last values are ever read."""
        action = self.by_rules(span, step)
        return SKIP if action.what is What.STREAM and not action.computes and not span.is_last else action

    def by_rules(self, site: Site, step: int) -> Action:
        """What the first rule that holds says; a site that no rule names is computed."""
        enters = step == self.begin > 0  # where the policy's table may reuse already
        for rule in () if enters or site.id in self.dropped else self.policy.rules:
            if not rule.names(site):
                continue
            cadence = rule.cadence or self.policy.cadence
            moment = self.moment(cadence, step)
            if isinstance(rule.do, Table):
                return (
                    COMPUTE if rule.do.compute[step][self.positions[rule][site.id]] else self.recall(rule, site, step)
                )
            if isinstance(rule.do, TokenTable):
                return self.by_count(rule.do, rule.do.counts[step][self.positions[rule][site.id]], site, step)
            if moment.others if site.kind is SiteKind.STACK else moment.is_full(site.block):
                return COMPUTE
            if rule.holds(moment):
                return self.instead(rule, site, moment, cadence.interval)
        return COMPUTE

    def instead(self, rule: Rule, site: Site, moment: Moment, interval: int) -> Action:
        """Action on a step that is not full."""
        recalled = self.recall(rule, site, moment.step)
        if not isinstance(rule.do, Refresh) or site.id in self.mixed:
            return recalled
        count = rule.do.count(moment.q, self.structure.blocks[site.block].depth, site.tokens.count)
        if count == 0:
            return recalled
        selection = Selection(score_of(rule.do.score, interval), count, Context(rule.do.context))
        return replace(recalled, weights=(1.0, *recalled.weights[1:]), tokens=selection)

    def by_count(self, table: TokenTable, count: int, site: Site, step: int) -> Action:
        """Action for a number of tokens."""
        if count >= site.tokens.count:
            return COMPUTE
        self._check_stored(site, step)
        if count == 0 or site.id in self.mixed:
            return Action((0.0, 1.0), What(table.what))
        return Action.refresh(Selection(score_of(table.score, 1), count, Context(table.context)), What(table.what))

    def recall(self, rule: Rule, site: Site, step: int) -> Action:
        """Action that takes what is stored."""
        self._check_stored(site, step)
        recall = rule.recall
        assert not isinstance(recall, TokenTable)
        if self.begin and isinstance(recall, Fitted):
            recall = recall.for_stored(self.stored[site.id], step)
        return recall.action(self.stored[site.id], step)

    def moment(self, cadence: Cadence, step: int) -> Moment:
        """What `step` is to a cadence."""
        if cadence not in self.moments:
            self.moments[cadence] = cadence.moments(self.steps, self.begin)
        return self.moments[cadence][step - self.begin]

    def _check_stored(self, site: Site, step: int) -> None:
        if not self.stored[site.id]:
            raise PolicyDoesNotFit(
                f"policy {self.policy.name!r} reuses site {site.id} at step {step + 1}, before it was ever computed",
                where=site.name,
                fix="compute everything at the first step",
            )


def score_of(score: TokenScore, interval: int) -> Score:
    """The score of actions for the score of a policy; ages count in intervals."""
    return Score(
        base=ScoreBase(score.base),
        age_weight=score.age_weight / interval,
        grid_cell=score.grid_cell,
        grid_bonus=score.grid_bonus,
        share_guidance=score.share_guidance,
    )


def score_source(structure: ModelStructure, site: Site, base: ScoreBase) -> Site | None:
    """The attention site of the same block whose keys, values or map rank the tokens of `site`, or None."""
    if not base.needs_attention or site.kind.is_span:
        return None
    wanted = (SiteKind.CROSS_ATTENTION,) if base is ScoreBase.ENTROPY else OVER_OWN_TOKENS
    block = structure.blocks[site.block]
    return next((s for s in structure.sites_of(block) if s.kind in wanted and s.stream == site.stream), None)


OVER_OWN_TOKENS = (SiteKind.SELF_ATTENTION, SiteKind.JOINT_ATTENTION, SiteKind.PARALLEL)


def rule_for(policy: Policy, site: Site, *kinds: type) -> Rule | None:
    """The first rule of these kinds of action that names a site."""
    return next((rule for rule in policy.rules if rule.names(site) and isinstance(rule.do, kinds)), None)


def refreshed(structure: ModelStructure, policy: Policy) -> Sequence[tuple[Site, Refresh | TokenTable]]:
    """Sites and spans of which single tokens may be computed, and how; those that are reused whole instead left out."""
    mixed = reused_whole(structure, policy)
    return [(site, do) for site, do in _asked_to_refresh(structure, policy) if site.id not in mixed]


def reused_whole(structure: ModelStructure, policy: Policy) -> dict[SiteId, str]:
    """Sites and spans that a rule refreshes but which mix tokens, with the reason, if the policy reuses such."""
    if policy.where_mixed == "refuse":
        return {}
    reasons = ((site, why_not_refreshed(site, do)) for site, do in _asked_to_refresh(structure, policy))
    return {site.id: reason for site, reason in reasons if reason}


def why_not_refreshed(site: Site, do: Refresh | TokenTable) -> str:
    """What forbids to compute chosen tokens of a site or span alone; empty if nothing does."""
    fact = site.tokens
    # A branch of attention over its own tokens can be refreshed where the rule says which attention they see.
    opened = fact.stored if do.context == "stored" else fact.wise is TokenWise.QUERIES
    if site.kind.is_span and do.context == "stored" and fact.wise is TokenWise.QUERIES:
        return STORES_NO_ATTENTION
    if fact.wise is TokenWise.YES or (opened and (site.kind.is_span or site.kind is SiteKind.PARALLEL)):
        return ""
    return fact.reason or "what mixes its tokens is stored at other steps only"


STORES_NO_ATTENTION = "a span stores no attention"


def _asked_to_refresh(structure: ModelStructure, policy: Policy) -> Sequence[tuple[Site, Refresh | TokenTable]]:
    found = ((site, rule_for(policy, site, Refresh, TokenTable)) for site in structure.everything)
    return [(site, rule.do) for site, rule in found if rule is not None and isinstance(rule.do, (Refresh, TokenTable))]
