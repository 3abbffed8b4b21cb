"""Models whose layers tensor parallelism has divided: results of one rank, no sums over ranks for what is reused."""

from __future__ import annotations

import pytest
import torch

from dicompile.errors import CannotBatch, PlansDiffer, PolicyDoesNotFit, UnsupportedModel, UnsupportedParallelism
from tests.parallel.layers import COMPILED, RUNS
from tests.parallel.processes import Ranks, ranks_of
from tests.parallel.ranks import cached, check_layers
from tests.parallel.test_ranks import NEAR
from tests.pipelines.pipes import PIPELINES

pytestmark = pytest.mark.nightly


ranks = ranks_of("tests.parallel.layers")


@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_divide_layers_do_what_one_does(ranks: Ranks, name: str) -> None:
    pipeline, policy = RUNS[name]
    check_layers(ranks(name), cached(PIPELINES[pipeline](), policy))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_sums_over_ranks_as_often(ranks: Ranks, name: str) -> None:
    for (wanted, _, exchanged, plan), (first, again, counts, compiled) in ranks(f"compiled {name}"):
        torch.testing.assert_close(first, wanted, **NEAR)
        assert torch.equal(first, again)
        assert counts == exchanged
        assert compiled == plan


def test_torch_runs_the_model_as_before_when_it_is_given_back(ranks: Ranks) -> None:
    for plain, disabled, restored, with_cache, edited, replaced, frames, is_same in ranks("given back"):
        assert torch.equal(plain, disabled)
        assert torch.equal(plain, restored)
        assert is_same
        assert not torch.equal(with_cache, edited)
        assert torch.equal(with_cache, replaced)
        assert frames == 1


@pytest.mark.parametrize(("name", "error", "text"), [
    ("different policies", PlansDiffer, "2 different plans on 2 ranks"),
    ("gathered", UnsupportedModel, "where: proj_out"),
    ("scattered", UnsupportedModel, "where: proj_out"),
    ("normalised", UnsupportedModel, "it is a LayerNorm, and no linear layer"),
    ("unevenly", UnsupportedModel, "15 rows or columns are not divided evenly among 2 ranks"),
    ("sharded", UnsupportedModel, "weights sharded by FSDP"),
    ("tokens", UnsupportedModel, "tokens split over ranks"),
    ("other ranks", UnsupportedModel, "divided among different ranks"),
    ("gate", UnsupportedParallelism, "whose last bits may be others on other ranks"),
    ("clusters", UnsupportedParallelism, "clusters tokens by values"),
    ("calibrated", UnsupportedParallelism, "a recording holds values"),
    ("background", UnsupportedParallelism, "as soon as its own code is compiled"),
    ("served", CannotBatch, "exchanges values with other ranks"),
    ("predicted", UnsupportedParallelism, "chooses by values whose last bits"),
    ("entropy", PolicyDoesNotFit, "every rank has other heads of the attention"),
    ("bare", UnsupportedModel, "dicompile.optimize"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    ranks: Ranks, name: str, error: type[Exception], text: str
) -> None:
    ranks.check_refused(name, error, text)


def test_a_rank_that_dies_is_an_error_on_the_others(ranks: Ranks) -> None:
    ranks.check_a_death_is_told()
