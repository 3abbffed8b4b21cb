"""Clusters against k-means written out for one sample, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dicompile.ops import clusters
from dicompile.ops.clusters import USUAL_ROUNDS, cluster_flops, cluster_tokens, first_means

BATCH, TOKENS, WIDTH, COUNT = 3, 40, 6, 5


def alone(tokens: Tensor, means: Tensor, rounds: int) -> tuple[Tensor, Tensor, int]:
    """Labels and means of one sample, and the rounds that it took."""
    label = torch.zeros(len(tokens), dtype=torch.int64)
    for number in range(rounds):
        label = (tokens[:, None] - means[None]).abs().sum(-1).argmin(-1)
        new = torch.stack(
            [tokens[label == k].mean(0) if (label == k).any() else torch.zeros(WIDTH) for k in range(len(means))]
        )
        if torch.allclose(means, new, rtol=1e-4):
            return label, means, number + 1
        means = new
    return label, means, rounds


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_every_sample_is_clustered_as_by_itself(tokens: Tensor, rounds: int) -> None:
    means = tokens[:, :COUNT].clone()
    means[1, 3:] = means[1, 2]  # of equal means the first takes all, and the others are left without tokens
    labels, found = cluster_tokens(tokens, means, rounds)
    expected = [alone(*pair, rounds) for pair in zip(tokens, means, strict=True)]
    assert torch.equal(labels, torch.stack([label for label, *_ in expected]))
    torch.testing.assert_close(found, torch.stack([mean for _, mean, _ in expected]))
    assert rounds < 100 or len({count for *_, count in expected}) > 1, "the test would say nothing"


def test_a_cluster_without_tokens_has_a_mean_of_zero(tokens: Tensor) -> None:
    means = tokens[:, :1].expand(-1, COUNT, -1).contiguous()
    labels, found = cluster_tokens(tokens, means, 1)
    assert labels.unique().tolist() == [0]
    assert not found[:, 1:].any()
    assert torch.equal(means, tokens[:, :1].expand(-1, COUNT, -1)), "what it starts from is left alone"


def test_it_stops_when_all_samples_have_settled(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, real = [0], clusters._means

    def counted(*args: object) -> Tensor:
        rounds[0] += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(clusters, "_means", counted)
    means = tokens[:, :COUNT].clone()
    labels, settled = cluster_tokens(tokens, means, 100)
    assert rounds[0] == max(alone(*pair, 100)[2] for pair in zip(tokens, means, strict=True))
    rounds[0] = 0
    again, still = cluster_tokens(tokens, settled, 100)
    assert (rounds[0], torch.equal(labels, again), torch.equal(settled, still)) == (1, True, True)


def test_other_dtypes_are_clustered_in_float32(tokens: Tensor) -> None:
    half = tokens.bfloat16()
    means = half[:, :COUNT].float()
    for ours, theirs in zip(cluster_tokens(half, means, 9), cluster_tokens(half.float(), means, 9), strict=True):
        assert torch.equal(ours, theirs)


def test_means_start_with_tokens_that_noise_draws(tokens: Tensor) -> None:
    noise = torch.zeros(BATCH, TOKENS)
    noise[1, :COUNT] = torch.tensor([0.999, 0.5, 0.5, 0.0, 0.49])
    drawn = first_means(tokens, noise, COUNT)
    assert torch.equal(drawn[0], tokens[0, :1].expand(COUNT, -1))
    assert torch.equal(drawn[1], tokens[1, [39, 20, 20, 0, 19]])


def test_the_operator_is_sound(tokens: Tensor) -> None:
    torch.library.opcheck(cluster_tokens, (tokens, tokens[:, :COUNT].clone(), 4))


def test_as_many_rounds_are_counted_as_are_usual(tokens: Tensor) -> None:
    for rounds, counted in ((100, USUAL_ROUNDS), (2, 2)):
        with FlopCounterMode(display=False) as counter:
            cluster_tokens(tokens, tokens[:, :COUNT].clone(), rounds)
        assert counter.get_total_flops() == cluster_flops(BATCH * TOKENS, WIDTH, COUNT, rounds)
        assert counter.get_total_flops() == 4 * BATCH * TOKENS * WIDTH * COUNT * counted
