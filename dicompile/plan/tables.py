"""Does a table fit this model and this sampler? A learned one says what it was learned for."""

from __future__ import annotations

from collections.abc import Sequence

from dicompile.analysis import Site
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan.recall import Fitted
from dicompile.plan.schedule import TimestepSchedule
from dicompile.plan.schema import Origin, Policy, Rule, Table, TokenTable

SAME_TIMESTEP = 1e-3
"""Difference that two timesteps of the same sampler may have, as a share of the largest."""


def check_table(policy: Policy, rule: Rule, sites: Sequence[Site], steps: int) -> None:
    """Raise if a rule's table is for another number of steps, or for other sites.

    Args:
        policy: the policy.
        rule: one of its rules; nothing to check if it has no table.
        sites: sites and spans that the rule names.
        steps: number of steps of the run.

    Raises:
        PolicyDoesNotFit: it is.
    """
    if isinstance(rule.recall, Fitted) and len(rule.recall.weights) != steps:
        fitted = len(rule.recall.weights)
        raise PolicyDoesNotFit(
            f"the forecast of policy {policy.name!r} was fitted to {fitted} steps, the schedule has {steps}",
            where=f"rule for {', '.join(rule.sites) or 'all sites'}",
            why="fitted weights hold for one number of steps",
            fix=f"sample in {fitted} steps, or fit a forecast for {steps}",
        )
    if not isinstance(rule.do, (Table, TokenTable)):
        return
    rows = rule.do.compute if isinstance(rule.do, Table) else rule.do.counts
    origin = _origin(rule)
    where = origin.file if origin else f"rule for {', '.join(rule.sites) or 'all sites'}"
    if len(rows) != steps:
        raise PolicyDoesNotFit(
            f"the table of policy {policy.name!r} has {len(rows)} steps, the schedule {steps}",
            where=where,
            why="a learned table holds for one number of steps",
            fix=f"sample in {len(rows)} steps, or learn a table for {steps}",
        )
    wrong = next((len(row) for row in rows if len(row) != len(sites)), None)
    if wrong is not None:
        raise PolicyDoesNotFit(
            f"the table of policy {policy.name!r} is for {wrong} sites, the model has {len(sites)}",
            where=where,
            why="a learned table holds for one model",
            fix="use the table of this model, or learn one for it",
        )
    if origin and origin.sites:
        _check_labels(policy, origin, [site.label for site in sites])


def check_timesteps(policy: Policy, schedule: TimestepSchedule) -> None:
    """Raise if a table was learned for a sampler with other timesteps, as far as both are known.

    Raises:
        PolicyDoesNotFit: it was.
    """
    for rule in policy.rules:
        origin = _origin(rule)
        if origin is None or len(origin.timesteps) != schedule.before + len(schedule.timesteps):
            continue  # another number of steps is the business of `check_table`
        same = SAME_TIMESTEP * max(map(abs, origin.timesteps), default=1.0)
        pairs = zip(origin.timesteps[schedule.before :], schedule.timesteps, strict=True)
        for step, (learned, given) in enumerate(pairs, schedule.before):
            if abs(learned - given) > same:
                raise PolicyDoesNotFit(
                    f"the table of policy {policy.name!r} has timestep {learned:g} at step {step + 1}, "
                    f"the schedule {given:g}",
                    where=origin.file,
                    why="a learned table holds for the timesteps of one sampler",
                    fix="set up the scheduler as for the training, or learn a table for this one",
                )


def _origin(rule: Rule) -> Origin | None:
    return rule.do.origin if isinstance(rule.do, (Table, TokenTable)) else None


def _check_labels(policy: Policy, origin: Origin, labels: Sequence[str]) -> None:
    for number, (learned, present) in enumerate(zip(origin.sites, labels, strict=False)):
        if learned != present:
            raise PolicyDoesNotFit(
                f"the table of policy {policy.name!r} has site {learned} at place {number}, the model {present}",
                where=origin.file,
                why="a learned table holds for one model",
                fix="use the table of this model, or learn one for it",
            )
