"""L2P beside its rule written out: a matrix on all values so far, computed or forecast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.policies.l2p import FULL_STEPS
from tests import models
from tests.models import Sample, call, optimized, run, timesteps

STEPS = 50


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(models.PlainDiT(1, width=16, size=8)), inputs)


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """Lower-triangular, near to reuse, as training leaves it."""
    noise = 0.05 * torch.randn(STEPS, STEPS, generator=torch.Generator().manual_seed(4))
    return (torch.eye(STEPS) + noise).tril()


@pytest.fixture
def file(matrix: Tensor, tmp_path: Path) -> Path:
    path = tmp_path / "weight.txt"
    path.write_text(f"{matrix.tolist()}\n", encoding="utf-8")
    return path


def reference(sample: Sample, matrix: Tensor, full: tuple[int, ...]) -> list[Tensor]:
    values: list[Tensor] = []
    for step, time in enumerate(timesteps(STEPS)):
        if step in full:
            values.append(call(sample.model, sample.inputs, time, step))
        else:
            row = matrix[len(values) - 1][: len(values)]
            values.append(torch.tensordot(row, torch.stack(values), dims=1))
    return values


@pytest.mark.parametrize("interval", [5, 16])
def test_a_run_is_that_of_the_published_rule(sample: Sample, matrix: Tensor, file: Path, interval: int) -> None:
    model = optimized(sample, dicompile.L2P(str(file), interval), STEPS)
    found = run(model, sample.inputs, timesteps(STEPS))
    for ours, theirs in zip(found, reference(sample, matrix, FULL_STEPS[interval]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plan = dicompile.plan_of(model)
    assert tuple(step for step, planned in enumerate(plan.steps) if planned.kind == "full") == FULL_STEPS[interval]
    assert {planned.flops for planned in plan.steps if planned.kind != "full"} == {0}
    latent = sample.inputs["x"].numel() * 4
    assert plan.cache_bytes == (len(FULL_STEPS[interval])) * latent, "one value for every full step"


def test_a_file_and_its_matrix_are_one_policy_and_steps_may_be_named(matrix: Tensor, file: Path) -> None:
    by_file, by_value = dicompile.L2P(file, 6), dicompile.L2P(matrix.tolist(), 6)
    assert by_file.rules[0].do.weights == by_value.rules[0].do.weights
    assert dicompile.Policy.from_json(by_file.to_json()) == by_file
    named = dicompile.L2P(file, at=FULL_STEPS[6])
    assert named == by_file
    assert dicompile.get_policy("l2p", weights=str(file), interval=6) == by_file


def test_other_numbers_of_steps_are_refused(sample: Sample, file: Path) -> None:
    model = optimized(sample, dicompile.L2P(file), 20)
    with pytest.raises(PolicyDoesNotFit, match="was fitted to 50 steps, the schedule has 20") as caught:
        run(model, sample.inputs, timesteps(20))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[]", "[[1, 2]]", '[["a"]]', "[1]", "[[1], [1, 2]]", "[[1"])
def test_a_file_that_holds_no_matrix_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weight.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidPolicy, match="this is not a matrix of weights") as caught:
        dicompile.L2P(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InvalidPolicy, match="this is not a matrix of weights"):
        dicompile.L2P(tmp_path / "gone.txt")


def test_an_interval_that_was_not_published_is_refused(file: Path) -> None:
    with pytest.raises(InvalidPolicy, match="no choice of full steps is published for interval 9"):
        dicompile.L2P(file, 9)


def test_the_unit_matrix_is_reuse() -> None:
    identity = [[float(row == column) for column in range(4)] for row in range(4)]
    weights = dicompile.L2P(identity, at=(0, 2)).rules[0].do.weights
    assert weights == ((), (1.0,), (), (1.0, 0.0))
