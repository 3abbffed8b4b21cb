"""Fitted forecasts: as good as the best linear combination, and never worse than reuse on what they were fitted to."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.errors import PolicyDoesNotFit
from dicompile.learn.latents import LATENTS
from dicompile.learn.runs import Runs
from dicompile.plan import Cadence, Forecast, Policy, Reuse, Rule
from tests.models import dit

STEPS, CADENCE = 12, Cadence(interval=3, anchor="last", warmup=2)


def data(generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(10, (2,), generator=generator)
    return {LATENTS: torch.randn(2, 4, 16, 16, generator=generator), "class_labels": labels}


def fit(order: int = 2, level: Literal["site", "stack"] = "site") -> Policy:
    sample = dit(layers=2)
    inputs = {key: value for key, value in sample.inputs.items() if key != "return_dict"}
    inputs = {key: value[:2] for key, value in inputs.items()} | {"return_dict": False}
    runs = Runs(inputs, DDIMScheduler(clip_sample=False), data, {"class_labels": 10}, STEPS, guidance=1.5)
    return runs.record(sample.model, 1, progress=False).fitted(CADENCE, order, level)


def errors(policy: Policy) -> float:
    """Squared error of a guided run against the uncached one, step by step on the uncached latents."""
    sample = dit(layers=2)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    fast = dicompile.optimize(sample.model, policy, schedule=scheduler, mode="eager")
    generator = torch.Generator().manual_seed(0)
    drawn = data(generator)
    latent = torch.randn(2, 4, 16, 16, generator=generator)
    labels = torch.cat([drawn["class_labels"], torch.tensor([10, 10])])
    total = 0.0
    for timestep in scheduler.timesteps:
        inputs = {"hidden_states": torch.cat([latent] * 2), "timestep": timestep.expand(4), "class_labels": labels}
        with torch.no_grad():
            expected = sample.model(**inputs, return_dict=False)[0]
        total += float((fast(**inputs, return_dict=False)[0] - expected).square().sum())
        cond, uncond = expected[:, :4].chunk(2)
        latent = scheduler.step(uncond + 1.5 * (cond - uncond), timestep, latent, return_dict=False)[0]
    return total


@pytest.mark.parametrize("level", ["site", "stack"])
def test_fitted_weights_beat_reuse_and_taylor_on_the_run_they_were_fitted_to(level: Any) -> None:
    what = "core" if level == "site" else "update"
    sites = () if level == "site" else ("stack",)
    reuse = Policy(name="reuse", cadence=CADENCE, rules=(Rule(sites=sites, do=Reuse(what=what)),))
    taylor = Policy(name="taylor", cadence=CADENCE, rules=(Rule(sites=sites, do=Forecast(order=1, what=what)),))
    fitted = errors(fit(level=level))
    assert fitted < errors(reuse)
    assert fitted < errors(taylor)


def test_order_nought_is_the_best_multiple_of_the_last_value() -> None:
    rows = fit(order=0).rules[0].do.weights
    assert [len(row) for row in rows] == [0 if m.others else 4 for m in CADENCE.moments(STEPS)]
    assert all(len(own) == 1 and 0.5 < own[0] < 1.5 for row in rows for own in row)


def test_it_is_a_policy_file_like_any_other() -> None:
    policy = fit()
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_yaml(policy.to_yaml()) == policy


def test_another_number_of_steps_is_refused() -> None:
    sample = dit(layers=2)
    fast = dicompile.optimize(sample.model, fit(), schedule=STEPS + 1, mode="eager")
    with pytest.raises(PolicyDoesNotFit, match="12 steps"):
        fast(**sample.inputs)
