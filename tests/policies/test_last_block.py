"""Everything but the last block is recalled, and that runs again: what LearniBridge calibrates, without its LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.plan import Cadence, Policy, Reuse, Rule
from tests import models
from tests.models import Sample, optimized, timesteps
from tests.policies.trajectories import slowing

LAYERS, STEPS, INTERVAL = 4, 8, 3
TIMES = timesteps(STEPS)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(models.PlainDiT(LAYERS, width=16, size=8)), inputs)


def calls(sample: Sample) -> list[dict[str, Tensor]]:
    latents = slowing(sample.inputs["x"], STEPS)
    return [sample.inputs | {"x": x, "t": torch.full((2,), t)} for x, t in zip(latents, TIMES, strict=True)]


def rerun(sample: Sample, last: int) -> list[Tensor]:
    """The last blocks on the stream that the others left at the last full step, with the conditioning of this one."""
    model: Any = sample.model
    found, stream = [], torch.empty(0)
    with torch.no_grad():
        for step, inputs in enumerate(calls(sample)):
            c = model.condition(inputs["t"], inputs["y"])
            if step % INTERVAL == 0:
                stream = model.tokens(inputs["x"])
                for block in model.blocks[:-last]:
                    stream = block(stream, c)
            h = stream
            for block in model.blocks[-last:]:
                h = block(h, c)
            found.append(model.picture(h, c, 8, 8))
    return found


@pytest.mark.parametrize("kind", ["stack", "block"])
@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.sampled
def test_the_last_blocks_run_on_the_stored_stream(sample: Sample, kind: Any, last: int) -> None:
    policy = Policy(
        name="last-block",
        cadence=Cadence(interval=INTERVAL, anchor="last"),
        outside=(0, last),
        rules=(Rule(sites=(kind,), do=Reuse(what="stream")),),
    )
    model = optimized(sample, policy, STEPS)
    with torch.no_grad():
        found = [model(**inputs) for inputs in calls(sample)]
    for ours, theirs in zip(found, rerun(sample, last), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plan = dicompile.plan_of(model)
    size = 2 * 16 * 16 * 4
    assert [plan.held(step) for step in range(STEPS)] == [size, size, 0, size, size, 0, size, 0]


def test_on_flux_it_is_the_joined_stream() -> None:
    sample, steps = models.flux(), 5
    policy = Policy(
        name="last-block",
        cadence=Cadence(interval=4, anchor="last"),
        outside=(0, 1),
        rules=(Rule(sites=("stack",), do=Reuse(what="stream")),),
    )
    model = optimized(sample, policy, steps)
    full: dict[str, Tensor] = {}
    blocks: Any = sample.model.single_transformer_blocks  # type: ignore[union-attr]

    def keep(*call: Any) -> None:
        full["text"], full["image"] = call[2]

    def give(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"hidden_states": full["image"], "encoder_hidden_states": full["text"]}

    for step, time in enumerate(timesteps(steps)):
        ours = models.call(model, sample.inputs, time, step)
        is_full = step % 4 == 0
        handle = (
            blocks[-2].register_forward_hook(keep)
            if is_full
            else blocks[-1].register_forward_pre_hook(give, with_kwargs=True)
        )
        theirs = models.call(sample.model, sample.inputs, time, step)
        handle.remove()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plan = dicompile.plan_of(model)
    assert plan.held(0) == 22 * 32 * 4
