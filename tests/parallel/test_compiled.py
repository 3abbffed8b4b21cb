"""Compiled code under context parallelism: results of eager steps, the same exchanges, no rank left waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.compiled import AGAIN, CASES
from tests.parallel.processes import Ranks, ranks_of, started
from tests.parallel.test_ranks import NEAR, TOKENS

CALLS = {"flux": 1, "wan": 2, "qwen image": 2}
"""Of the denoiser at one step."""
pytestmark = [TOKENS, pytest.mark.nightly]


ranks = ranks_of("tests.parallel.compiled")


@pytest.mark.parametrize("name", [name for name in CASES if "," in name])
def test_compiled_code_gives_what_single_operators_give_and_exchanges_as_much(ranks: Ranks, name: str) -> None:
    for first, again, counts, wanted, exchanged in ranks(name):
        torch.testing.assert_close(first, wanted, **NEAR)
        assert torch.equal(again, first)
        assert counts == exchanged
        full, _, reusing, last = counts
        assert reusing == CALLS[name.partition(",")[0]]  # the result is gathered
        assert full == last > reusing


def test_a_rank_that_compiles_is_awaited_by_one_that_need_not(ranks: Ranks) -> None:
    (wanted, warm, none), (_, cold, some) = ranks("cold")
    assert torch.equal(warm, wanted)
    assert torch.equal(cold, wanted)
    assert none == 0 < some


def test_what_all_ranks_prepare_is_compiled_at_once(ranks: Ranks) -> None:
    for latent, compilations in ranks("prepared"):
        torch.testing.assert_close(latent, ranks("flux, fora")[0][0], **NEAR)
        assert compilations == 0


def test_other_processes_find_what_these_have_compiled(ranks: Ranks, tmp_path: Path) -> None:
    for name in AGAIN:
        ranks(f"{name}, fora")
    with started("tests.parallel.compiled", tmp_path) as others:
        for name in AGAIN:
            for latent, compilations in others(f"{name} again"):
                assert torch.equal(latent, ranks(f"{name}, fora")[0][0])
                assert compilations == 0
