"""Learning-to-Cache as a policy: what it plans, and whom it does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dicompile
from dicompile.errors import InvalidPolicy, InvalidRouter, PolicyDoesNotFit
from dicompile.plan import Policy, TimestepSchedule, make_plan
from dicompile.policies import LearningToCache, Router, RouterFacts, get_policy, save_router, schedule_to_json
from tests import models
from tests.capture.captured import structure
from tests.models import optimized, run, timesteps
from tests.uvit import CachedUViT, uvit

SITES = tuple(f"{block}.{kind}" for block in range(3) for kind in ("self-attention", "mlp"))


def router(steps: int = 6, sites: tuple[str, ...] = SITES, times: tuple[float, ...] = (), **options: object) -> Router:
    logits = torch.randn(steps, len(sites), generator=torch.Generator().manual_seed(5)) * 4
    return Router(logits, facts=RouterFacts(sites=sites, timesteps=times), source="my.safetensors", **options)


def symbols(policy: Policy, steps: int) -> list[str]:
    plan = make_plan(structure("plain_dit"), policy, TimestepSchedule.of(steps))
    return ["".join(site.action.symbol for site in step.sites[:6]) for step in plan.steps]


def test_the_plan_is_the_schedule() -> None:
    made = router()
    expected = ["".join(".F"[compute] for compute in row) for row in made.schedule().tolist()]
    assert symbols(LearningToCache(made), 6) == expected
    assert len(set(expected)) > 2


def test_only_values_that_the_next_step_reuses_are_stored() -> None:
    plan = make_plan(structure("plain_dit"), LearningToCache(router()), TimestepSchedule.of(6))
    for step, after in zip(plan.steps, plan.steps[1:], strict=False):
        reused = {i for i, site in enumerate(after.sites) if site.action.symbol == "."}
        assert {int(slot.site) for slot in step.live} == reused
    assert not plan.steps[-1].live


def test_a_threshold_replaces_the_routers_own() -> None:
    assert symbols(LearningToCache(router(), threshold=0.99), 6) != symbols(LearningToCache(router()), 6)
    with pytest.raises(InvalidRouter, match="has no meaning"):
        LearningToCache(router(), threshold=1.0)


def test_a_forecast_may_take_the_place_of_reuse() -> None:
    # The first cache step has one stored value: there the forecast is a reuse.
    rows = symbols(LearningToCache(router(), otherwise=1), 6)
    assert [row.replace("f", ".") for row in rows] == symbols(LearningToCache(router()), 6)
    assert any("f" in row for row in rows[3:])


def test_a_router_comes_from_a_file_by_name(tmp_path: Path) -> None:
    made = router()
    save_router(made, tmp_path / "r.safetensors")
    (tmp_path / "r.json").write_text(schedule_to_json(made.schedule(), made.facts.sites))
    by_file = get_policy("l2c", router=str(tmp_path / "r.safetensors"))
    by_schedule = get_policy("l2c", router=tmp_path / "r.json")
    assert symbols(by_file, 6) == symbols(by_schedule, 6) == symbols(LearningToCache(made), 6)
    assert Policy.from_yaml(by_file.to_yaml()) == by_file


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_the_name_alone_is_not_enough() -> None:
    with pytest.raises(InvalidPolicy, match="policy 'l2c' needs the option 'router'"):
        get_policy("l2c")


def test_a_schedule_has_no_threshold(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"attn-0": [1, 0]}')
    with pytest.raises(InvalidPolicy, match="a schedule without scores"):
        LearningToCache(tmp_path / "s.json", threshold=0.1)


def test_a_missing_schedule_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRouter, match=re.escape(str(tmp_path / "gone.json"))):
        LearningToCache(tmp_path / "gone.json")


def test_a_damaged_schedule_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRouter, match=re.escape(str(tmp_path / "s.json"))):
        LearningToCache(tmp_path / "s.json")


MISFITS: list[tuple[Router, list[float] | int, str]] = [
    (router(steps=8), 6, "has 8 steps, the schedule 6"),
    (router(sites=SITES[:4]), 6, "is for 4 sites, the model has 6"),
    (router(sites=SITES[::-1]), 6, "has site 2.mlp at place 0, the model 0.self-attention"),
    (router(times=tuple(map(float, range(6, 0, -1)))), timesteps(6), "has timestep 6 at step 1, the schedule 999"),
]


@pytest.mark.parametrize(("made", "schedule", "what"), MISFITS, ids=["steps", "depth", "kinds", "timesteps"])
def test_a_router_of_something_else_names_its_file_and_both_sides(
    made: Router, schedule: list[float] | int, what: str
) -> None:
    with pytest.raises(PolicyDoesNotFit, match=what) as caught:
        make_plan(structure("plain_dit"), LearningToCache(made), TimestepSchedule.of(schedule))
    assert caught.value.where == "my.safetensors"


def test_the_timesteps_of_the_training_fit() -> None:
    made = router(times=tuple(map(float, timesteps(6))))
    sample = models.plain_dit()
    assert len(run(optimized(sample, LearningToCache(made), 6), sample.inputs, timesteps(6))) == 6


# U-ViT with DPM-Solver-2 ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(("steps", "cache_steps"), [(20, 9), (50, 24)])
def test_uvit_reuses_the_evaluation_in_the_middle_of_the_step_before(steps: int, cache_steps: int) -> None:
    """Guidance of two calls per evaluation, each with a cache of its own, against the cache written by hand."""
    from diffusers import DPMSolverSinglestepScheduler

    sample, labels = uvit(depth=2), {"cond": torch.tensor([1, 3]), "uncond": torch.tensor([10, 10])}
    logits = torch.randn(steps, 6, generator=torch.Generator().manual_seed(1)) * 3
    made = Router(logits, "dpm-solver-2", 0.9)
    solver = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min")
    solver.set_timesteps(steps)
    fast = dicompile.optimize(sample.model, LearningToCache(made), schedule=solver, mode="eager")
    by_hand = {name: CachedUViT(sample.model) for name in labels}
    compute = made.schedule().tolist()
    calls: list[bool] = []

    latent = torch.randn(2, 4, 8, 8)
    for timestep in solver.timesteps:
        outputs = {}
        for name, y in labels.items():
            with dicompile.cache_context(name):
                outputs[name] = fast(x=latent, timesteps=timestep.expand(2), y=y)
            with torch.no_grad():
                expected = by_hand[name](latent, timestep.expand(2), y, compute[len(calls)])
            assert torch.equal(outputs[name], expected), f"call {len(calls)}"
        calls.append(all(compute[len(calls)]))
        guided = outputs["cond"] + 0.4 * (outputs["cond"] - outputs["uncond"])
        latent = solver.step(guided, timestep, latent, return_dict=False)[0]
    assert len(calls) == steps
    assert calls[0]
    assert all(calls[1::2])
    assert sum(not full for full in calls) == cache_steps
