"""Does it fit? Everything that refuses a policy because of the model, the sampler or the memory it meets.

A policy is refused in this order: by what its rules ask of branches (`check_fits`), by what its tables were learned for
(`check_timesteps`, `check_table`), by what is stored when it recalls (`check_stored`), by the room for what it stores
(`is_within`), and by what its predictor was trained for (`check_predictor`, `check_parameters`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dicompile.analysis import ModelStructure, Site, SiteId, SiteKind, Span, TokenWise
from dicompile.errors import CacheTooLarge, InvalidSetting, PolicyDoesNotFit
from dicompile.plan.action import ScoreBase
from dicompile.plan.frozen import Origin
from dicompile.plan.plan import Plan
from dicompile.plan.recall import Bands, DuringRun, Fitted, Recall, Velocity, WeightedBands
from dicompile.plan.schedule import TimestepSchedule
from dicompile.plan.schema import Policy, Propagate, Refresh, Rule, Table, TokenScore, TokenTable
from dicompile.text import size_text

SAME_TIMESTEP = 1e-3
"""Difference that two timesteps of the same sampler may have, as a share of the largest."""

Refreshing = Refresh | Propagate | TokenTable
"""What computes single tokens."""

OVER_OWN_TOKENS = (SiteKind.SELF_ATTENTION, SiteKind.JOINT_ATTENTION, SiteKind.PARALLEL)
STORES_NO_ATTENTION = "a span stores no attention"


class Setting(NamedTuple):
    """What a policy is on one model.

    Attributes:
        policy: itself, or one of its `elsewhere`.
        meant_for: the kind of model that an `elsewhere` is for; empty for the policy itself, and for a last resort.
        note: one line about the settings that come before it, and do not fit; empty if it is the first.
    """

    policy: Policy
    meant_for: str = ""
    note: str = ""


def choose_setting(policy: Policy, structure: ModelStructure) -> Setting:
    """The setting of a policy that is meant for a model of this kind: itself, or one of its `elsewhere`.

    Raises:
        PolicyDoesNotFit: neither the policy nor any of them fits; the text is about the policy itself.
    """
    kinds = {site.kind.value for site in structure.sites}
    axes = len(structure.grid or ())
    meant = [e for e in policy.elsewhere if kinds.issuperset(e.sites) and e.grid_axes in (None, axes)]
    candidates = [
        *(Setting(e.policy, e.kind_of_model) for e in meant if e.sites),
        Setting(policy),
        *(Setting(e.policy) for e in meant if not e.sites),
    ]
    refusals: list[str] = []
    for candidate in candidates:
        try:
            check_fits(candidate.policy, structure)
        except PolicyDoesNotFit as refusal:
            refusals.append(refusal.what.removeprefix("policy "))
            continue
        return candidate._replace(note=_first_that_fits(candidate.policy, refusals)) if refusals else candidate
    check_fits(policy, structure)
    return Setting(policy)


def check_fits(policy: Policy, structure: ModelStructure) -> None:
    """Raise if the policy asks for something that the model cannot do.

    Raises:
        PolicyDoesNotFit: it wants more blocks to run at every step than there are, or its gate has nothing to watch; a
            site to be refreshed mixes tokens, has no attention to be scored by, or shares it with a
            site that wants another score; the token grid or batch does not allow the score; there are no more tokens
            than clusters, or two numbers of clusters; a rule names spans, or branches to propagate in, that the
            model does not have, or a value that a site does not have, or that has no place for single tokens.
    """
    _check_trunk(policy, structure)
    for rule in policy.rules:
        _check_named(policy, structure, rule)
    for site in structure.everything:
        _check_one_value(policy, structure, site)
    for site, do in refreshed(structure, policy):
        if isinstance(do, Propagate):
            _check_clusters(policy, structure, site, do)
        _check_tokens(policy, site, do)
        _check_placed(policy, site, do)
        if not isinstance(do, Propagate):
            _check_score(policy, structure, site, do.score)
    _check_one_score(policy, structure)


def check_stint(policy: Policy, schedule: TimestepSchedule) -> None:
    """Raise if a policy for the denoisers of a pipeline meets steps that are another one's.

    Raises:
        PolicyDoesNotFit: it is for several, or for one at other steps.
    """
    check_one_denoiser(policy)
    for stint in policy.stints:
        if not set(schedule.numbers) <= set(stint.steps):
            raise PolicyDoesNotFit(
                f"policy {policy.name!r} is for {stint}, and was asked for steps {schedule.numbers.start + 1} to "
                f"{schedule.numbers.stop}",
                where="schedule",
                why="the other steps are another denoiser's",
                fix="optimize the pipeline that has both",
            )


def check_one_denoiser(policy: Policy) -> None:
    """Raise if a policy is for several denoisers of a pipeline.

    Raises:
        PolicyDoesNotFit: it is.
    """
    if len(policy.stints) > 1:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} is for a pipeline with {' and '.join(map(str, policy.stints))}",
            where="one model by itself",
            why="which of its steps are this model's cannot be told",
            fix=f"optimize the pipeline, or give the model its part: policy.of({policy.stints[0].component!r})",
        )


def check_components(policy: Policy, names: Sequence[str]) -> None:
    """Raise if a policy for several denoisers is for other ones than are to be optimized.

    Args:
        policy: the policy.
        names: of the components.

    Raises:
        PolicyDoesNotFit: it is.
    """
    known = [stint.component for stint in policy.stints]
    if known and set(known) != set(names):
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} is for {' and '.join(map(str, policy.stints))}, "
            f"and {' and '.join(names)} {'is' if len(names) == 1 else 'are'} to be optimized",
            where="components",
            why="each denoiser has steps of its own",
            fix=f"calibrate this pipeline as you sample, or optimize what the policy is for: components={known}",
        )


def check_timesteps(policy: Policy, schedule: TimestepSchedule) -> None:
    """Raise if a table was learned for a sampler with other timesteps, as far as both are known.

    Raises:
        PolicyDoesNotFit: it was, or the policy asks for timesteps, and only the number of steps is known.
    """
    cadences = [policy.cadence, *(rule.cadence for rule in policy.rules if rule.cadence is not None)]
    windows = [cadence.timesteps for cadence in cadences if cadence.timesteps is not None]
    weighted = [rule.recall.low_between for rule in policy.rules if isinstance(rule.recall, WeightedBands)]
    if (windows or weighted) and not schedule.timesteps:
        does, (first, last) = ("reuses", windows[0]) if windows else ("weighs frequencies", weighted[0])
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} {does} between timesteps {first:g} and {last:g}, and no timesteps are known",
            where="schedule",
            why=f"only the number of steps was given: {schedule.steps}",
            fix="optimize(..., schedule=scheduler), or a list of timesteps",
        )
    if any(isinstance(rule.recall, Velocity) for rule in policy.rules):
        _check_levels(policy, schedule)
    for rule in policy.rules:
        origin = _origin(rule)
        if origin is None or not schedule.timesteps or len(origin.timesteps) != schedule.whole:
            continue  # another number of steps is the business of `check_table`
        same = SAME_TIMESTEP * max(map(abs, origin.timesteps), default=1.0)
        for step, given in zip(schedule.numbers, schedule.timesteps, strict=True):
            learned = origin.timesteps[step]
            if abs(learned - given) > same:
                raise PolicyDoesNotFit(
                    f"the table of policy {policy.name!r} has timestep {learned:g} at step {step + 1}, "
                    f"the schedule {given:g}",
                    where=origin.file,
                    why="a learned table holds for the timesteps of one sampler",
                    fix="set up the scheduler as for the training, or learn a table for this one",
                )


def _check_levels(policy: Policy, schedule: TimestepSchedule) -> None:
    """Weights that follow from noise levels need those, each unlike the one before."""
    times = schedule.timesteps
    if times and 0.0 not in (later - earlier for earlier, later in itertools.pairwise(times)):
        return
    raise PolicyDoesNotFit(
        f"policy {policy.name!r} weighs velocities by the timesteps in between, and "
        + ("two that follow each other are equal" if times else "no timesteps are known"),
        where="schedule",
        why="the rule is for Euler's method, which evaluates every timestep once"
        if times
        else f"only the number of steps was given: {schedule.steps}",
        fix="sample with Euler's method (FlowMatchEulerDiscreteScheduler)"
        if times
        else "optimize(..., schedule=scheduler), or a list of timesteps",
    )


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
    origin = _origin(rule)
    where = origin.file if origin else f"rule for {', '.join(rule.sites) or 'all sites'}"
    if isinstance(rule.recall, Fitted):
        _check_fitted(policy, rule.recall, sites, steps, where)
    if isinstance(rule.recall, Velocity) and len(rule.recall.back) != steps:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} says for {len(rule.recall.back)} steps how far to look back, "
            f"the schedule has {steps}",
            where=where,
            why="a published schedule holds for one number of steps",
            fix=f"sample in {len(rule.recall.back)} steps",
        )
    if origin and origin.sites:
        _check_labels(policy, origin, [site.label for site in sites])
    if not isinstance(rule.do, (Table, TokenTable)):
        return
    rows = rule.do.compute if isinstance(rule.do, Table) else rule.do.counts
    if len(rows) != steps:
        raise PolicyDoesNotFit(
            f"the table of policy {policy.name!r} has {len(rows)} steps, the schedule {steps}",
            where=where,
            why="a learned table holds for one number of steps",
            fix=f"sample in {len(rows)} steps, or learn a table for {steps}",
        )
    shared = 1 if isinstance(rule.do, Table) else len(sites)
    wrong = next((len(row) for row in rows if len(row) not in (len(sites), shared)), None)
    if wrong is not None:
        raise PolicyDoesNotFit(
            f"the table of policy {policy.name!r} is for {wrong} sites, the model has {len(sites)}",
            where=where,
            why="a learned table holds for one model",
            fix="use the table of this model, or learn one for it",
        )


def _check_fitted(policy: Policy, fitted: Fitted, sites: Sequence[Site], steps: int, where: str) -> None:
    if len(fitted.weights) != steps:
        raise PolicyDoesNotFit(
            f"the forecast of policy {policy.name!r} was fitted to {len(fitted.weights)} steps, "
            f"the schedule has {steps}",
            where=where,
            why="fitted weights hold for one number of steps",
            fix=f"sample in {len(fitted.weights)} steps, or fit a forecast for {steps}",
        )
    wrong = next((n for n in map(fitted.sites_at, range(steps)) if n not in (None, len(sites))), None)
    if wrong is not None:
        raise PolicyDoesNotFit(
            f"the forecast of policy {policy.name!r} has weights for {wrong} sites, the model has {len(sites)}",
            where=where,
            why="weights per site hold for one model",
            fix="use the weights of this model, or fit a forecast to it",
        )


def check_stored(
    policy: Policy,
    site: Site,
    recall: Recall | DuringRun | TokenTable,
    stored: Sequence[int],
    step: int,
    place: int = 0,
) -> None:
    """Raise if a site is to be recalled at a step before enough of it was stored.

    Args:
        policy: the policy.
        site: site or span.
        recall: what stands in for its value.
        stored: steps at which it was stored, newest first.
        step: where it is recalled.
        place: of the site among those that its rule names.

    Raises:
        PolicyDoesNotFit: nothing was stored, or less than fitted weights are for.
    """
    if not stored:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} reuses site {site.id} at step {step + 1}, before it was ever computed",
            where=site.name,
            fix="compute everything at the first step",
        )
    if isinstance(recall, Fitted) and not 0 < len(recall.weights_at(step, place)) <= len(stored):
        raise PolicyDoesNotFit(
            f"fitted weights for step {step + 1} are for {len(recall.weights_at(step, place))} stored values, "
            f"there are {len(stored)}",
            where="Fitted",
            why="weights were fitted for another cadence",
            fix="fit them again for this cadence: recording.fitted(cadence)",
        )


def is_within(plan: Plan) -> bool:
    """True if a plan holds no more than its cache may."""
    return plan.cache.max_bytes is None or plan.cache_bytes <= plan.cache.max_bytes


def too_large(structure: ModelStructure, plan: Plan, instead: Sequence[str]) -> CacheTooLarge:
    """What is told of a plan that holds more than its cache may.

    Args:
        structure: the model.
        plan: the plan.
        instead: settings with which it would fit.
    """
    return CacheTooLarge(
        f"policy {plan.policy!r} needs a cache of {size_text(plan.cache_bytes)}, but only "
        f"{size_text(plan.cache.max_bytes or 0)} are allowed",
        where=f"plan of {len(plan.steps)} steps, for one guidance context",
        why=f"after step {plan.fullest + 1} it holds {_largest(structure, plan)}",
        fix=", or ".join([f"max_cache_bytes={plan.cache_bytes}", *instead]),
    )


def check_predictor(structure: ModelStructure, blocks: int, tokens: int, source: str) -> None:
    """Raise if a cache predictor was trained for another model or resolution.

    Args:
        structure: the model.
        blocks: number of blocks that the predictor knows.
        tokens: number of tokens.
        source: file that it comes from.

    Raises:
        PolicyDoesNotFit: it was, or the model has no block that a predictor could copy.
    """
    present = len(structure.blocks), first_span(structure).tokens.count
    if (blocks, tokens) != present:
        raise PolicyDoesNotFit(
            f"the predictor is for {blocks} blocks of {tokens} tokens, the model has {present[0]} of {present[1]}",
            where=source,
            why="a predictor knows one model at one resolution",
            fix="use the predictor of this model, or train one for it",
        )


def check_parameters(given: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], source: str) -> None:
    """Raise if the parameters of a cache predictor are no copies of the model's.

    Args:
        given: shapes of the predictor's parameters, by name.
        expected: shapes of those of the model's first block.
        source: file that they come from.

    Raises:
        PolicyDoesNotFit: one is missing or has another shape.
    """
    for name, shape in expected.items():
        found = tuple(given[name]) if name in given else None
        if found != tuple(shape):
            raise PolicyDoesNotFit(
                f"the predictor has parameter {name} of shape {found}, the model {tuple(shape)}",
                where=source,
                why="a predictor is a trained copy of one model's first block",
                fix="use the predictor of this model, or train one for it",
            )


def check_adapters(
    given: Mapping[str, tuple[int, int]], expected: Mapping[str, Sequence[int]], source: str, planned: int, numbers: int
) -> None:
    """Raise if the LoRA weights of a cache predictor are not for this model, or not what the policy was made for.

    Args:
        given: d and c of the layers that have them, by the names of their parameters.
        expected: shapes of the weights of linear layers on the latent's way through the model's last blocks, by name.
        source: file that they come from.
        planned: numbers in LoRA weights as the policy says.
        numbers: in those that are there.

    Raises:
        PolicyDoesNotFit: they are not.
    """
    for name, shape in given.items():
        found = tuple(expected[name]) if name in expected else None
        if found != shape:
            raise PolicyDoesNotFit(
                f"the predictor has LoRA weights for {name} of shape {shape}, the model {found}",
                where=source,
                why="they stand beside a linear layer on the latent's way through one of the last blocks; "
                "quantised weights and layers that somebody else has adapted have other names",
                fix="use the predictor of this model, or train one for it as it is",
            )
    if planned != numbers:
        raise PolicyDoesNotFit(
            f"the policy was made for a predictor with LoRA weights of {planned} numbers, and this one has {numbers}",
            where=source,
            why="which blocks are never cached follows from them",
            fix="make the policy anew: TokenCache(predictor=FILE)",
        )


def refreshed(structure: ModelStructure, policy: Policy) -> Sequence[tuple[Site, Refreshing]]:
    """Sites and spans of which single tokens may be computed, and how; those that are reused whole instead left out."""
    mixed = reused_whole(structure, policy)
    return [(site, do) for site, do in _asked_to_refresh(structure, policy) if site.id not in mixed]


def unmatched_rules(structure: ModelStructure, policy: Policy) -> tuple[str, ...]:
    """Kinds of site that a rule is for, of every rule that is for no site of a model."""
    if not structure.sites:
        return ()
    unmatched = (rule for rule in policy.rules if not named_by(rule, structure))
    return tuple(", ".join(rule.sites) or "any" for rule in unmatched)


def reused_whole(structure: ModelStructure, policy: Policy) -> dict[SiteId, str]:
    """Sites and spans that a rule refreshes but which mix tokens, with the reason, if the policy reuses such."""
    if policy.where_mixed == "refuse":
        return {}
    reasons = ((site, why_not_refreshed(site, do)) for site, do in _asked_to_refresh(structure, policy))
    return {site.id: reason for site, reason in reasons if reason}


def why_not_refreshed(site: Site, do: Refreshing) -> str:
    """What forbids to compute chosen tokens of a site or span alone; empty if nothing does."""
    fact = site.tokens
    # A branch of attention over its own tokens can be refreshed where the rule says which attention they see.
    opened = fact.stored if do.context == "stored" else fact.wise is TokenWise.QUERIES
    if site.kind.is_span and do.context == "stored" and fact.wise is TokenWise.QUERIES:
        return STORES_NO_ATTENTION
    if fact.wise is TokenWise.YES or (opened and (site.kind.is_span or site.kind is SiteKind.PARALLEL)):
        return ""
    return fact.reason or "what mixes its tokens is stored at other steps only"


def score_source(structure: ModelStructure, site: Site, base: ScoreBase) -> Site | None:
    """The site that keeps what ranks the tokens of `site`, or None.

    It is the attention of the same block whose keys, values or map do so, or the last site of the kind on the stream,
    behind which that is clustered.
    """
    if base is ScoreBase.CLUSTER:
        return [s for s in structure.sites if _is_alike(s, site)][-1]
    if not base.needs_attention or site.kind.is_span:
        return None
    wanted = (SiteKind.CROSS_ATTENTION,) if base is ScoreBase.ENTROPY else OVER_OWN_TOKENS
    in_block = structure.sites_of(structure.blocks[site.block])
    rows = site.stream, site.shape[:-1]
    return next((s for s in in_block if s.kind in wanted and (s.stream, s.shape[:-1]) == rows), None)


def _is_alike(site: Site, other: Site) -> bool:
    """True for two sites of one kind and shape on one stream."""
    return (site.kind, site.stream, site.shape) == (other.kind, other.stream, other.shape)


def first_span(structure: ModelStructure) -> Site:
    """The span of the first block with the most tokens.

    Raises:
        PolicyDoesNotFit: the model has none.
    """
    spans = [span for span in structure.spans if span.kind is SiteKind.BLOCK and span.block == 0]
    if not spans:
        raise PolicyDoesNotFit(
            "a cache predictor copies the first block, but the model has none",
            where="analysis",
            fix="use a policy that needs no predictor",
        )
    return max(spans, key=lambda span: span.tokens.count)


def _check_trunk(policy: Policy, structure: ModelStructure) -> None:
    first, last = max(policy.outside[0], (policy.gate and policy.gate.depth) or 0), policy.outside[1]
    blocks = len(structure.blocks)
    if structure.sites and first + last >= blocks and first + last > 0:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} runs {first + last} blocks at every step, the model has {blocks}",
            where="outside",
            why=f"{first} at the start and {last} at the end leave none to reuse",
            fix="run fewer of them at every step",
        )
    if structure.sites and policy.trunk.model and structure.whole is None:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} adds to the latent what the model added to it before, which this model's output "
            "does not allow",
            where="analysis",
            why="it is not one tensor with the latent's shape and dtype",
            fix="use a policy that reuses what the blocks add, such as dicompile.TeaCache() or dicompile.MagCache()",
        )
    if structure.sites and policy.gate is not None and policy.gate.verifies and structure.last is None:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} verifies the stream behind the last block, but the model has no such one",
            where="analysis",
            why="its output reads several streams, or one that no block ends with",
            fix="watch another value (Gate(probe=...)), or use a policy that is planned ahead, such as "
            "dicompile.TaylorSeer()",
        )
    if structure.sites and policy.trunk.probe is not None and policy.gate is not None and structure.probe is None:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} has a gate, but the model has nothing for it to watch",
            where=f"analysis, probe {policy.gate.probe!r}",
            why=_NO_PROBE[policy.gate.probe],
            fix="watch another value (Gate(probe=...)), or use a policy that is planned ahead, such as "
            "dicompile.FORA(interval=3)",
        )


_NO_PROBE = {
    **dict.fromkeys(
        ("residual", "stream"),
        "there are no blocks before the stack (outside=(1, 0), or depth=1), or the latent's stream passes them by",
    ),
    "modulated": "no branch reads the latent's stream through a normalisation or modulation",
    **dict.fromkeys(
        ("modulation", "embedding"),
        "the first branch on the latent's stream is not modulated by one product of the timestep",
    ),
    "latent": "no branch depends on the latent",
}


def check_gate(policy: Policy, *, records_steps: bool, is_offloaded: bool, in_background: bool) -> None:
    """Raise if steps cannot be decided about while they run.

    Args:
        policy: the policy.
        records_steps: whole steps are recorded as CUDA graphs.
        is_offloaded: slots are in host memory between steps.
        in_background: calls run uncached until their code is compiled.

    Raises:
        InvalidSetting: the policy has a gate, and they cannot.
    """
    settings = {
        "compile_mode": (records_steps, "'reduce-overhead'", "a recorded step cannot stop in the middle to decide"),
        "cache_device": (is_offloaded, "'cpu'", "what the gate compares with would be in host memory when it decides"),
    }
    gate = policy.gate
    for name, (is_set, value, why) in settings.items():
        if gate is not None and is_set:
            raise InvalidSetting(
                f"policy {policy.name!r} has a gate, which does not go with {name}={value}",
                where=name,
                why=why,
                fix=f"leave {name} out, or use a policy that is planned ahead, such as dicompile.FORA(interval=3)",
            )
    if gate is not None and gate.tells_rows_apart and in_background:
        raise InvalidSetting(
            f"policy {policy.name!r} tells the rows of a batch apart, which does not go with warmup='background'",
            where="warmup",
            why="how many rows a step computes, and has to have code for, is known when it runs",
            fix="leave warmup out, and call dicompile.prepare(model) after the first step",
        )


def _check_named(policy: Policy, structure: ModelStructure, rule: Rule) -> None:
    named = named_by(rule, structure)
    spans = [name for name in rule.sites if name in ("block", "stack")]
    is_meant = any(site.kind.value in spans for site in named)
    if spans and not is_meant and any(site.kind.value in spans for site in structure.everything):
        first, end = rule.blocks
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} has a rule for a part of the model in which there is no whole block",
            where="blocks",
            why=f"of {len(structure.blocks)} blocks those from {first:.0%} to {end:.0%}, each rounded, are none",
            fix="give the rule a larger share of the blocks",
        )
    if spans and structure.sites and not is_meant:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} reuses a whole {spans[0]}, but the model has none",
            where="analysis",
            why="no two branches follow each other on one stream",
            fix="use a policy that reuses single branches, such as dicompile.FORA(interval=3)",
        )
    if isinstance(rule.do, Propagate) and structure.sites and not named:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} computes one token of every cluster in {' and '.join(rule.sites) or 'branches'}, "
            "but the model has none",
            where="analysis",
            why=f"it has {', '.join(dict.fromkeys(site.kind.value for site in structure.sites))}",
            fix="use a policy that recalls every branch whole, such as dicompile.TaylorSeer()",
        )
    what = rule.recall.what
    for site in named:
        if isinstance(rule.recall, Bands):
            _check_bands(policy, structure, site, rule.recall)
        if isinstance(rule.recall, WeightedBands) and len(site.shape) < 4:
            raise PolicyDoesNotFit(
                f"policy {policy.name!r} tells low frequencies of a picture from high ones, which this "
                f"{site.kind.value} does not allow",
                where=_where(site),
                why=f"its value is of shape {'x'.join(map(str, site.shape))}, which has no height and width",
                fix="reuse all of them alike (Reuse)",
            )
        has_none = ("core", "attention") if site.kind.is_span else ("stream",)
        if what in has_none or (what == "difference" and site.kind is not SiteKind.MODEL):
            raise PolicyDoesNotFit(
                f"policy {policy.name!r} stores the {what} of a {site.kind.value}, which has none",
                where=_where(site),
                fix="store 'stream' or 'update'" if site.kind.is_span else "store 'core' or 'update'",
            )
        if what == "attention" and len(site.attention) != 1:
            raise PolicyDoesNotFit(
                f"policy {policy.name!r} stores the output of attention, but the branch has {len(site.attention)}",
                where=_where(site),
                fix="store 'core' for this kind of site",
            )


def _check_bands(policy: Policy, structure: ModelStructure, site: Site, bands: Bands) -> None:
    """Frequencies over tokens need tokens that follow each other in the picture, or lie on its grid."""
    picture = site.picture if isinstance(site, Span) else (0, 0)
    needed = {(0, 0): "which of its tokens are the picture's cannot be told"}
    if bands.basis == "dct":
        grid = bands.grid or structure.grid or ()
        shape = "x".join(map(str, grid)) or "unknown"
        if len(grid) != 2 or math.prod(grid) != picture[1]:
            needed[picture] = f"it has {picture[1]} tokens of the picture, and their grid is {shape}"
    is_read = site.kind is SiteKind.BLOCK or bands.what != "stream" or not isinstance(site, Span) or site.is_last
    if is_read and picture in needed:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} tells low frequencies over the tokens from high ones, which this "
            f"{'span' if site.kind.is_span else 'branch'} does not allow",
            where=_where(site),
            why=needed[picture],
            fix="forecast all of them alike (Forecast)"
            + ("" if bands.basis == "fft" else ", or set its grid, or basis='fft'"),
        )


def _check_one_value(policy: Policy, structure: ModelStructure, site: Site) -> None:
    whats = sorted({rule.recall.what for rule in _rules_for(policy, structure, site)} - {"attention"})
    if len(whats) > 1:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} stores two values of one {'span' if site.kind.is_span else 'branch'}",
            where=_where(site),
            why=f"its rules want {' and '.join(whats)}",
            fix="give all rules for this kind of site the same 'what'",
        )


def _check_tokens(policy: Policy, site: Site, do: Refreshing) -> None:
    reason = why_not_refreshed(site, do)
    if not reason:
        return
    fix = "set where_mixed='reuse' to reuse it whole, or use a policy that does, such as dicompile.FORA(interval=3)"
    raise PolicyDoesNotFit(
        f"policy {policy.name!r} refreshes single tokens, which this {'span' if site.kind.is_span else 'branch'} "
        "does not allow",
        where=_where(site),
        why=reason,
        fix="set context='all' or 'kept'" if reason is STORES_NO_ATTENTION else fix,
    )


def _check_placed(policy: Policy, site: Site, do: Refreshing) -> None:
    """Chosen tokens of a branch have a place in its stored value only where that is the branch's own output."""
    recall = do if isinstance(do, TokenTable) else do.otherwise
    if recall.what != "attention":
        return
    raise PolicyDoesNotFit(
        f"policy {policy.name!r} refreshes single tokens of a branch of which it stores the output of attention",
        where=_where(site),
        why=f"from that, {site.attention[0]}, every token of the branch is computed anew: none is left to choose",
        fix="store 'core' or 'update' beside Refresh, or recall the attention without it: Reuse(what='attention')",
    )


def _check_clusters(policy: Policy, structure: ModelStructure, site: Site, do: Propagate) -> None:
    """Clusters are of one stream, so all that propagates on it has the same ones, and each has several tokens."""
    asked = [rule.do for rule in _rules_for(policy, structure, site) if isinstance(rule.do, Propagate)]
    other = next((each for each in asked if (each.clusters, each.rounds) != (do.clusters, do.rounds)), None)
    if site.kind.is_span:
        why, fix = "it has no branch of its own to compute single tokens of", "name branches: Rule(sites=('mlp',), ...)"
    elif other is not None:
        why = f"another rule for it wants {other.clusters} in {other.rounds} rounds"
        fix = "give both rules the same clusters and rounds"
    elif site.tokens.count <= do.clusters:
        why, fix = f"the branch has {site.tokens.count} tokens", f"set clusters to less than {site.tokens.count}"
    else:
        return
    raise PolicyDoesNotFit(
        f"policy {policy.name!r} computes one token of each of {do.clusters} clusters, which this "
        f"{'span' if site.kind.is_span else 'branch'} does not allow",
        where=_where(site),
        why=why,
        fix=fix,
    )


def _check_score(policy: Policy, structure: ModelStructure, site: Site, score: TokenScore) -> None:
    base = ScoreBase(score.base)
    if base.needs_attention:
        _check_source(policy, structure, site, base)
    if base is ScoreBase.PREDICTED and policy.predictor is None:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} ranks tokens by a predictor, but names none",
            where=_where(site),
            fix="set predictor to the file that `dicompile train-predictor` wrote",
        )
    if score.grid_cell:
        _check_grid(policy, structure.grid, site, score)
    if score.share_guidance and site.shape[0] % 2:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} shares tokens between guidance halves, but the batch is {site.shape[0]}",
            where=_where(site),
            why="the two halves of classifier-free guidance must be in one batch",
            fix="set share_guidance=False",
        )


def _check_source(policy: Policy, structure: ModelStructure, site: Site, base: ScoreBase) -> None:
    source = score_source(structure, site, base)
    if source is None:
        wanted = "cross-attention" if base is ScoreBase.ENTROPY else "self-attention"
        present = (s.kind.value for s in structure.sites_of(structure.blocks[site.block]))
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} ranks tokens by {base.value}, for which there is no {wanted} in the block",
            where=_where(site),
            why=f"the block has {', '.join(present)}",
            fix="choose another score, for example score='random'",
        )
    if base is ScoreBase.ENTROPY and source.ranks > 1:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} ranks tokens by {base.value}, but every rank has other heads of the attention",
            where=_where(source),
            why="the map of a query is the mean over all heads, and no rank has it",
            fix="choose another score, for example score='attention' or score='random'",
        )
    readable = source.tokens.wise is TokenWise.YES if base is ScoreBase.ENTROPY else source.keys[1] > 0
    if not readable:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} ranks tokens by {base.value}, but the attention is not over the same tokens",
            where=_where(site),
            why=_why_not_read(source),
            fix="choose another score, for example score='random'",
        )


def _check_grid(policy: Policy, grid: tuple[int, ...] | None, site: Site, score: TokenScore) -> None:
    if grid is None:
        why = "the token grid is unknown"
    else:
        shape = "x".join(map(str, grid))
        if math.prod(grid) != site.tokens.count:
            why = f"the branch has {site.tokens.count} tokens, the token grid is {shape}"
        elif len(grid) == 2 and any(edge % score.grid_cell for edge in grid):
            why = f"the token grid is {shape}"
        else:
            return
    raise PolicyDoesNotFit(
        f"policy {policy.name!r} gives a bonus per {score.grid_cell}x{score.grid_cell} cell of tokens",
        where=_where(site),
        why=why,
        fix="set grid_cell=0 to switch the bonus off",
    )


def _check_one_score(policy: Policy, structure: ModelStructure) -> None:
    asked: dict[int, tuple[Site, TokenScore]] = {}
    for site, do in refreshed(structure, policy):
        if isinstance(do, Propagate):
            continue  # no attention is asked
        source = score_source(structure, site, ScoreBase(do.score.base))
        if source is None:
            continue
        first, other = asked.setdefault(int(source.id), (site, do.score))
        shares_differ = do.score.base == "entropy" and do.score.share_guidance != other.share_guidance
        if do.score.base != other.base or shares_differ:
            raise PolicyDoesNotFit(
                f"policy {policy.name!r} asks two different scores of one attention",
                where=_where(site),
                why=f"site {source.id} keeps one score per token: {other.base} for site {first.id}, "
                f"{do.score.base} for this one",
                fix="rank both kinds of site by the same base, with the same share_guidance",
            )


def _first_that_fits(policy: Policy, refusals: Sequence[str]) -> str:
    bases = {rule.do.score.base for rule in policy.rules if isinstance(rule.do, (Refresh, TokenTable))}
    scores = ", its scores are random" if bases == {"random"} else ""
    return f"this is the first published setting that fits{scores}; refused: {'; '.join(refusals)}"


def _asked_to_refresh(structure: ModelStructure, policy: Policy) -> Sequence[tuple[Site, Refreshing]]:
    asked = ((site, _asked_of(policy, structure, site)) for site in structure.everything)
    return [(site, do) for site, do in asked if do is not None]


def _asked_of(policy: Policy, structure: ModelStructure, site: Site) -> Refreshing | None:
    """How the first rule that refreshes single tokens of a site does so."""
    actions = (rule.do for rule in _rules_for(policy, structure, site))
    return next((do for do in actions if isinstance(do, Refreshing)), None)


def named_by(rule: Rule, structure: ModelStructure) -> list[Site]:
    """Sites and spans that a rule is for, in order."""
    return [site for site in structure.everything if rule.names(site, len(structure.blocks))]


def _rules_for(policy: Policy, structure: ModelStructure, site: Site) -> list[Rule]:
    return [rule for rule in policy.rules if rule.names(site, len(structure.blocks))]


def _origin(rule: Rule) -> Origin | None:
    learned = rule.do if isinstance(rule.do, (Table, TokenTable)) else rule.recall
    return learned.origin if isinstance(learned, (Table, TokenTable, Fitted)) else None


def _check_labels(policy: Policy, origin: Origin, labels: Sequence[str]) -> None:
    for number, (learned, present) in enumerate(zip(origin.sites, labels, strict=False)):
        if learned != present:
            raise PolicyDoesNotFit(
                f"the table of policy {policy.name!r} has site {learned} at place {number}, the model {present}",
                where=origin.file,
                why="a learned table holds for one model",
                fix="use the table of this model, or learn one for it",
            )


def _largest(structure: ModelStructure, plan: Plan) -> str:
    """The kinds of slot that take most of the fullest step."""
    alike = Counter(
        (structure.everything[slot.site].kind.value, slot.kind_name, plan.slot_bytes[slot])
        for slot in plan.steps[plan.fullest].live
    )
    largest = sorted(alike.items(), key=lambda item: (-item[1] * item[0][2], item[0]))[:3]
    return ", ".join(f"{count} x {kind} of {site} ({size_text(size)} each)" for (site, kind, size), count in largest)


def _why_not_read(source: Site) -> str:
    """What forbids to read scores off an attention."""
    if not source.attention:
        return source.tokens.reason
    attending, streaming = _rows(source.attention_shape), _rows(source.shape)
    if attending == streaming:
        return source.tokens.reason
    return f"{source.name} attends with {attending}, the stream has {streaming}"


def _rows(shape: Sequence[int]) -> str:
    """Samples and tokens of a value, [b, ..., n, d]."""
    return f"{shape[0]} x {shape[-2]} tokens" if len(shape) > 2 else f"{shape[0]} tokens"


def _where(site: Site) -> str:
    return f"site {site.id}, {site.name} ({site.kind.value})"
