"""Two ranks give what one rank gives, skip the collectives of what they skip, and never wait for each other in vain."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dicompile import FORA
from dicompile.errors import CannotBatch, InvalidSetting, PlansDiffer, UnsupportedModel, UnsupportedParallelism
from tests.learn.flows import trained
from tests.parallel.processes import Ranks, ranks_of
from tests.parallel.ranks import CHOOSING, LOCAL, STEPS, by_place, cached, check_layers, guided, scores, two_prompts
from tests.pipelines.pipes import PIPELINES, flux_transformer

NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
"""Sums over heads or keys in another order."""
TOKENS = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="Dynamo of torch 2.11 cannot follow the gathering of tokens: refused by name"
)
NIGHTLY = pytest.mark.nightly


ranks = ranks_of("tests.parallel.ranks")


def test_every_rank_may_have_requests_of_its_own(ranks: Ranks) -> None:
    one = cached(PIPELINES["flux"](), FORA(interval=2))
    for rank, latent in enumerate(ranks("data")):
        torch.testing.assert_close(latent, one(STEPS, seed=rank), **NEAR)


def test_every_rank_may_have_one_half_of_guidance(ranks: Ranks) -> None:
    one = two_prompts(flux_transformer(), [0, 1], guided)
    for latent in ranks("guidance"):
        torch.testing.assert_close(latent, one, **NEAR)


@TOKENS
@pytest.mark.parametrize(("name", "calls", "blocks"), [
    ("flux", 1, 2), pytest.param("wan", 2, 1, marks=NIGHTLY), pytest.param("qwen image", 2, 2, marks=NIGHTLY),
])  # fmt: skip
def test_ranks_that_share_tokens_give_what_one_gives_and_reuse_without_each_other(
    ranks: Ranks, name: str, calls: int, blocks: int
) -> None:
    one = cached(PIPELINES[name](), FORA(interval=2))(STEPS)
    for latent, counts in ranks(f"tokens of {name}"):
        torch.testing.assert_close(latent, one, **NEAR)
        reusing, full = counts[2:]  # the steps before are captured, too
        assert reusing == calls  # the result is gathered
        assert full >= calls * (1 + 4 * blocks)  # and queries, keys, values and result of every attention are exchanged


@TOKENS
def test_tokens_may_be_shared_later(ranks: Ranks) -> None:
    for latent in ranks("tokens afterwards"):
        torch.testing.assert_close(latent, ranks("tokens of flux")[0][0], **NEAR)


def test_a_capture_that_names_a_group_of_ranks_is_for_one_model(ranks: Ranks) -> None:
    assert [int(count) for count in ranks("two models")] == [2, 2]


@NIGHTLY
@TOKENS
def test_ranks_choose_among_their_own_tokens(ranks: Ranks) -> None:
    (first, counts), (second, _) = ranks("chosen tokens")
    assert torch.equal(first, second)
    reusing = ranks("tokens of flux")[0]
    assert counts[2] == 1  # attention is reused, and tokens are refreshed without other ranks
    assert not torch.equal(first, reusing[0])
    torch.testing.assert_close(first, cached(PIPELINES["flux"](), LOCAL)(STEPS), atol=0.2, rtol=0)  # others are chosen


def test_attention_among_ranks_and_its_score_are_those_of_all_tokens(ranks: Ranks) -> None:
    for attended, expected, received, sums in ranks("attention"):
        torch.testing.assert_close(attended, expected, **NEAR)
        torch.testing.assert_close(received, sums, **NEAR)


@TOKENS
@pytest.mark.parametrize(
    "name", ["flux", pytest.param("wan", marks=NIGHTLY), pytest.param("qwen image", marks=NIGHTLY)]
)
def test_scores_by_attention_are_those_of_one_rank(ranks: Ranks, name: str) -> None:
    (one,), found = scores(PIPELINES[name]()), ranks(f"scores of {name}")
    assert {site.split()[0] for site in one} == {"self-attention" if name == "wan" else "joint-attention"}
    for site, score in one.items():
        torch.testing.assert_close(torch.cat([kept[site] for (kept,) in found], dim=1), score, **NEAR)


@TOKENS
@pytest.mark.parametrize(("context", "exchanges"), [
    pytest.param("stored", 0, marks=NIGHTLY), ("all", 4), pytest.param("kept", 4, marks=NIGHTLY),
])  # fmt: skip
def test_tokens_that_ranks_refresh_are_what_one_rank_makes_of_them(ranks: Ranks, context: str, exchanges: int) -> None:
    one, _ = by_place(PIPELINES["flux"](), context)
    for latent, counts in ranks(f"given tokens, {context}"):
        torch.testing.assert_close(latent, one, **NEAR)
        assert counts[2] - 1 == exchanges  # in the one block whose queries are chosen; the result is gathered


@TOKENS
def test_published_settings_fit_and_partial_steps_need_no_other_rank(ranks: Ranks) -> None:
    for policy, counts in ranks("published"):
        assert policy == "toca-flux-4"
        assert counts[:2] == [9, 9]  # queries, keys, values and outputs of two attentions, and the result
        assert counts[2:] == [10, 1]  # a score beside them; then nothing but the result


def test_layers_may_be_divided_later_and_steps_that_reuse_need_no_other_rank(ranks: Ranks) -> None:
    counts = check_layers(ranks("layers afterwards"), cached(PIPELINES["flux"](), FORA(interval=2)))
    assert counts == [5, 5, 0, 5]  # two projections and two MLPs of one block, and the projection of the other


def test_ranks_that_divide_layers_choose_the_same_tokens(ranks: Ranks) -> None:
    counts = check_layers(ranks("layers"), cached(PIPELINES["flux"](), CHOOSING))
    assert counts == [5, 5, 7, 5]  # scores of two attentions, and sums of fewer rows


def test_ranks_end_a_training_with_what_one_ends_with(ranks: Ranks, tmp_path: Path) -> None:
    alone = trained(tmp_path)
    (first, *iterations), (second, *_) = ranks("training")
    assert iterations == [4, 4]
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "error", "text"), [
    ("a batch of one", InvalidSetting, "2 processes cannot share a batch of 1"),
    pytest.param("gate", UnsupportedParallelism, "decides by the tokens of its rank", marks=TOKENS),
    pytest.param("different policies", PlansDiffer, "2 different plans on 2 ranks", marks=[TOKENS, NIGHTLY]),
    pytest.param("background", UnsupportedParallelism, "as soon as its own code is compiled", marks=[TOKENS, NIGHTLY]),
    pytest.param("served", CannotBatch, "exchanges values with other ranks", marks=[TOKENS, NIGHTLY]),
    ("ring", UnsupportedModel, "splits tokens by ring attention"),
    ("another class", UnsupportedModel, "cannot become a FSDP"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_on_every_rank(
    ranks: Ranks, name: str, error: type[Exception], text: str
) -> None:
    ranks.check_refused(name, error, text)


@TOKENS
def test_a_rank_that_dies_is_an_error_on_the_others(ranks: Ranks) -> None:
    ranks.check_a_death_is_told()
