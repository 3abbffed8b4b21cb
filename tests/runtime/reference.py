"""The plain DiT with caching, once more and straightforwardly: what the planned and rewritten one must agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dicompile.plan import Action, ScoreBase, What
from tests.models import PlainBlock, PlainDiT


@dataclass
class Memory:
    """What a site remembers.

    Attributes:
        values: stored values, the newest first; None where nothing was stored yet.
        stamp: per token, the clock after the step that refreshed it last; [b, n].
        clock: steps since the plan computed the site whole.
    """

    values: list[Tensor | None] = field(default_factory=lambda: [None, None, None])
    stamp: Tensor | None = None
    clock: int = 0


class Reference:
    """Runs a table of actions: one row per step, one action per site (attention and MLP of every block).

    Args:
        network: the model.
        rows: the table.
    """

    def __init__(self, network: PlainDiT, rows: Sequence[Sequence[Action]]) -> None:
        self.network, self.rows = network, rows
        self.sites = [Memory() for _ in rows[0]]
        self.received: dict[int, Tensor] = {}

    def step(self, number: int, x: Tensor, t: Tensor, y: Tensor, chosen: Mapping[int, Tensor]) -> Tensor:
        """Output of the model at a step; `chosen` are the tokens to refresh, by site."""
        row = self.rows[number]
        for site, action in zip(self.sites, row, strict=True):
            site.clock = 0 if action.is_full else site.clock
        with torch.no_grad():
            output = self._forward(x, t, y, row, chosen)
        for site, action in zip(self.sites, row, strict=True):
            site.clock += not action.is_full
        return output

    def _forward(self, x: Tensor, t: Tensor, y: Tensor, row: Sequence[Action], chosen: Mapping[int, Tensor]) -> Tensor:
        network = self.network
        h = network.embed(x).flatten(2).transpose(1, 2) + network.position
        frequency = torch.exp(-torch.arange(network.width // 2, dtype=torch.float32) / (network.width // 2) * 9.21)
        angle = t[:, None].float() * frequency[None]
        c = network.time(torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)) + network.label(y)
        for number, block in enumerate(network.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in block.modulation(c).chunk(6, dim=1))

            def attend(h: Tensor, block: PlainBlock = block, a: Tensor = scale1, b: Tensor = shift1) -> Tensor:
                return block.attended(block.norm1(h) * (1 + a) + b)

            def mlp(h: Tensor, block: PlainBlock = block, a: Tensor = scale2, b: Tensor = shift2) -> Tensor:
                return block.mlp(block.norm2(h) * (1 + a) + b)

            if row[2 * number].is_full:
                self.received[number] = attention_received(block, block.norm1(h) * (1 + scale1) + shift1)
            h = h + self._site(2 * number, row, gate1, attend, h, None, block.proj)
            h = h + self._site(2 * number + 1, row, gate2, mlp, h, chosen.get(2 * number + 1))
        shift, scale = (m[:, None] for m in network.modulation(c).chunk(2, dim=1))
        h = network.head(network.norm(h) * (1 + scale) + shift)
        side = x.shape[-1] // network.patch
        h = h.reshape(len(x), side, side, network.patch, network.patch, 4)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(x.shape)

    def _site(
        self, number: int, row: Sequence[Action], gate: Tensor, branch: Callable[[Tensor], Tensor], h: Tensor,
        chosen: Tensor | None, project: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Tensor:  # fmt: skip
        """Gated update of a site; `project` follows the attention of the branch."""
        site, action = self.sites[number], row[number]
        inner, outer = {
            What.CORE: (lambda h: project(branch(h)), lambda value: gate * value),
            What.UPDATE: (lambda h: gate * project(branch(h)), lambda value: value),
            What.ATTENTION: (branch, lambda value: gate * project(value)),
        }[action.what]
        weights = action.weights
        value = torch.zeros_like(h)
        for weight, old in zip(weights[1:], site.values, strict=False):
            if weight:
                assert old is not None
                value = value + weight * old
        if chosen is not None:
            self._check_ranking(number, action, chosen)
            rows = chosen[..., None].expand(-1, -1, h.shape[-1])
            value = value.scatter(1, rows, inner(h.gather(1, rows)))
            assert site.stamp is not None
            site.stamp = site.stamp.scatter(1, chosen, site.clock + 1)
            if weights == (1.0, 1.0):
                site.values[0] = value
            return outer(value)
        if weights[0]:
            fresh = inner(h)
            value = value + weights[0] * fresh
            site.values = [fresh, *site.values[:-1]]
        if action.is_full:
            site.stamp = torch.zeros(h.shape[:2], dtype=torch.int64)
        return outer(value)

    def _check_ranking(self, number: int, action: Action, chosen: Tensor) -> None:
        """No token that was left out ranks above one that was chosen."""
        assert action.tokens is not None
        assert chosen.shape[1] == action.tokens.count
        assert all(len(set(row)) == len(row) for row in chosen.tolist())
        score = action.tokens.score
        if score.base is not ScoreBase.ATTENTION:
            return
        base, stamp = self.received[number // 2], self.sites[number].stamp
        assert stamp is not None
        rank = base / base.norm(dim=1, keepdim=True) + score.age_weight * (self.sites[number].clock - stamp)
        lowest = rank.gather(1, chosen).min(1).values
        highest = rank.scatter(1, chosen, -torch.inf).max(1).values
        assert (lowest >= highest - 1e-4).all()


def attention_received(block: PlainBlock, x: Tensor) -> Tensor:
    """Mean over heads and sum over queries of the attention map; [b, n]."""
    b, n, d = x.shape
    query, key, _ = block.qkv(x).view(b, n, 3, block.heads, d // block.heads).permute(2, 0, 3, 1, 4)
    return (query @ key.transpose(-2, -1) * (d // block.heads) ** -0.5).softmax(-1).mean(1).sum(1)
