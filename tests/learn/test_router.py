"""Training of routers against the same mathematics written by hand, its repeatability, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.errors import InvalidRouter
from dicompile.learn.graph import LearnableModel, learnable
from dicompile.learn.objective import Objective, training_iteration
from dicompile.learn.router import RouterOptions, RouterTraining, sweep_penalties, train_router, with_penalty
from dicompile.learn.samplers import Ddim, DpmSolver2
from dicompile.learn.training import Files
from dicompile.policies import LearningToCache
from tests.models import PlainDiT, Sample, plain_dit, redraw, run
from tests.uvit import UViT, forward_with, uvit

STEPS = 6
Mix = Callable[[int, Tensor], Tensor]


def plain_forward(model: PlainDiT, x: Tensor, t: Tensor, y: Tensor, mix: Mix) -> Tensor:
    """The DiT with every branch output, before its gate, passed through `mix`."""
    gates = iter(range(2 * len(model.blocks)))
    handles = []

    def hook(*arguments: Any) -> Tensor:
        return mix(next(gates), arguments[-1])

    for block in model.blocks:
        handles += [block.proj.register_forward_hook(hook), block.mlp.register_forward_hook(hook)]
    try:
        return model(x, t, y)
    finally:
        for handle in handles:
            handle.remove()


def uvit_forward(model: UViT, x: Tensor, timesteps: Tensor, y: Tensor, mix: Mix) -> Tensor:
    return forward_with(model, x, timesteps, y, lambda site, fresh: mix(site, fresh()))


def by_hand(
    forward: Callable[..., Tensor], recorded_at: tuple[Any, ...], at: tuple[Any, ...], row: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, loss and gradient of the logits, as in section A.5 of the specification."""
    stored: dict[int, Tensor] = {}
    logits = row.clone().requires_grad_()
    beta = logits.sigmoid()

    def record(site: int, fresh: Tensor) -> Tensor:
        stored[site] = fresh
        return fresh

    with torch.no_grad():
        forward(*recorded_at, record)
        teacher = forward(*at, lambda _, fresh: fresh)
    gate = beta
    if objective.straight_through is not None:
        gate = (beta > objective.straight_through).float() + beta - beta.detach()
    student = forward(*at, lambda site, fresh: gate[site] * fresh + (1 - gate[site]) * stored[site])
    squares = (teacher - student) ** 2
    data = squares.mean() if objective.reduce == "mean" else squares.sum() / len(squares)
    loss = data + objective.penalty * beta.sum()
    return student.detach(), loss.detach(), torch.autograd.grad(loss, logits)[0]


OBJECTIVES = {
    "mean": Objective(1e-4),
    "sum": Objective(0.1, "sum"),
    "straight-through": Objective(1e-4, straight_through=0.4),
}


@pytest.mark.parametrize("kind", ["plain_dit", "uvit"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_iteration_equals_the_one_written_by_hand(kind: str, name: str) -> None:
    sample, forward, objective = *SUBJECTS[kind](), OBJECTIVES[name]
    model = learnable(sample.model, sample.inputs)
    full, cached = (list(sample.inputs.values()) for _ in range(2))
    cached[0], cached[1] = cached[0] + 0.3 * torch.randn_like(cached[0]), torch.full_like(cached[1], 480)
    logits = torch.randn(len(model.sites), requires_grad=True)
    _, stored = model.record(dict(zip(sample.inputs, full, strict=True)))
    result = training_iteration(model, dict(zip(sample.inputs, cached, strict=True)), stored, logits, objective)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    expected = by_hand(forward, (sample.model, *full), (sample.model, *cached), logits.detach(), objective)
    for got, wanted in zip((result.student.detach(), result.loss.detach(), gradient), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


SUBJECTS: dict[str, Callable[[], tuple[Sample, Callable[..., Tensor]]]] = {
    "plain_dit": lambda: (plain_dit(), plain_forward),
    "uvit": lambda: (uvit(), uvit_forward),
}


# The loop -------------------------------------------------------------------------------------------------------------


SAMPLE = Sample(
    redraw(PlainDiT(layers=2, width=16, size=4)),
    {"x": torch.randn(4, 4, 4, 4), "t": torch.full((4,), 500), "y": torch.tensor([1, 2, 10, 10])},
)


@pytest.fixture(scope="module")
def model() -> LearnableModel:
    return learnable(SAMPLE.model, SAMPLE.inputs)


def data(generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(10, (4,), generator=generator)
    return {"latents": torch.randn(4, 4, 4, 4, generator=generator), "y": labels}


OPTIONS = RouterOptions(iterations=8, objective=Objective(1e-3), lr=0.1, seed=3)


def sampler() -> Ddim:
    return Ddim(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), STEPS)


def training(model: LearnableModel, options: RouterOptions = OPTIONS) -> RouterTraining:
    return RouterTraining(model, sampler(), data, options, null={"y": 10})


def test_the_same_seed_trains_the_same_router(model: LearnableModel) -> None:
    first, again = (train_router(training(model), progress=False) for _ in range(2))
    other = train_router(training(model, replace(OPTIONS, seed=4)), progress=False)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(model: LearnableModel, tmp_path: Path) -> None:
    whole = Files(tmp_path / "whole.ckpt", tmp_path / "whole.jsonl", every=3)
    expected = train_router(training(model), whole, progress=False)
    files = Files(tmp_path / "r.ckpt", tmp_path / "r.jsonl", every=3)
    interrupted = training(model)
    advance, interrupted.advance = interrupted.advance, lambda: advance() if interrupted.iteration < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train_router(interrupted, files, progress=False)
    with (tmp_path / "r.jsonl").open("a") as log:
        log.write('{"iteration": 6, "ca')  # killed while it wrote
    resumed = training(model)
    router = train_router(resumed, files, resume=True, progress=False)
    assert torch.equal(router.logits, expected.logits)
    assert (tmp_path / "r.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert router.facts == expected.facts


def test_only_rows_of_cache_steps_are_trained(model: LearnableModel) -> None:
    run_ = training(model)
    before = run_.router().logits
    router = train_router(run_, progress=False)
    changed = (router.logits != before).any(1).tolist()
    assert changed[1::2] == [False] * 3
    assert any(changed[::2])


def test_a_step_moves_one_row_only_and_not_that_of_the_step_before(model: LearnableModel) -> None:
    """Momentum must not carry on in rows that an iteration did not draw."""
    run_ = training(model)
    for _ in range(8):
        before = run_.router().logits
        entry = run_.advance()
        assert (run_.router().logits != before).any(1).nonzero().flatten().tolist() == [entry.row]


def test_logits_stay_within_their_bound(model: LearnableModel) -> None:
    router = train_router(training(model, replace(OPTIONS, lr=4.0, clamp=2.0)), progress=False)
    assert router.logits.abs().max() <= 2.0
    free = train_router(training(model, replace(OPTIONS, lr=4.0, clamp=None)), progress=False)
    assert free.logits.abs().max() > 5.0


def test_a_large_penalty_caches_everything_and_none_nothing(model: LearnableModel) -> None:
    options = replace(OPTIONS, iterations=24, lr=3.0)
    routers = sweep_penalties(lambda x: training(model, with_penalty(options, x)), [0.0, 1e3], progress=False)
    cached = {penalty: sum(router.cached(0.5).values()) for penalty, router in routers.items()}
    assert cached[1e3] == 3 * 4
    assert cached[0.0] == 0
    assert routers[1e3].facts.penalty == 1e3


def test_dropped_labels_are_shared_by_all_evaluations(model: LearnableModel) -> None:
    seen: list[Tensor] = []
    spied = training(model, replace(OPTIONS, label_dropout=0.5))

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def record(self, inputs: Any) -> Any:
            seen.append(inputs["y"])
            return model.record(inputs)

        def predict(self, inputs: Any) -> Any:
            seen.append(inputs["y"])
            return model.predict(inputs)

        def blend(self, inputs: Any, *arguments: Any) -> Any:
            seen.append(inputs["y"])
            return model.blend(inputs, *arguments)

    spied.model = Spy()  # type: ignore[assignment]
    for _ in range(5):
        spied.advance()
    assert all(torch.equal(seen[i], seen[i + j]) for i in range(0, 15, 3) for j in (1, 2))
    dropped = torch.cat(seen) == 10
    assert dropped.any()
    assert not dropped.all()


def test_the_log_says_what_every_iteration_did(model: LearnableModel, tmp_path: Path) -> None:
    files = Files(log=tmp_path / "new" / "log.jsonl")
    train_router(training(model), files, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert {line["row"] for line in lines} <= {0, 2, 4}
    assert all(line["row"] == STEPS - 1 - line["call"] for line in lines)
    assert all(line["data_loss"] > 0 and 0 < line["score_sum"] < 4 and 0 <= line["cached"] <= 4 for line in lines)


def test_a_trained_router_runs_on_its_model(model: LearnableModel) -> None:
    router = train_router(training(model), progress=False)
    assert router.facts.sampler == "DDIMScheduler"
    assert router.facts.sites == tuple(site.label for site in model.structure.sites)
    times = [int(t) for t in router.facts.timesteps]
    fast = dicompile.optimize(SAMPLE.model, LearningToCache(router, threshold=0.5), schedule=times, mode="eager")
    assert len(run(fast, SAMPLE.inputs, times)) == STEPS


def test_uvit_records_in_the_middle_of_the_step_before_and_sums_squares() -> None:
    """A whole iteration, drawn and all, against the one written by hand."""
    sample, objective = uvit(depth=2), Objective(0.1, "sum")
    learned, solver = learnable(sample.model, sample.inputs), DpmSolver2.of(DDIMScheduler(), 8)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {"latents": torch.randn(2, 4, 8, 8, generator=generator), "y": torch.tensor([1, 10])}

    options = RouterOptions(iterations=1, objective=objective, clamp=None)
    made = RouterTraining(learned, solver, draw, options)
    row, call, state = made.rows[2].detach().clone(), 4, made.generator.get_state()
    (gradient,) = torch.autograd.grad(made.evaluate(call, made.rows[2]).loss, made.rows[2])
    made.generator.set_state(state)
    clean, noise, conditioning = made.draw()
    evaluations = []

    def predict(latent: Tensor, timestep: float) -> Tensor:
        evaluations.append((sample.model, latent, torch.full((2,), timestep), conditioning["y"]))
        with torch.no_grad():
            return sample.model(*evaluations[-1][1:])

    latent = solver.advance(call, clean, noise, predict)
    at = (sample.model, latent, torch.full((2,), solver.timestep(call)), conditioning["y"])
    assert len(evaluations) == 2
    _, _, expected = by_hand(uvit_forward, evaluations[-1], at, row, objective)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_an_odd_number_of_steps_is_refused_at_once(model: LearnableModel) -> None:
    odd = Ddim(DDIMScheduler(clip_sample=False), 5)
    with pytest.raises(InvalidRouter, match="5 steps are odd"):
        RouterTraining(model, odd, data, OPTIONS)


def test_a_checkpoint_of_another_training_is_refused(model: LearnableModel, tmp_path: Path) -> None:
    files = Files(tmp_path / "r.ckpt")
    train_router(training(model, replace(OPTIONS, iterations=1)), files, progress=False)
    with pytest.raises(InvalidRouter, match="belongs to another training") as caught:
        train_router(training(model, replace(OPTIONS, lr=0.2)), files, resume=True, progress=False)
    assert '"lr": 0.1' in caught.value.why
    assert '"lr": 0.2' in caught.value.why


def test_more_iterations_continue_a_finished_training(model: LearnableModel, tmp_path: Path) -> None:
    files = Files(tmp_path / "r.ckpt")
    train_router(training(model, replace(OPTIONS, iterations=3)), files, progress=False)
    longer = train_router(training(model), files, resume=True, progress=False)
    assert torch.equal(longer.logits, train_router(training(model), progress=False).logits)


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_damaged_checkpoint_is_named(model: LearnableModel, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.ckpt").write_bytes(content)
    with pytest.raises(InvalidRouter, match=r"r\.ckpt is not a checkpoint"):
        train_router(training(model), Files(tmp_path / "r.ckpt"), resume=True, progress=False)
