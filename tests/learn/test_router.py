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
from dicompile.learn.graph import learnable
from dicompile.learn.objective import Objective, training_iteration
from dicompile.learn.router import PUBLISHED, RouterOptions, RouterTraining, train_router, with_penalty
from dicompile.learn.training import Files, descend, run_to_end
from dicompile.learn.trajectory import Trajectories
from dicompile.policies import LearningToCache, NoCache, Router
from tests.learn.flows import final, recorded, runs_of
from tests.models import PlainDiT, Sample, plain_dit, redraw, run
from tests.pipelines import pipes
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
@pytest.mark.sampled
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
OPTIONS = RouterOptions(iterations=8, objective=Objective(1e-3), lr=0.1, batch=2, seed=3)


@pytest.fixture(scope="module")
def runs() -> Trajectories:
    return recorded(SAMPLE, STEPS, 3)


def training(source: Trajectories, options: RouterOptions = OPTIONS) -> RouterTraining:
    return RouterTraining(SAMPLE.model, source, options)


def trained(source: Trajectories, options: RouterOptions = OPTIONS, **more: Any) -> Router:
    return train_router(SAMPLE.model, source, options, progress=False, **more)


def test_the_same_seed_trains_the_same_router(runs: Trajectories) -> None:
    first, again = (trained(runs) for _ in range(2))
    other = trained(runs, replace(OPTIONS, seed=4))
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(runs: Trajectories, tmp_path: Path) -> None:
    whole = Files(tmp_path / "whole.ckpt", tmp_path / "whole.jsonl", every=3)
    expected = trained(runs, files=whole)
    files = Files(tmp_path / "r.ckpt", tmp_path / "r.jsonl", every=3)
    interrupted = training(runs)
    advance, interrupted.advance = interrupted.advance, lambda: advance() if interrupted.iteration < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_to_end(interrupted, files, progress=False)
    with (tmp_path / "r.jsonl").open("a") as log:
        log.write('{"iteration": 6, "ca')  # killed while it wrote
    router = trained(runs, files=files, resume=True)
    assert torch.equal(router.logits, expected.logits)
    assert (tmp_path / "r.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert router.facts == expected.facts


def test_only_rows_of_cache_steps_are_trained(runs: Trajectories) -> None:
    run_ = training(runs)
    before = run_.router().logits
    run_to_end(run_, progress=False)
    router = run_.router()
    changed = (router.logits != before).any(1).tolist()
    assert changed[1::2] == [False] * 3
    assert any(changed[::2])


def test_a_step_moves_one_row_only_and_not_that_of_the_step_before(runs: Trajectories) -> None:
    """Momentum must not carry on in rows that an iteration did not draw."""
    run_ = training(runs)
    for _ in range(8):
        before = run_.router().logits
        entry = run_.advance()
        assert (run_.router().logits != before).any(1).nonzero().flatten().tolist() == [entry.row]


def test_logits_stay_within_their_bound(runs: Trajectories) -> None:
    router = trained(runs, replace(OPTIONS, lr=4.0, clamp=2.0))
    assert router.logits.abs().max() <= 2.0
    free = trained(runs, replace(OPTIONS, lr=4.0, clamp=None))
    assert free.logits.abs().max() > 5.0


def test_a_large_penalty_caches_everything_and_none_nothing(runs: Trajectories) -> None:
    options = replace(OPTIONS, iterations=24, lr=3.0)
    routers = {penalty: trained(runs, with_penalty(options, penalty)) for penalty in (0.0, 1e3)}
    cached = {penalty: sum(router.cached(0.5).values()) for penalty, router in routers.items()}
    assert cached[1e3] == 3 * 4
    assert cached[0.0] == 0
    assert routers[1e3].facts.penalty == 1e3


def test_the_log_says_what_every_iteration_did(runs: Trajectories, tmp_path: Path) -> None:
    files = Files(log=tmp_path / "new" / "log.jsonl")
    trained(runs, files=files)
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert {line["row"] for line in lines} <= {0, 2, 4}
    assert all(line["row"] == STEPS - 1 - line["call"] for line in lines)
    assert all(line["data_loss"] > 0 and 0 < line["score_sum"] < 4 and 0 <= line["cached"] <= 4 for line in lines)


def test_a_trained_router_runs_on_its_model(runs: Trajectories) -> None:
    router = trained(runs)
    assert (router.facts.sampler, router.facts.batch) == ("FlowMatchEulerDiscreteScheduler", 8)
    assert router.facts.sites == ("0.self-attention", "0.mlp", "1.self-attention", "1.mlp")
    times = list(router.facts.timesteps)
    fast = dicompile.optimize(SAMPLE.model, LearningToCache(router, threshold=0.5), schedule=times, mode="eager")
    assert len(run(fast, SAMPLE.inputs, times)) == STEPS


def test_uvit_records_in_the_middle_of_the_step_before_and_sums_squares() -> None:
    """A whole evaluation of a recorded run against the one written by hand."""
    sample, objective = uvit(depth=2), Objective(0.1, "sum")
    source = recorded(sample, 8, 1, scheduler=DDIMScheduler(clip_sample=False))
    made = RouterTraining(sample.model, source, replace(PUBLISHED["dpm-solver-2"], objective=objective))
    assert [call for call, _ in made.calls] == [2, 4, 6]
    call, row = made.calls[1]
    logits, (run_,) = made.rows[row].detach().clone(), source.all
    (gradient,) = torch.autograd.grad(made.evaluate(run_, call, made.rows[row]).loss, made.rows[row])
    before, at = ((sample.model, *(run_.calls[i][name] for name in sample.inputs)) for i in (call - 1, call))
    _, _, expected = by_hand(uvit_forward, before, at, logits, objective)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_is_the_mean_of_its_trajectories(runs: Trajectories) -> None:
    made = training(runs)
    call, row = made.calls[1]
    one_by_one = []
    for trajectory in runs.all[:2]:
        loss = made.evaluate(trajectory, call, made.rows[row]).loss
        one_by_one.append(torch.autograd.grad(loss, made.rows[row])[0])
    descend(made.optimiser, runs.all[:2], lambda each: (made.evaluate(each, call, made.rows[row]).loss,))
    torch.testing.assert_close(made.rows[row].grad, (one_by_one[0] + one_by_one[1]) / 2)


def test_a_learned_router_beats_others_that_cache_as_much() -> None:
    """Nearer to the uncached latents than with shuffled rows, in a guided flow-matching run from other noise."""
    lively = pipes.lively(PlainDiT(layers=3, width=16, size=8))
    sample = Sample(lively, {**SAMPLE.inputs, "x": torch.randn(4, 4, 8, 8)})
    made, uncached = runs_of(sample, 8, guidance=2.0), NoCache()
    options = RouterOptions(iterations=80, objective=Objective(1e-5, "sum"), lr=0.3, threshold=0.5)
    router = train_router(sample.model, recorded(sample, 8, 2, guidance=2.0), options, progress=False)
    true = final(sample, made, uncached, 7)

    def error(made_: Router) -> float:
        return float((final(sample, made, LearningToCache(made_), 7) - true).norm() / true.norm())

    generator, others = torch.Generator().manual_seed(0), []
    for _ in range(3):
        rows = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in router.logits])
        others.append(error(replace(router, logits=rows)))
    cached = sum(router.cached().values())
    assert 0 < cached < 4 * router.sites
    assert error(router) < 0.8 * min(others)


def test_a_pipeline_trains_on_its_own_runs() -> None:
    """Whatever the pipeline is, its guidance and its scheduler; optimized or not."""
    sampler = pipes.sd3()
    stream = dicompile.Stream(sampler.pipe, lambda number: sampler(4, seed=number), keep=1, every=2)
    router = train_router(sampler.pipe, stream, replace(OPTIONS, iterations=3), progress=False)
    assert (router.facts.model, router.facts.iterations) == ("SD3Transformer2DModel", 3)
    dicompile.optimize(sampler.pipe, LearningToCache(router, threshold=0.9), backend="eager")
    sampler(4)
    assert dicompile.report(sampler.pipe).kinds["reuse"] == 2


def test_runs_of_several_sizes_train_one_router(runs: Trajectories) -> None:
    """Prompts are not padded by every pipeline, and their guidance partners have lengths of their own."""
    halved = Sample(SAMPLE.model, {name: value[:2] for name, value in SAMPLE.inputs.items()})
    others = recorded(halved, STEPS, 1)
    made = training(Trajectories(runs.model, runs.sampler, runs.timesteps, [runs.all[0], *others.all]))
    call, row = made.calls[0]
    for trajectory, source in ((runs.all[0], runs), (others.all[0], others)):
        alone = training(source).evaluate(trajectory, call, made.rows[row])
        assert torch.equal(made.evaluate(trajectory, call, made.rows[row]).loss, alone.loss)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_an_odd_number_of_steps_is_refused_at_once() -> None:
    with pytest.raises(InvalidRouter, match="5 steps are odd"):
        training(recorded(SAMPLE, 5, 1))


def test_a_checkpoint_of_another_training_is_refused(runs: Trajectories, tmp_path: Path) -> None:
    files = Files(tmp_path / "r.ckpt")
    trained(runs, replace(OPTIONS, iterations=1), files=files)
    with pytest.raises(InvalidRouter, match="belongs to another training") as caught:
        trained(runs, replace(OPTIONS, lr=0.2), files=files, resume=True)
    assert '"lr": 0.1' in caught.value.why
    assert '"lr": 0.2' in caught.value.why


def test_more_iterations_continue_a_finished_training(runs: Trajectories, tmp_path: Path) -> None:
    files = Files(tmp_path / "r.ckpt")
    trained(runs, replace(OPTIONS, iterations=3), files=files)
    longer = trained(runs, files=files, resume=True)
    assert torch.equal(longer.logits, trained(runs).logits)


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_damaged_checkpoint_is_named(runs: Trajectories, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.ckpt").write_bytes(content)
    with pytest.raises(InvalidRouter, match=r"r\.ckpt is not a checkpoint"):
        trained(runs, files=Files(tmp_path / "r.ckpt"), resume=True)
