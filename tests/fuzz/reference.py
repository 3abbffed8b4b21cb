"""The same models under a plan, once more and straightforwardly: what the rewritten ones must agree with.

Everything is computed for all tokens, and chosen ones are taken out of that: no operator has to be narrowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dicompile.analysis import ModelStructure, Site, SiteKind, Span
from dicompile.plan import Action, Context, Plan, ScoreBase, StepPlan, What
from tests.fuzz.nets import Attend, Net, NetKind, Project

Chosen = Mapping[int, Tensor]
"""Indices of the tokens that were refreshed, by number of site or span."""


@dataclass
class Memory:
    """What a site or span remembers.

    Attributes:
        values: stored values, the newest first.
        attention: of the last time that all of it was computed.
        seen: keys and values of that attention, by head.
        query: its queries.
        stamp: per token, the clock after the step that refreshed it last; [b, n].
    """

    values: list[Tensor] = field(default_factory=list)
    attention: Tensor | None = None
    seen: tuple[Tensor, Tensor, Tensor] | None = None
    stamp: Tensor | None = None
    clock: int = 0


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def with_rows(x: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    return x.scatter(1, rows[..., None].expand(-1, -1, x.shape[-1]), fresh)


class Reference(Net):
    """A model that follows a plan."""

    structure: ModelStructure
    row: StepPlan
    chosen: Chosen

    @classmethod
    def like(cls, kind: NetKind, structure: ModelStructure) -> Reference:
        """A model with the weights of ``Net.of(kind)``."""
        model = cls.of(kind)
        assert isinstance(model, cls)
        model.structure = structure
        model.memory = [Memory() for _ in structure.everything]
        return model

    def step(self, plan: Plan, number: int, chosen: Chosen, latent: Tensor, timestep: Tensor) -> Tensor:
        """Output at a step."""
        self.row, self.chosen = plan.steps[number], chosen
        self.numbers: Iterator[int] = iter(range(len(self.structure.sites)))
        self.starts: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        for memory, site in zip(self.memory, self.row.sites, strict=True):
            memory.clock = 0 if site.action.is_full else memory.clock
        with torch.no_grad():
            output: Tensor = self(latent, timestep, **self.kind.conditioning())
        for memory, site in zip(self.memory, self.row.sites, strict=True):
            memory.clock += not site.action.is_full and not site.action.is_skip
        assert not list(self.numbers), "there are more sites than branches"
        return output

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.seen = query, key, value
        return super().attention(query, key, value)

    def site(self, stream: str, x: Tensor, gate: Tensor, attend: Attend | None, project: Project) -> Tensor:
        site = self.structure.sites[next(self.numbers)]
        around = [span for span in self.structure.spans if site.id in span.inside]
        for span in reversed(around):  # the widest first
            if span.inside[0] == site.id:
                x = self.enter(span, x)
        if any(self.action(span).tokens for span in around):
            rows = next((self.kept[span.id] for span in around if span.id in self.kept), None)
            x = x + gate * project(attend(x, rows) if attend else None, x, rows)
        elif not self.action(site).is_skip:
            x = self.branch(site, x, gate, attend, project)
        for span in around:
            if span.inside[-1] == site.id:
                x = self.leave(span, x)
        return x

    def action(self, site: Site) -> Action:
        return self.row.sites[site.id].action

    def enter(self, span: Span, x: Tensor) -> Tensor:
        self.starts[span.id] = x
        tokens = self.action(span).tokens
        if tokens is None or tokens.context is not Context.KEPT:
            return x
        self.kept[span.id] = self.chosen[span.id]
        return rows_of(x, self.chosen[span.id])

    def leave(self, span: Span, end: Tensor) -> Tensor:
        action, start = self.action(span), self.starts[span.id]
        if action.is_skip:
            return end
        is_stream = action.what is What.STREAM
        if action.tokens is not None:
            chosen = self.chosen[span.id]
            self.check_ranking(span, action, chosen, start)
            if span.id not in self.kept:
                end = rows_of(end, chosen)
            fresh = end if is_stream else end - rows_of(start, chosen)
            value = self.refreshed(span, action, chosen, fresh)
        elif action.computes:
            value = self.mixed(span, action, end if is_stream else end - start)
        else:
            value = self.mixed(span, action, None)
        return value if is_stream else start + value

    def branch(self, site: Site, x: Tensor, gate: Tensor, attend: Attend | None, project: Project) -> Tensor:
        action, memory = self.action(site), self.memory[site.id]
        attended = attend(x, None) if attend else None
        if action.tokens is not None:
            chosen = self.chosen[site.id]
            self.check_ranking(site, action, chosen, x)
            if action.tokens.context is Context.STORED and site.kind is SiteKind.PARALLEL:
                attended = memory.attention
            if action.tokens.context is Context.KEPT and attend and site.kind is SiteKind.PARALLEL:
                kept = rows_of(x, chosen)
                core = project(attend(kept, chosen), kept, chosen)
            else:
                core = rows_of(project(attended, x, None), chosen)
            fresh = gate * core if action.what is What.UPDATE else core
            value = self.refreshed(site, action, chosen, fresh)
        elif action.what is What.ATTENTION:
            if action.is_full:
                memory.seen = self.seen
            attended = self.mixed(site, action, attended if action.computes else None)
            return x + gate * project(attended, x, None)
        else:
            core = project(attended, x, None)
            fresh = gate * core if action.what is What.UPDATE else core
            value = self.mixed(site, action, fresh if action.computes else None)
            if action.is_full and attended is not None:
                memory.attention, memory.seen = attended, self.seen
        return x + (value if action.what is What.UPDATE else gate * value)

    def mixed(self, site: Site, action: Action, fresh: Tensor | None) -> Tensor:
        """Sum of the fresh value and the stored ones."""
        memory = self.memory[site.id]
        stored = zip(action.weights[1:], memory.values, strict=False)
        parts = [weight * old for weight, old in stored if weight]
        if fresh is not None:
            parts.insert(0, action.weights[0] * fresh)
            memory.values = [fresh, *memory.values[:3]]
        if action.is_full:
            memory.stamp = torch.zeros(parts[0].shape[:2], dtype=torch.int64)
        assert len(parts) == sum(map(bool, action.weights)), "the plan reads what was never stored"
        return torch.stack(parts).sum(0)

    def refreshed(self, site: Site, action: Action, chosen: Tensor, fresh: Tensor) -> Tensor:
        """The fresh rows among the recalled ones."""
        memory = self.memory[site.id]
        recalled = torch.stack([w * old for w, old in zip(action.weights[1:], memory.values, strict=False)]).sum(0)
        value = with_rows(recalled, chosen, fresh)
        if action.refreshes_store:
            memory.values[0] = value
        assert memory.stamp is not None
        memory.stamp = memory.stamp.scatter(1, chosen, memory.clock + 1)
        return value

    def check_ranking(self, site: Site, action: Action, chosen: Tensor, x: Tensor) -> None:
        """The right number of different tokens, and none that was left out ranks above one of them."""
        assert action.tokens is not None
        score = action.tokens.score
        assert chosen.shape == (len(x), action.tokens.count)
        assert all(len(set(row)) == len(row) for row in chosen.tolist())
        base = self.score(site, score.base, x)
        if base is None or score.share_guidance or score.grid_cell:
            return
        stamp = self.memory[site.id].stamp
        assert stamp is not None
        rank = base / base.norm(dim=1, keepdim=True) + score.age_weight * (self.memory[site.id].clock - stamp)
        lowest = rank.gather(1, chosen).min(1).values
        highest = rank.scatter(1, chosen, -torch.inf).max(1).values
        assert (lowest >= highest - 1e-4).all(), f"site {site.id}: tokens are ranked otherwise"

    def score(self, site: Site, base: ScoreBase, x: Tensor) -> Tensor | None:
        """Score base of all tokens, [b, n]; None for those that are not checked here."""
        if base is ScoreBase.NORM:
            return x.norm(dim=-1)
        if base not in (ScoreBase.ATTENTION, ScoreBase.VALUE_NORM):
            return None
        block = self.structure.blocks[site.block]
        source = next(
            s for s in self.structure.sites_of(block)
            if s.stream == site.stream and s.kind.is_attention and s.kind is not SiteKind.CROSS_ATTENTION
        )  # fmt: skip
        seen = self.memory[source.id].seen
        assert seen is not None
        query, key, value = seen
        if base is ScoreBase.VALUE_NORM:
            raw = (1 - value.norm(dim=-1)).sum(1)
        else:
            raw = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1).mean(1).sum(1)
        first = self.kind.blocks[site.block].registers
        is_joint = source.kind is SiteKind.JOINT_ATTENTION
        if is_joint and tuple(source.shape)[1] != self.kind.text:
            first += self.kind.text
        own = raw[:, first : first + (source.shape[1] if raw.shape[0] == len(x) else raw.shape[1])]
        return own.reshape(len(x), -1)
