"""Can this model do what that policy asks for? If not, which operator forbids it."""

from __future__ import annotations

import math

from dicompile.analysis import ModelStructure, Site, TokenWise
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan.action import ScoreBase
from dicompile.plan.rows import STORES_NO_ATTENTION, refreshed, score_source, why_not_refreshed
from dicompile.plan.schema import Policy, Refresh, Rule, TokenScore, TokenTable


def choose_setting(policy: Policy, structure: ModelStructure) -> Policy:
    """The setting of a policy that is meant for a model of this kind: itself, or one of its `elsewhere`.

    Raises:
        PolicyDoesNotFit: neither the policy nor any of them fits; the text is about the policy itself.
    """
    kinds = {site.kind.value for site in structure.sites}
    axes = len(structure.grid or ())
    meant = [e for e in policy.elsewhere if kinds.issuperset(e.sites) and e.grid_axes in (None, axes)]
    candidates = [*(e.policy for e in meant if e.sites), policy, *(e.policy for e in meant if not e.sites)]
    for candidate in candidates:
        try:
            check_fits(candidate, structure)
        except PolicyDoesNotFit:
            continue
        return candidate
    check_fits(policy, structure)
    return policy


def check_fits(policy: Policy, structure: ModelStructure) -> None:
    """Raise if the policy asks for something that the model cannot do.

    Raises:
        PolicyDoesNotFit: a site to be refreshed mixes tokens, has no attention to be scored by, or shares it with a
            site that wants another score; the token grid or batch does not allow the score; a rule names spans that the
            model does not have, or a value that a site does not have.
    """
    for rule in policy.rules:
        _check_named(policy, structure, rule)
    for site in structure.everything:
        _check_one_value(policy, site)
    for site, do in refreshed(structure, policy):
        _check_tokens(policy, site, do)
        _check_score(policy, structure, site, do.score)
    _check_one_score(policy, structure)


def _check_named(policy: Policy, structure: ModelStructure, rule: Rule) -> None:
    named = [site for site in structure.everything if rule.names(site)]
    spans = [name for name in rule.sites if name in ("block", "stack")]
    if spans and structure.sites and not any(site.kind.value in spans for site in named):
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} reuses a whole {spans[0]}, but the model has none",
            where="analysis",
            why="no two branches follow each other on one stream",
            fix="use a policy that reuses single branches, such as dicompile.FORA(interval=3)",
        )
    what = rule.recall.what
    for site in named:
        if what in (("core", "attention") if site.kind.is_span else ("stream",)):
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


def _check_one_value(policy: Policy, site: Site) -> None:
    whats = sorted({rule.recall.what for rule in policy.rules if rule.names(site)} - {"attention"})
    if len(whats) > 1:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} stores two values of one {'span' if site.kind.is_span else 'branch'}",
            where=_where(site),
            why=f"its rules want {' and '.join(whats)}",
            fix="give all rules for this kind of site the same 'what'",
        )


def _check_tokens(policy: Policy, site: Site, do: Refresh | TokenTable) -> None:
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
    readable = source.tokens.wise is TokenWise.YES if base is ScoreBase.ENTROPY else source.keys[1] > 0
    if not readable:
        raise PolicyDoesNotFit(
            f"policy {policy.name!r} ranks tokens by {base.value}, but the attention is not over the same tokens",
            where=_where(site),
            why=source.tokens.reason,
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


def _where(site: Site) -> str:
    return f"site {site.id}, {site.name} ({site.kind.value})"
