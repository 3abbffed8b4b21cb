"""Models whose layers tensor parallelism has divided: results of one rank, no sums over ranks for what is reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dicompile.errors import PlansDiffer, UnsupportedModel, UnsupportedParallelism
from tests.parallel.layers import CASES, LATER, LATER_RUNS, RUNS, die, one, work
from tests.parallel.ranks import check_refused, folder_of, found, run
from tests.parallel.test_ranks import NEAR

folder = folder_of(work, CASES)
later = folder_of(work, LATER)


def check_run(folder: Path, name: str, runs: dict[str, object]) -> list[int]:
    """Check that both ranks did what one does, twice; returns the exchanges of each step."""
    (first, again, counts, plan), (other, *_, other_counts, other_plan) = found(folder, name)
    torch.testing.assert_close(first, one(runs[name]), **NEAR)  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert torch.equal(first, other)
    assert counts == other_counts
    assert plan == other_plan
    return counts  # type: ignore[no-any-return]


def test_steps_that_reuse_need_no_other_rank(folder: Path) -> None:
    assert check_run(folder, "flux, fora", RUNS) == [5, 0, 5, 5]


def test_published_settings_sum_what_they_compute_and_all_ranks_choose_the_same_tokens(folder: Path) -> None:
    assert check_run(folder, "flux, toca", RUNS)


def test_torch_runs_the_model_as_before_when_it_is_given_back(folder: Path) -> None:
    for plain, disabled, restored, cached, edited, replaced, frames, is_same in found(folder, "given back"):
        assert torch.equal(plain, disabled)
        assert torch.equal(plain, restored)
        assert is_same
        assert not torch.equal(cached, edited)
        assert torch.equal(cached, replaced)
        assert frames == 1


@pytest.mark.parametrize(("name", "error", "text"), [
    ("different policies", PlansDiffer, "2 different plans on 2 ranks"),
    ("gathered", UnsupportedModel, "where: proj_out"),
    ("scattered", UnsupportedModel, "where: proj_out"),
    ("normalised", UnsupportedModel, "it is a LayerNorm, and no linear layer"),
    ("sharded", UnsupportedModel, "weights sharded by FSDP"),
    ("tokens", UnsupportedModel, "tokens split over ranks"),
    ("other ranks", UnsupportedModel, "divided among different ranks"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    folder: Path, name: str, error: type[Exception], text: str
) -> None:
    check_refused(folder, name, error, text)


@pytest.mark.nightly
@pytest.mark.parametrize("name", LATER_RUNS)
def test_every_way_to_choose_tokens_is_that_of_one_rank(later: Path, name: str) -> None:
    check_run(later, name, LATER_RUNS)


@pytest.mark.nightly
def test_layers_may_be_divided_later(later: Path) -> None:
    for latent in found(later, "afterwards"):
        torch.testing.assert_close(latent, one(RUNS["flux, fora"]), **NEAR)


@pytest.mark.nightly
def test_compiled_code_sums_over_ranks_as_often(later: Path) -> None:
    for wanted, first, again, counts in found(later, "compiled"):
        torch.testing.assert_close(first, wanted, **NEAR)
        assert torch.equal(first, again)
        assert counts == [5, 0, 5, 5]


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "error", "text"), [
    ("gate", UnsupportedParallelism, "whose last bits may be others on other ranks"),
    ("clusters", UnsupportedParallelism, "clusters tokens by values"),
    ("calibrated", UnsupportedParallelism, "every rank records values"),
    ("bare", UnsupportedModel, "dicompile.optimize"),
])  # fmt: skip
def test_what_could_differ_between_ranks_is_refused(later: Path, name: str, error: type[Exception], text: str) -> None:
    check_refused(later, name, error, text)


@pytest.mark.nightly
def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    run(die, tmp_path)
    assert (tmp_path / "told").read_text()
