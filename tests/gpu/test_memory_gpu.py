"""On a GPU: slots in host memory give the same bits, make no host wait, and leave the GPU; fewer bits compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from tests.gpu.test_variants_gpu import MARKS, latents, model_and_inputs, scheduler, waiting_is_an_error
from tests.models import state_of

pytestmark = MARKS

METHODS = ["fora", "toca", "taylorseer"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with dicompile.session():
        yield


class Sampling:
    """A model on the GPU with inputs that do not depend on what it returns."""

    def __init__(self, policy: str, **options: Any) -> None:
        torch.manual_seed(0)
        model, self.inputs = model_and_inputs(torch.float32)
        self.scheduler = scheduler()
        self.latents = latents(torch.float32)
        self.model = dicompile.optimize(model, policy, schedule=self.scheduler, **options)

    def run(self, steps: int | None = None) -> list[Tensor]:
        pairs = list(zip(self.scheduler.timesteps, self.latents, strict=True))[:steps]
        return [self.model(**self.inputs | {"hidden_states": x, "timestep": t.expand(4)})[0] for t, x in pairs]

    def stored(self) -> list[Tensor]:
        (context,) = state_of(self.model).contexts.values()
        return [tensor for tensor in context.store if tensor is not None]


@pytest.mark.parametrize("policy", METHODS)
@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_a_run_from_host_memory_gives_the_same_bits(policy: str, mode: str) -> None:
    wanted = Sampling(policy, mode=mode).run()
    moved = Sampling(policy, mode=mode, cache_device="cpu")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(moved.run(), wanted, strict=True))


def test_what_is_stored_is_pinned_and_off_the_gpu() -> None:
    sampling = Sampling("fora", cache_device="cpu")
    sampling.run(steps=3)
    assert sampling.stored()
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in sampling.stored())


def test_nobody_waits_for_the_device() -> None:
    sampling = Sampling("fora", cache_device="cpu")
    sampling.run()
    with waiting_is_an_error():
        sampling.run()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_compiled_casts_agree_with_those_of_single_operators(dtype: str) -> None:
    eager = Sampling("fora", mode="eager", cache_dtype=dtype).run()
    compiled = Sampling("fora", cache_dtype=dtype).run()
    scale = max(float(output.abs().max()) for output in eager)
    assert max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True)) / scale < 2e-2
