"""The bundled router belongs to the bundled model and its sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dicompile
from dicompile.demo import metrics
from dicompile.demo.sample import balanced_labels, load_model, load_scheduler, sample
from dicompile.policies import LearningToCache, Router, load_router

FILE = Path(dicompile.__file__).parent / "demo" / "assets" / "l2c_router.safetensors"


@pytest.mark.nightly
def test_it_beats_a_table_that_caches_as_many_sites_of_every_step() -> None:
    model, labels = load_model(), balanced_labels(4)
    router = load_router(FILE)
    order = torch.randperm(router.sites, generator=torch.Generator().manual_seed(0))
    shuffled = Router(router.logits[:, order], router.grid, router.threshold, router.facts)
    reference = sample(model, load_scheduler(), labels, router.steps)

    def likeness(policy: dicompile.Policy) -> float:
        scheduler = load_scheduler()
        fast = dicompile.optimize(model, policy, schedule=scheduler, mode="eager")
        return metrics.psnr(sample(fast, scheduler, labels, router.steps), reference)

    assert likeness(LearningToCache(router)) > likeness(LearningToCache(shuffled)) + 5
    assert sum(router.cached().values()) == 156
