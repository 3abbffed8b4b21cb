"""``torch.compile(backend="dicache")`` under context parallelism."""

from __future__ import annotations

import pytest
import torch

from dicompile.errors import PlansDiffer, UnsupportedParallelism
from tests.parallel.processes import Ranks, ranks_of
from tests.parallel.test_ranks import NEAR, TOKENS

pytestmark = [TOKENS, pytest.mark.nightly]


ranks = ranks_of("tests.parallel.bare")


def test_ranks_that_share_tokens_get_what_optimize_gives_and_reuse_without_each_other(ranks: Ranks) -> None:
    for first, again, counts, wanted in ranks("tokens"):
        torch.testing.assert_close(first, wanted, **NEAR)
        assert torch.equal(again, first)
        assert counts == [9, 9, 1, 9]  # the result is gathered, and four exchanges for each of two attentions


@pytest.mark.parametrize(("name", "error", "text"), [
    ("gate", UnsupportedParallelism, "decides by the tokens of its rank"),
    ("different policies", PlansDiffer, "2 different plans on 2 ranks"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    ranks: Ranks, name: str, error: type[Exception], text: str
) -> None:
    ranks.check_refused(name, error, text)
