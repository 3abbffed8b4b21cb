"""Delta-DiT beside its rule on the model's own blocks, and rules for parts of the model and of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Cadence, Gate, Policy, Reuse, Rule
from tests import models
from tests.models import Sample, optimized, timesteps
from tests.policies.trajectories import slowing

LAYERS = 4


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(models.PlainDiT(LAYERS, width=16, size=8)), inputs)


def calls(sample: Sample, steps: int) -> list[dict[str, Tensor]]:
    latents = slowing(sample.inputs["x"], steps)
    return [sample.inputs | {"x": x, "t": torch.full((2,), t)} for x, t in zip(latents, timesteps(steps), strict=True)]


def published(sample: Sample, steps: int, interval: int, count: int, boundary: int) -> list[Tensor]:
    """The rule as the paper has it: of a run of blocks, the stream at its end minus that at its start is reused."""
    model: Any = sample.model
    rear, front = (LAYERS - count, LAYERS), (0, count)
    found, deltas = [], dict[tuple[int, int], Tensor]()
    with torch.no_grad():
        for step, inputs in enumerate(calls(sample, steps)):
            h, c = model.tokens(inputs["x"]), model.condition(inputs["t"], inputs["y"])
            streams, reused = [h], rear if step < boundary else front
            for number, block in enumerate(model.blocks):
                if step % interval and number == reused[0]:
                    h = h + deltas[reused]
                elif not step % interval or not reused[0] <= number < reused[1]:
                    h = block(h, c)
                streams.append(h)
            if step % interval == 0:
                deltas = {(first, end): streams[end] - streams[first] for first, end in (rear, front)}
            found.append(model.picture(h, c, 8, 8))
    return found


@pytest.mark.parametrize(("steps", "interval", "count", "boundary"), [(8, 2, 3, 4), (9, 3, 2, 3), (8, 4, 1, 8)])
def test_it_reuses_what_runs_of_blocks_add(
    sample: Sample, steps: int, interval: int, count: int, boundary: int
) -> None:
    model = optimized(sample, dicompile.DeltaDiT(interval, count / LAYERS, boundary / steps), steps)
    with torch.no_grad():
        found = [model(**inputs) for inputs in calls(sample, steps)]
    for ours, theirs in zip(found, published(sample, steps, interval, count, boundary), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    kinds = [step.kind for step in dicompile.plan_of(model).steps]
    assert [kind == "full" for kind in kinds] == [step % interval == 0 for step in range(steps)]


def test_by_default_it_computes_as_many_blocks_as_the_paper_reports() -> None:
    sample = models.flux(layers=2)
    model = optimized(sample, dicompile.DeltaDiT(), 20)
    models.call(model, sample.inputs, 999, 0)
    plan, structure = dicompile.plan_of(model), dicompile.structure_of(model)
    blocks = len(structure.blocks)
    spans = [span for span in structure.spans if span.kind.value == "block"]
    computed = [
        {span.block for span in spans if step.sites[span.id].action.is_full} for step in plan.steps
    ]  # fmt: skip
    assert [len(numbers) for numbers in computed] == [blocks, blocks // 4] * 10
    assert computed[1] == set(range(blocks // 4))
    assert computed[19] == set(range(blocks - blocks // 4, blocks))
    assert sum(map(len, computed)) * 1.6 == 20 * blocks


@pytest.mark.parametrize("name", ["stack", "model"])
def test_a_part_of_the_blocks_is_no_matter_of_the_whole(name: Any) -> None:
    with pytest.raises(InvalidPolicy, match=f"a rule for the whole {name} is for some blocks only"):
        Rule(sites=(name,), blocks=(0, 0.5), do=Reuse(what="update"))


def test_a_part_without_a_block_is_refused_by_that(sample: Sample) -> None:
    model = optimized(sample, dicompile.DeltaDiT(share=0.1), 2)
    with pytest.raises(PolicyDoesNotFit, match=r"no whole block\n.*\n.*of 4 blocks those from 90% to 100%"):
        model(**calls(sample, 2)[0])


def test_a_gate_decides_about_the_whole_run() -> None:
    rule = Rule(sites=("block",), during=(0, 0.5), do=Reuse(what="update"))
    with pytest.raises(InvalidPolicy, match="one of its rules holds in a part of the run only"):
        Policy(name="x", cadence=Cadence(gate=Gate(threshold=0.1)), outside=(1, 0), rules=(rule,))


def test_branches_of_some_blocks_at_some_steps(sample: Sample) -> None:
    """MLPs of the second half of the blocks, in the second half of the run."""
    steps = 6
    rule = Rule(sites=("mlp",), blocks=(0.5, 1), during=(0.5, 1), do=Reuse())
    policy = Policy(name="x", cadence=Cadence(interval=3, counting="up"), rules=(rule,))
    assert Policy.from_yaml(policy.to_yaml()) == policy
    model = optimized(sample, policy, steps)
    with torch.no_grad():
        for inputs in calls(sample, steps):
            model(**inputs)
    plan, structure = dicompile.plan_of(model), dicompile.structure_of(model)
    reused = {
        (number, structure.sites[i].label)
        for number, step in enumerate(plan.steps) for i, site in enumerate(step.sites[: len(structure.sites)])
        if not site.action.is_full
    }  # fmt: skip
    assert reused == {(number, f"{block}.mlp") for number in (4, 5) for block in (2, 3)}
