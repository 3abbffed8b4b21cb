"""On a GPU: compiled variants against the same graphs run in eager, and static plans that never wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dicompile
from dicompile.plan import Policy
from dicompile.policies import FORA, NoCache, ToCa
from dicompile.runtime import Session
from tests.models import dit, state_of

MARKS = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # off, so that figures can be compared
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
pytestmark = MARKS

DEVICE = "cuda"
STEPS = 8
LAYERS = 3
TOLERANCE = {
    # Sums in another order, and products that cuBLAS splits otherwise for other shapes; TF32 is off.
    torch.float32: 1e-4,
    # A fused kernel keeps float32 between operators where eager rounds to 8 bits, once per operator of every block.
    torch.bfloat16: 4e-2,
}
"""Largest difference over the largest value of the output."""

CACHING = {
    "none": NoCache(),
    "fora": FORA(interval=2),
    "toca": ToCa(ratio=0.2),
    "toca, value norm": ToCa(ratio=0.2, score="value-norm"),
    "toca, random": ToCa(ratio=0.2, score="random"),
}


class Step(NamedTuple):
    """Output of a step, and the tokens that every site refreshed."""

    output: Tensor
    chosen: dict[int, Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with dicompile.session(Session(keep_chosen=True)):
        yield


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """While open, whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def scheduler() -> DDIMScheduler:
    made = DDIMScheduler()
    made.set_timesteps(STEPS, device=DEVICE)
    return made


def latents(dtype: torch.dtype) -> list[Tensor]:
    """One latent per step, the same in every run, so that a difference does not grow from step to step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 16, 16, generator=generator).to(DEVICE, dtype) for _ in range(STEPS)]


def model_and_inputs(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    sample = dit(LAYERS)
    inputs = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in sample.inputs.items()}
    return sample.model.to(DEVICE, dtype), inputs


def sample_steps(policy: Policy, mode: str, dtype: torch.dtype) -> list[Step]:
    model, inputs = model_and_inputs(dtype)
    schedule = scheduler()
    optimized = dicompile.optimize(model, policy, schedule=schedule, mode=mode)
    steps = []
    for timestep, latent in zip(schedule.timesteps, latents(dtype), strict=True):
        inputs |= {"hidden_states": latent, "timestep": timestep.expand(4)}
        output = optimized(**inputs)[0]
        contexts = state_of(optimized).contexts.values()  # none where nothing is remembered
        steps.append(Step(output.clone(), {site: chosen for c in contexts for site, chosen in c.chosen.items()}))
    return steps


def assert_close(got: Tensor, expected: Tensor) -> None:
    difference = (got - expected).abs().max() / expected.abs().max()
    assert difference.item() < TOLERANCE[expected.dtype]


@pytest.mark.parametrize("name", CACHING)
def test_compiled_variants_agree_with_the_same_graphs_in_eager(name: str) -> None:
    compiled = sample_steps(CACHING[name], "inductor", torch.float32)
    eager = sample_steps(CACHING[name], "eager", torch.float32)
    for got, expected in zip(compiled, eager, strict=True):
        assert got.chosen.keys() == expected.chosen.keys()
        for site, tokens in expected.chosen.items():
            assert torch.equal(got.chosen[site].sort(1).values, tokens.sort(1).values), f"site {site}"
        assert_close(got.output, expected.output)
    assert any(step.chosen for step in eager) == name.startswith("toca")


@pytest.mark.parametrize("name", ["none", "fora"])
def test_bfloat16_agrees_with_eager(name: str) -> None:
    """Without token selection: rounding would tell apart which of two tokens scores higher."""
    compiled = sample_steps(CACHING[name], "inductor", torch.bfloat16)
    eager = sample_steps(CACHING[name], "eager", torch.bfloat16)
    for got, expected in zip(compiled, eager, strict=True):
        assert_close(got.output, expected.output)


def test_compilation_alone_agrees_with_the_model_itself() -> None:
    compiled = sample_steps(NoCache(), "inductor", torch.float32)
    model, inputs = model_and_inputs(torch.float32)
    with torch.no_grad():
        for step, timestep, latent in zip(compiled, scheduler().timesteps, latents(torch.float32), strict=True):
            inputs |= {"hidden_states": latent, "timestep": timestep.expand(4)}
            assert_close(step.output, model(**inputs)[0])


@pytest.mark.parametrize("name", CACHING)
def test_static_plans_never_wait_for_the_device(name: str) -> None:
    model, inputs = model_and_inputs(torch.float32)
    schedule, drawn = scheduler(), latents(torch.float32)
    optimized = dicompile.optimize(model, CACHING[name], schedule=schedule)

    def generate() -> None:
        for timestep, latent in zip(schedule.timesteps, drawn, strict=True):
            optimized(**inputs | {"hidden_states": latent, "timestep": timestep.expand(4)})

    generate()
    with waiting_is_an_error():
        generate()
    assert not dicompile.report(optimized).cold_starts
