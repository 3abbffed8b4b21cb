"""Models that FSDP has sharded: bits of whole ones, nothing gathered for what is skipped, no rank left waiting."""

from __future__ import annotations

import pytest
import torch

from dicompile.errors import PlansDiffer, UnsupportedModel, UnsupportedParallelism
from tests.parallel.processes import Ranks, ranks_of
from tests.parallel.shards import CASES

TELLING = 32
"""Bytes of what two ranks tell each other before a call."""


ranks = ranks_of("tests.parallel.shards")


SAME = [name for name in CASES if name.startswith(("dit", "given back", "flux"))]


@pytest.mark.parametrize("name", [*SAME, "later", "changed", "other shapes", "threads"])
@pytest.mark.sampled
def test_every_rank_gets_the_bits_of_the_whole_model(ranks: Ranks, name: str) -> None:
    first, second = ranks(name)
    for results, wanted, *_ in (first, second):
        assert torch.equal(results, wanted)
    assert name == "threads" or not torch.equal(first[0], second[0])  # ranks have pictures of their own


@pytest.mark.parametrize(("policy", "kind"), [("fora", "reuse"), ("duca", "partial")])
def test_a_step_brings_what_it_computes_alone(ranks: Ranks, policy: str, kind: str) -> None:
    for *_, kinds, brought, weights in ranks(f"flux, {policy}"):
        assert set(kinds) == {"full", kind}
        assert brought["full"] == weights
        assert brought[kind] < 0.7 * weights


def test_what_is_reused_or_computed_already_is_not_exchanged(ranks: Ranks) -> None:
    for steps, most, left, kinds, weights in ranks("exchanged"):
        first, full, reusing, last = steps
        assert all(step[0] == TELLING for step in steps)
        assert reusing[1:] == [size for size in full[1:] if size != max(full)]  # neither of the two blocks
        assert first[-len(full) + 1 :] == full[1:] == last[1:]
        assert len(first) > len(full)  # what no latent reaches is computed once
        assert sum(reusing) < sum(full) / 4
        assert most == max(map(max, steps)) < weights / 3  # a block
        assert left == 0
        assert set(kinds) == {"DTensor"}


@pytest.mark.parametrize("name", ["bare, by_block", pytest.param("bare, whole", marks=pytest.mark.nightly)])
def test_the_bare_backend_gives_the_bits_of_the_whole_model(ranks: Ranks, name: str) -> None:
    for results, wanted, is_plain in ranks(name):
        assert torch.equal(results, wanted)
        assert is_plain == [True, True, False, True]


@pytest.mark.nightly
def test_weights_come_in_the_dtype_of_the_mixed_precision_policy(ranks: Ranks) -> None:
    for results, wanted, brought, weights in ranks("half precision"):
        assert results.dtype == torch.bfloat16
        assert torch.equal(results, wanted)
        assert brought == weights


@pytest.mark.parametrize("name", ["casts", pytest.param("casts, grouped", marks=pytest.mark.nightly)])
def test_fsdp_casts_what_goes_in_and_out_in_captures_too(ranks: Ranks, name: str) -> None:
    for results, wanted, is_repeated, captures in ranks(name):
        assert results.dtype == torch.float32
        assert torch.equal(results, wanted)  # of FSDP's own forward
        assert is_repeated
        assert captures == 1


def test_a_model_that_is_optimized_is_not_sharded_as_a_whole(ranks: Ranks) -> None:
    for results, wanted, told, is_whole in ranks("wrong order"):
        assert torch.equal(results, wanted)
        assert is_whole
        assert "restore(model), then fully_shard(model), then dicompile.optimize(model" in told


def test_ranks_need_not_find_the_same_tables(ranks: Ranks) -> None:
    for name in ("alike on one rank", "changed on one rank"):
        first, second = ranks(name)
        for results, wanted, _ in (first, second):
            assert torch.equal(results, wanted)
        assert first[2] == second[2]
    sizes = [sum(step) for step in ranks("alike on one rank")[0][2]]
    assert sizes[2] < sizes[1] < sizes[0]
    changed = [sum(step) for step in ranks("changed on one rank")[0][2]]
    assert [sizes[0], sizes[1], sizes[3]] == [changed[0], changed[1], changed[3]]
    assert changed[2] - sizes[2] == sizes[0] - sizes[1]  # there all ranks compute for that step what one has to


def test_weights_of_all_kinds_are_put_together_in_one_exchange(ranks: Ranks) -> None:
    for same, dtypes in ranks("put together"):
        assert same == [True] * 4
        assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.int8]


@pytest.mark.parametrize(("name", "error", "text"), [
    ("gate", UnsupportedParallelism, "decides by the samples of its rank"),
    ("background", UnsupportedParallelism, "as soon as its own code is compiled"),
    ("calibrated", UnsupportedParallelism, "a recording holds the samples of its rank"),
    ("different policies", PlansDiffer, "take different steps"),
    ("parts of tokens", UnsupportedModel, "model.enable_parallelism"),
    ("split heads", UnsupportedModel, "divided by tensor parallelism, and its weights sharded by FSDP"),
    ("first", UnsupportedModel, "sharded by the first FSDP"),
    ("other ranks", UnsupportedModel, "are sharded over different ranks"),
    ("offloaded", UnsupportedModel, "some weights of FSDPPlainDiT are sharded by FSDP, and others offloaded"),
    ("recorded", UnsupportedModel, "a CUDA graph reads weights where they lay"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    ranks: Ranks, name: str, error: type[Exception], text: str
) -> None:
    ranks.check_refused(name, error, text)


def test_a_rank_that_dies_is_an_error_on_the_others(ranks: Ranks) -> None:
    ranks.check_a_death_is_told()
