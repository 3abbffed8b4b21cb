"""rejoin-parts: a value that is split and joined again is taken as it is; parts in another order are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicompile.passes import Value
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.rejoin_parts import RejoinParts
from tests.passes.segments import FULL, TOKENS, Mlp, chain, cut, reported, run_segment

Join = Callable[[Tensor], Tensor]
WORDS = 5


class Joined(Mlp):
    """An MLP of a stream that is split, and joined again, in one way or another."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.join(x))))


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x[:, :WORDS], x[:, WORDS:]], dim=1)


def split_and_chunked(x: Tensor) -> Tensor:
    x = torch.cat(x.split([WORDS, TOKENS - WORDS], dim=-2), dim=1)
    return torch.cat(x.chunk(2, dim=-1), dim=-1)


OTHERS: dict[str, Join] = {
    "another order": lambda x: torch.cat([x[:, WORDS:], x[:, :WORDS]], dim=1),
    "another axis": lambda x: torch.cat([x[:, : TOKENS // 2], x[:, TOKENS // 2 :]], dim=0).reshape(x.shape),
    "a part twice": lambda x: torch.cat([x[:, : TOKENS // 2], x[:, : TOKENS // 2]], dim=1),
    "a part of a part": lambda x: torch.cat([x[:, :WORDS], x[:, WORDS:-1]], dim=1).repeat(1, 2, 1)[:, :TOKENS],
    "every other token": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], dim=1),
    "parts of two values": lambda x: torch.cat([x[:, :WORDS], (x + 1)[:, WORDS:]], dim=1),
}


def operators(block: nn.Module, *, changes: bool) -> str:
    """Text of a block's segment after the pass, which has to leave its numbers as they are."""
    found = cut(chain(block))
    segment, reports = reported(found.segment, [FULL], RejoinParts(), DropDead())
    assert bool(reports[0].changed) is changes
    assert torch.equal(run_segment(segment, found.arguments)[Value(0)], found.output())
    return str(segment)


@pytest.mark.parametrize("join", [sliced, split_and_chunked])
def test_all_parts_in_order_are_the_value_itself(join: Join) -> None:
    text = operators(Joined(join), changes=True)
    assert not any(word in text for word in ("cat", "slice", "split"))


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_stays(name: str) -> None:
    assert "cat" in operators(Joined(OTHERS[name]), changes=False)
