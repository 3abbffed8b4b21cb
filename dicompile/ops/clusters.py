"""Tokens that are alike, by k-means: one operator, so that a graph has one node whatever the number of rounds.

Reference:
    Zheng et al., Compute Only 16 Tokens in One Timestep (ClusCa), arXiv 2509.10312, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SAME = 1e-4
"""Means that have moved by no more than this, relative to themselves, are taken to stay."""
ZERO = 1e-8
"""The same for means of zero."""
USUAL_ROUNDS = 7
"""What 24 rows of the bundled model take until all have settled, where they start from the means before."""


@torch.library.custom_op("dicompile::cluster_tokens", mutates_args=())
def cluster_tokens(tokens: Tensor, means: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Clusters of every sample by the sum of absolute differences (L1), starting from given means.

    A sample stops when its means stay, so that it does not depend on the others of its batch. The mean of a cluster
    without tokens is zero.

    Args:
        tokens: [b, n, d].
        means: to start with; float32, [b, k, d].
        rounds: most of them. On a GPU every round waits for the device, unless it is recorded as a CUDA graph, which
            then has all of them.

    Returns:
        The cluster of every token, int64, [b, n], and the means to go on from, float32, [b, k, d].
    """
    tokens, means = tokens.float(), means.clone()
    labels = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    is_done = torch.zeros((len(tokens), 1, 1), dtype=torch.bool, device=tokens.device)
    for _ in range(rounds):
        labels = torch.cdist(tokens, means, p=1).argmin(-1)
        new = _means(tokens, labels, means.shape[1])
        is_done = is_done | torch.isclose(means, new, rtol=SAME, atol=ZERO).all((1, 2), keepdim=True)
        if _may_wait(tokens) and bool(is_done.all()):
            break
        means = torch.where(is_done, means, new)
    return labels, means


def _means(tokens: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of the tokens of every cluster; float32, [b, k, d]."""
    members = torch.nn.functional.one_hot(labels, count).to(tokens.dtype)
    return members.transpose(1, 2) @ tokens / members.sum(1).clamp_min(1).unsqueeze(-1)


def _may_wait(tokens: Tensor) -> bool:
    return not (tokens.is_cuda and torch.cuda.is_current_stream_capturing())


@cluster_tokens.register_fake
def _(tokens: Tensor, means: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    del rounds
    return tokens.new_empty(tokens.shape[:2], dtype=torch.int64), torch.empty_like(means)


def counted_rounds(rounds: int) -> int:
    """Rounds that are counted where there may be so many; values tell when they end."""
    return min(rounds, USUAL_ROUNDS)


def cluster_flops(rows: int, width: int, count: int, rounds: int) -> int:
    """Operations on so many tokens: in a round, two per element for the distances, and two for the means."""
    return 4 * rows * width * count * counted_rounds(rounds)


@register_flop_formula(torch.ops.dicompile.cluster_tokens)
def _flops(tokens: Sequence[int], means: Sequence[int], rounds: int, *_: object, **__: object) -> int:
    return cluster_flops(tokens[0] * tokens[1], tokens[2], means[1], rounds)


def first_means(tokens: Tensor, noise: Tensor, count: int) -> Tensor:
    """Tokens to start with, drawn with replacement; float32, [b, k, d].

    Args:
        tokens: [b, n, d].
        noise: uniform in [0, 1); [b, n].
        count: k.
    """
    drawn = (noise[:, :count] * tokens.shape[1]).to(torch.int64)
    return tokens.gather(1, drawn.unsqueeze(-1).expand(-1, -1, tokens.shape[2])).float()
