"""``torch.compile(backend="dicache")`` under context parallelism and with FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dicompile.errors import PlansDiffer, UnsupportedParallelism
from tests.parallel.bare import BRIEF, CASES, work
from tests.parallel.ranks import check_refused, found, run
from tests.parallel.test_ranks import NEAR, TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("ranks")
    run(work, path, list(CASES) if "nightly" in request.config.getoption("markexpr") else BRIEF)
    return path


@TOKENS
@pytest.mark.nightly
def test_ranks_that_share_tokens_get_what_optimize_gives_and_reuse_without_each_other(folder: Path) -> None:
    for first, again, counts, wanted in found(folder, "tokens"):
        torch.testing.assert_close(first, wanted, **NEAR)
        assert torch.equal(again, first)
        assert counts == [9, 9, 1, 9]  # the result is gathered, and four exchanges for each of two attentions


@pytest.mark.parametrize("name", ["weights, by_block", pytest.param("weights, whole", marks=pytest.mark.nightly)])
def test_sharded_weights_give_the_bits_of_whole_ones(folder: Path, name: str) -> None:
    for results, wanted, is_plain in found(folder, name):
        assert torch.equal(results, wanted)
        assert is_plain == [True, True, False, True]


@TOKENS
@pytest.mark.nightly
@pytest.mark.parametrize(("name", "error", "text"), [
    ("gate", UnsupportedParallelism, "decides by the tokens of its rank"),
    ("different policies", PlansDiffer, "2 different plans on 2 ranks"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    folder: Path, name: str, error: type[Exception], text: str
) -> None:
    check_refused(folder, name, error, text)
