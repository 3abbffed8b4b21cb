"""Sampler arithmetic: one trained step is the step that the sampler takes."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from dicompile.errors import InvalidSchedule
from dicompile.learn.samplers import Ddim, DpmSolver2


def ddim(**options: object) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_takes_the_schedulers_own_step(prediction: str) -> None:
    scheduler = ddim(prediction_type=prediction)
    sampler = Ddim(scheduler, 10)
    assert scheduler.num_inference_steps is None, "the user's scheduler is left alone"
    scheduler.set_timesteps(10)
    assert sampler.timesteps == tuple(float(t) for t in scheduler.timesteps)
    clean, noise, output = torch.randn(3, 2, 4, 8, 8).unbind()
    seen: list[tuple[Tensor, float]] = []

    def predict(latent: Tensor, timestep: float) -> Tensor:
        seen.append((latent, timestep))
        return torch.cat([output, torch.randn_like(output)], 1)  # learned variances are of no interest

    latent = sampler.advance(3, clean, noise, predict)
    ((noisy, timestep),) = seen
    assert timestep == scheduler.timesteps[2]
    assert torch.equal(noisy, scheduler.add_noise(clean, noise, scheduler.timesteps[2].expand(2)))
    assert torch.equal(latent, scheduler.step(output, int(timestep), noisy)[0])


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (DDIMScheduler(), "it clips"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "it clips"),
        (DDPMScheduler(clip_sample=False), "depends on the steps before, or draws noise"),
        (EulerDiscreteScheduler(), "depends on the steps before, or draws noise"),
    ],
)
def test_other_schedulers_are_refused(scheduler: object, why: str) -> None:
    with pytest.raises(InvalidSchedule, match=why):
        Ddim(scheduler, 10)


def test_dpm_solver_times_and_calls() -> None:
    solver = DpmSolver2.of(DDIMScheduler(), 6)
    assert solver.times == pytest.approx([1.0, 0.667, 0.334, 0.001])
    timesteps = solver.timesteps
    assert len(timesteps) == 6
    assert timesteps[::2] == pytest.approx([1000, 667, 334])
    assert all(a > b for a, b in itertools.pairwise(timesteps))
    assert solver.timestep(2) == 667.0


def test_dpm_solver_is_exact_where_the_clean_latent_is_certain() -> None:
    solver, clean, noise = DpmSolver2.of(DDIMScheduler(), 4), torch.randn(2, 3).double(), torch.randn(2, 3).double()

    def predict(latent: Tensor, timestep: float) -> Tensor:
        alpha, sigma, _ = solver._marginal(timestep / 1000)
        return (latent - alpha * clean) / sigma

    alpha, sigma, _ = solver._marginal(solver.times[1])
    torch.testing.assert_close(solver.advance(2, clean, noise, predict), alpha * clean + sigma * noise)


def test_dpm_solver_is_of_second_order() -> None:
    """Of normal data, the flow leaves every latent where it is, and the noise prediction is sigma x."""

    def error(evaluations: int) -> float:
        solver, latent = DpmSolver2.of(DDIMScheduler(), evaluations), torch.ones(1, 1).double()
        for step in range(evaluations * 3 // 8):  # the last quarter of the times is where log-SNR runs away
            latent = solver.update(step, latent, lambda x, t: x * solver._marginal(t / 1000)[1])
        return abs(latent.item() - 1.0)

    assert error(32) / error(64) == pytest.approx(4, rel=0.1)
    assert error(64) / error(128) == pytest.approx(4, rel=0.05)


def test_dpm_solver_evaluates_the_middle_last() -> None:
    solver, seen = DpmSolver2.of(DDIMScheduler(), 8), []

    def predict(latent: Tensor, timestep: float) -> Tensor:
        seen.append(timestep)
        return latent

    solver.advance(4, torch.randn(2, 3), torch.randn(2, 3), predict)
    assert seen == list(solver.timesteps[2:4])


@pytest.mark.parametrize("steps", [0, 7])
def test_dpm_solver_needs_pairs_of_evaluations(steps: int) -> None:
    with pytest.raises(InvalidSchedule, match=f"DPM-Solver-2 with {steps} evaluations"):
        DpmSolver2.of(DDIMScheduler(), steps)


def test_dpm_solver_needs_a_prediction_of_noise() -> None:
    with pytest.raises(InvalidSchedule, match="predicts noise"):
        DpmSolver2.of(ddim(prediction_type="v_prediction"), 4)
