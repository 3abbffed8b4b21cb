"""Random scores: drawn from the policy's seed, step and site alone, on a generator of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.plan import Cadence, Policy, Refresh, Reuse, Rule, TokenScore
from dicompile.runtime import StepSource
from tests.runtime.runner import LABELS, OTHER_LABELS, STEPS, Runner, model, same

MLPS = (1, 3)


def random_policy(*, shared: bool = False) -> Policy:
    refresh = Refresh(ratio=0.25, score=TokenScore(base="random", age_weight=0.0, share_guidance=shared))
    rules = (Rule(sites=("mlp",), do=refresh), Rule(do=Reuse()))
    return Policy(name="random", cadence=Cadence(interval=4, counting="up"), rules=rules)


@pytest.fixture(scope="module")
def source() -> StepSource:
    return model().programs(random_policy())


def chosen_tokens(runner: Runner, steps: int = STEPS) -> dict[tuple[int, int], Tensor]:
    """Tokens that were refreshed, by step and site."""
    result = {}
    for step in range(steps):
        runner.run(steps=[step])
        for site, tokens in runner.context.chosen.items():
            result[step, site] = tokens
    return result


def test_every_site_draws_again_at_every_step(source: StepSource) -> None:
    chosen = chosen_tokens(Runner(source))
    assert list(chosen) == [(step, site) for step in (1, 2, 3, 5, 6, 7) for site in MLPS]
    assert {tuple(tokens.shape) for tokens in chosen.values()} == {(4, 16)}
    rows = [frozenset(row) for tokens in chosen.values() for row in tokens.tolist()]
    assert len(set(rows)) == len(rows)


def test_the_same_seed_refreshes_the_same_tokens(source: StepSource) -> None:
    first, second = Runner(source, seed=3), Runner(source, seed=3)
    assert same(first.run(), second.run())
    assert same(first.run(), second.run())


def test_another_seed_refreshes_other_tokens(source: StepSource) -> None:
    first, second = (chosen_tokens(Runner(source, seed=seed)) for seed in (1, 2))
    assert all(not torch.equal(first[key], second[key]) for key in first)


def test_the_global_generator_is_neither_read_nor_moved(source: StepSource) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Runner(source).run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(Runner(source).run(), first)


def test_guidance_contexts_refresh_the_same_tokens(source: StepSource) -> None:
    runner = Runner(source)
    for step in range(2):
        for name, labels in (("cond", LABELS), ("uncond", OTHER_LABELS)):
            with dicompile.cache_context(name):
                runner.run(steps=[step], labels=labels)
    cond, uncond = (runner.state.contexts[name].chosen for name in ("cond", "uncond"))
    assert all(torch.equal(cond[site], uncond[site]) for site in MLPS)


def test_guidance_halves_of_one_batch_can_share_their_tokens() -> None:
    chosen = chosen_tokens(Runner(model().programs(random_policy(shared=True))), steps=2)
    for tokens in chosen.values():
        assert torch.equal(tokens[:2], tokens[2:])
        assert not torch.equal(tokens[0], tokens[1])
