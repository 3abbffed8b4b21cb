"""On a GPU: requests whose threads have streams of their own get what each gets by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.serve import Batcher
from tests import models
from tests.gpu.test_variants_gpu import DEVICE, MARKS
from tests.models import Sample
from tests.serve.clients import at_once

pytestmark = MARKS

STEPS = 6
BEHIND = 50_000_000
"""Cycles by which a stream is behind its thread: what is read too early is read before it is made."""


def on_the_gpu() -> Sample:
    model, inputs = models.plain_dit(layers=2)
    return Sample(model.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in inputs.items()})


def outputs(model: Any, sample: Sample, seed: int, *, cycles: int = 0) -> list[Tensor]:
    """Of every step, each latent made on the current stream just before it is wanted."""
    noise = torch.randn(STEPS, *sample.inputs["x"].shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    torch.cuda.synchronize()
    found = []
    for latent, timestep in zip(noise, models.timesteps(STEPS), strict=True):
        x = torch.full_like(latent, torch.nan)
        if cycles:
            torch.cuda._sleep(cycles)
        x.copy_(latent)
        with torch.no_grad():
            found.append(model(**sample.inputs | {"x": x, "t": torch.full_like(sample.inputs["t"], timestep)}).clone())
    return found


@pytest.mark.parametrize("policy", ["fora", "taylorseer", "toca"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_each_gets_what_it_gets_by_itself(policy: str, backend: str) -> None:
    sample = on_the_gpu()
    batcher = Batcher(sample.model, backend=backend, patience=20.0, sizes=(1, 2))
    requests = [batcher.request(policy, schedule=models.timesteps(STEPS)) for _ in range(2)]

    def run(request: Any, seed: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with request, torch.cuda.stream(stream):
            found = outputs(request.model, sample, seed, cycles=BEHIND)
            stream.synchronize()
        return found

    together = at_once(*[lambda i=i, request=request: run(request, i) for i, request in enumerate(requests)])
    assert batcher.served().batches == {2: STEPS}
    for seed, ours in enumerate(together):
        alone = outputs(models.optimized(sample, policy, STEPS, backend), sample, seed)
        for mine, theirs in zip(ours, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
