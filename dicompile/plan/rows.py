"""Policy x structure -> one action per step and site: what the rules say, spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dicompile.analysis import ModelStructure, Site, SiteKind, Span
from dicompile.capture import Role
from dicompile.plan.action import COMPUTE, SKIP, Action, Clusters, Context, Score, ScoreBase, Selection, What
from dicompile.plan.cadence import Cadence, Moment
from dicompile.plan.fits import check_stored, check_table, named_by, reused_whole
from dicompile.plan.recall import AnyRecall, DuringRun, Fitted, Forecast, Velocity, WeightedBands
from dicompile.plan.schema import Policy, Propagate, Refresh, Rule, Table, TokenScore, TokenTable

Row = tuple[Action, ...]
"""One action per site, then one per span."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A step at which a gate decides; it computes everything if the probe has drifted too far.

    Attributes:
        recalled: what the step does otherwise.
    """

    recalled: Row


def make_rows(
    structure: ModelStructure,
    policy: Policy,
    steps: int,
    dropped: frozenset[int] = frozenset(),
    run: range | None = None,
    timesteps: tuple[float, ...] = (),
) -> list[Row | Gated]:
    """Actions of a run.

    Args:
        structure: the model.
        policy: the caching policy.
        steps: number of steps of the schedule.
        dropped: sites and spans that are computed at every step, whatever the policy says.
        run: numbers of the steps of the run, if not all: it may begin in the middle, as in image to image, and
            everything is computed there; or leave the last ones to another denoiser.
        timesteps: of the run, if they are known.

    Raises:
        PolicyDoesNotFit: a table is for another number of steps or sites, or recalls what nobody stored.
    """
    return _Rows(structure, policy, steps, dropped, range(steps) if run is None else run, timesteps).rows()


class _Rows:
    """Walks through the steps and remembers when each site was computed last."""

    def __init__(
        self,
        structure: ModelStructure,
        policy: Policy,
        steps: int,
        dropped: frozenset[int],
        run: range,
        timesteps: tuple[float, ...],
    ) -> None:
        self.structure, self.policy, self.steps = structure, policy, steps
        self.run, self.begin, self.timesteps = run, run.start, timesteps
        self.always = dropped | outside(structure, policy)
        self.watched = outside(structure, policy) & {int(site.id) for site in structure.sites}
        probe = structure.probe
        if probe is not None and probe.id in dropped:  # nothing tells what has drifted
            self.always |= {int(site.id) for site in structure.everything}
        self.stored: list[list[int]] = [[] for _ in structure.everything]
        self.possible: list[list[int]] = [[] for _ in structure.everything]
        self.moments: dict[Cadence, tuple[Moment, ...]] = {}
        named = [named_by(rule, structure) for rule in policy.rules]
        self.places = [{site.id: place for place, site in enumerate(sites)} for sites in named]
        self.mixed = reused_whole(structure, policy)
        for rule, sites in zip(policy.rules, named, strict=True):
            check_table(policy, rule, sites, steps)

    def rows(self) -> list[Row | Gated]:
        """One row per step of the run; on what a step may store if its gate decides so, forecasts alone count."""
        result: list[Row | Gated] = []
        for step in self.run:
            row = self.row(step)
            if self.moment(self.policy.cadence, step).gated and not all(action.is_full for action in row):
                result.append(Gated(row))
                for possible in self.possible:
                    possible.insert(0, step)
                continue
            for stored, possible, action in zip(self.stored, self.possible, row, strict=True):
                if action.is_full:
                    stored.insert(0, step)
                    possible.insert(0, step)
            result.append(row)
        return result

    def row(self, step: int) -> Row:
        """What the rules say about a step."""
        named = {int(span.id): self.by_rules(span, step) for span in self.structure.spans}
        spans = [SKIP if self.is_unread(span, named) else named[span.id] for span in self.structure.spans]
        covered = {
            int(i)
            for span, action in zip(self.structure.spans, spans, strict=True)
            if not action.is_full and (not action.computes or action.tokens is not None)
            for i in span.inside
        } - self.watched
        return (*(self.site(site, step, site.id in covered) for site in self.structure.sites), *spans)

    def site(self, site: Site, step: int, covered: bool) -> Action:
        """Action of a leaf; inside a reused span it is skipped, but for a first block that decides by itself."""
        if not covered:
            return self.by_rules(site, step)
        moment = self.moment(self.policy.cadence, step)
        return COMPUTE if site.block == 0 and moment.first and not moment.others else SKIP

    def is_unread(self, span: Span, named: Mapping[int, Action]) -> bool:
        """True for a recalled stream that leads to nothing but other recalled ones.

        Args:
            span: whose stream.
            named: what the rules say of all spans.
        """
        if not _recalls_stream(named[span.id]) or span.is_last:
            return False
        if span.kind is SiteKind.STACK:
            return True  # it joins one that is recalled as well
        following = [s for s in self.structure.spans if s.kind is SiteKind.BLOCK and s.block == span.block + 1]
        readers = [s for s in following if s.stream == span.stream] or following
        return bool(readers) and all(_recalls_stream(named[reader.id]) for reader in readers)

    def by_rules(self, site: Site, step: int) -> Action:
        """What the first rule that holds says; a site that no rule names is computed."""
        enters = step == self.begin > 0  # where the policy's table may reuse already
        rules = zip(self.policy.rules, self.places, strict=True)
        for rule, places in () if enters or site.id in self.always else rules:
            place = places.get(site.id)
            if place is None:
                continue
            cadence = rule.cadence or self.policy.cadence
            moment = self.moment(cadence, step)
            if isinstance(rule.do, Table):
                return COMPUTE if rule.do.computes(step, place) else self.recall(rule, site, step, place)
            if isinstance(rule.do, TokenTable):
                return self.by_count(rule.do, rule.do.counts[step][place], site, step)
            if moment.others if site.kind in (SiteKind.STACK, SiteKind.MODEL) else moment.is_full(site.block):
                return COMPUTE
            if rule.holds(moment):
                return self.instead(rule, site, moment, cadence.interval, place)
        return COMPUTE

    def instead(self, rule: Rule, site: Site, moment: Moment, interval: int, place: int) -> Action:
        """Action on a step that is not full."""
        recalled = self.recall(rule, site, moment.step, place)
        if isinstance(rule.do, Propagate) and site.id not in self.mixed:
            return self.propagated(rule.do, recalled, site)
        if not isinstance(rule.do, Refresh) or site.id in self.mixed:
            return recalled
        count = rule.do.count(moment.q, self.structure.blocks[site.block].depth, site.tokens.count)
        if count == 0:
            return recalled
        selection = Selection(score_of(rule.do.score, interval), count, Context(rule.do.context))
        return replace(recalled, weights=(1.0, *recalled.weights[1:]), tokens=selection)

    def propagated(self, rule: Propagate, recalled: Action, site: Site) -> Action:
        """Action where one token of every cluster is computed; those of text move no others."""
        streams = self.structure.streams
        is_text = any(stream.id == site.stream and Role.LATENT not in stream.roles for stream in streams)
        clusters = Clusters(rule.clusters, rule.rounds, 0.0 if is_text else rule.share)
        selection = Selection(Score(ScoreBase.CLUSTER, clusters=clusters), rule.clusters)
        return replace(recalled, weights=(1.0, *recalled.weights[1:]), tokens=selection)

    def by_count(self, table: TokenTable, count: int, site: Site, step: int) -> Action:
        """Action for a number of tokens."""
        if count >= site.tokens.count:
            return COMPUTE
        check_stored(self.policy, site, table, self.stored[site.id], step)
        if count == 0 or site.id in self.mixed:
            return Action((0.0, 1.0), What(table.what))
        return Action.refresh(Selection(score_of(table.score, 1), count, Context(table.context)), What(table.what))

    def recall(self, rule: Rule, site: Site, step: int, place: int) -> Action:
        """Action that takes what is stored; `place` is that of the site among those that the rule names."""
        asked, stored = rule.recall, self.stored[site.id]
        assert not isinstance(asked, TokenTable)
        recall: AnyRecall | DuringRun = asked
        if self.begin and isinstance(recall, Fitted):
            recall = recall.for_stored(stored, step, place)
        elif isinstance(recall, Velocity):
            recall = recall.fitted(stored, step, self.timesteps, self.begin)
        elif isinstance(recall, WeightedBands):
            recall = recall.during(self.timesteps, self.begin)
        check_stored(self.policy, site, recall, stored, step, place)
        return recall.action(self.possible[site.id] if isinstance(recall, Forecast) else stored, step, place)

    def moment(self, cadence: Cadence, step: int) -> Moment:
        """What `step` is to a cadence."""
        if cadence not in self.moments:
            self.moments[cadence] = cadence.moments(self.steps, self.begin, self.timesteps)
        return self.moments[cadence][step - self.begin]


def _recalls_stream(action: Action) -> bool:
    return action.what is What.STREAM and not action.computes


def outside(structure: ModelStructure, policy: Policy) -> frozenset[int]:
    """Sites and spans of the blocks that run at every step, whatever the rules say: outside, or to be watched."""
    watched = (policy.gate and policy.gate.depth) or 0
    first, last = max(policy.outside[0], watched), len(structure.blocks) - policy.outside[1]
    return frozenset(
        int(site.id)
        for site in structure.everything
        if site.kind not in (SiteKind.STACK, SiteKind.MODEL) and not first <= site.block < last
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
