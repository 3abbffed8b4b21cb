"""Every pipeline: uncached runs equal the untouched pipeline, cached runs follow their plan, restore undoes it all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import dicompile
from tests.pipelines.conditioned import CONDITIONED
from tests.pipelines.pipes import PIPELINES, Sampler, kinds

# diffusers gives torch tensors to numpy.array, and torch 2.13 does not know numpy 2's keyword `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STEPS = 6
FORA = dicompile.FORA(interval=2)
EVERY = {**PIPELINES, **CONDITIONED}
STEPS_RUN = {"flux img2img true CFG": 5, "visual cloze": 4}
"""Calls of a pipeline that leaves steps out."""
REFRESHED = ("pixart", "flux true CFG", "wan 2.2")
"""Pipelines that refresh tokens in every test run, one per kind of guidance: one batch, two calls, two models."""
OFTEN = ("vace", "flux kontext", "visual cloze", "cosmos 3", "latte one frame")
"""Pipelines with conditions that are in every test run; the others are checked at night."""


def planned_calls(sampler: Sampler) -> Counter[str]:
    """Calls by kind of step that the plans announce: a pipeline of two denoisers changes over between them."""
    first, *others = (dicompile.plan_of(model) for model in sampler.denoisers)
    steps = list(first.steps[: len(first.steps) - sum(len(plan.steps) for plan in others)])
    steps += [step for plan in others for step in plan.steps]
    return Counter({kind: sampler.calls * n for kind, n in Counter(step.kind for step in steps).items()})


@pytest.mark.parametrize(
    ("name", "policies"),
    [
        *(
            pytest.param(
                name,
                (FORA, "duca") if name in REFRESHED else (FORA,),
                id=name,
                marks=[] if (name in PIPELINES and name != "lumina2") or name in OFTEN else [pytest.mark.nightly],
            )
            for name in EVERY
        ),
        *(
            pytest.param(name, ("duca",), id=f"{name}-duca", marks=pytest.mark.nightly)
            for name in EVERY
            if name not in REFRESHED
        ),
    ],
)
@pytest.mark.sampled
def test_a_pipeline_follows_its_plan_and_is_restored(name: str, policies: tuple[Any, ...]) -> None:
    sampler = EVERY[name]()
    originals, config = sampler.denoisers, dict(sampler.pipe.config)
    wanted = sampler(STEPS)

    assert dicompile.optimize(sampler.pipe, mode="eager") is sampler.pipe
    assert torch.equal(sampler(STEPS), wanted)
    assert dicompile.report(sampler.pipe).kinds == {"full": STEPS_RUN.get(name, STEPS) * sampler.calls}

    for policy in policies:
        dicompile.optimize(dicompile.restore(sampler.pipe), policy, mode="eager")
        got = sampler(STEPS)
        report = dicompile.report(sampler.pipe)
        assert report.kinds == planned_calls(sampler)
        assert set(report.kinds) - {"full"}
        assert report.cold_starts == []
        assert report.cache_bytes == 0
        assert not torch.equal(got, wanted)
        assert (got - wanted).norm() < 0.1 * wanted.norm()
        assert torch.equal(sampler(STEPS), got)

    assert dicompile.restore(sampler.pipe) is sampler.pipe
    assert all(now is before for now, before in zip(sampler.denoisers, originals, strict=True))
    assert dict(sampler.pipe.config) == config
    assert torch.equal(sampler(STEPS), wanted)


@pytest.mark.parametrize("name", ["dit", pytest.param("flux true CFG", marks=pytest.mark.nightly)])
def test_compiled_latents_are_close(name: str) -> None:
    sampler = PIPELINES[name]()
    wanted = sampler(3)
    dicompile.optimize(sampler.pipe, FORA, mode="eager")
    cached = sampler(3)
    dicompile.optimize(dicompile.restore(sampler.pipe), FORA)
    # Float32 sums in another order, and the sampler amplifies that; measured 1e-6 of the scale.
    assert (sampler(3) - cached).abs().max() < 1e-5 * wanted.abs().max()
    assert dicompile.report(sampler.pipe).kinds == kinds(dicompile.plan_of(sampler.pipe), sampler.calls)
