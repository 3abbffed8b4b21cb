"""What two processes that share tokens do with the bare backend, each case by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ContextParallelConfig
from torch import Tensor, nn

import dicompile
from dicompile import FORA, FirstBlockCache, Policy
from tests.models import timesteps
from tests.parallel.processes import RANKS
from tests.parallel.ranks import STEPS
from tests.pipelines.pipes import FLUX_PROMPTS, flux_transformer

POLICY = FORA(interval=2)
EXCHANGES = ("_c10d_functional::all_gather", "_c10d_functional::all_to_all")
TIMES = [t / 1000 for t in timesteps(STEPS)]


def shared(policy: Policy = POLICY) -> Any:
    """A model whose tokens are split over the ranks."""
    model = flux_transformer()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    return by_backend(model, policy)


def by_backend(model: nn.Module, policy: Policy = POLICY) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="dicache", options={"policy": policy, "schedule": TIMES, "mode": "eager"})


@torch.no_grad()
def sampled(model: Any) -> tuple[Tensor, list[int]]:
    """Results of a run, and the exchanges at each step.

    Dynamo compiles nothing under a mode that would see every operator, so they are counted by the profiler.
    """
    latent = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "guidance": torch.ones(1)}
    prompt, found, counts = FLUX_PROMPTS[0], [], []
    for time in TIMES:
        with torch.profiler.profile() as seen:
            found.append(model(
                latent, timestep=torch.tensor([time]), encoder_hidden_states=prompt["prompt_embeds"],
                pooled_projections=prompt["pooled_prompt_embeds"], return_dict=False, **ids,
            )[0])  # fmt: skip
        counts.append(sum(event.name.startswith(EXCHANGES) for event in seen.events()))
        latent = latent - found[-1] / STEPS
    return torch.stack(found), counts


def of_tokens(_: int) -> Any:
    """By the bare backend, twice, and by `optimize`."""
    model = shared()
    first = sampled(model)
    again = sampled(model)
    return first[0], *again, sampled(dicompile.optimize(model._orig_mod, POLICY, schedule=TIMES, mode="eager"))[0]


CASES: dict[str, Callable[[int], Any]] = {
    "tokens": of_tokens,
    "gate": lambda _: sampled(shared(FirstBlockCache(threshold=0.1))),
    "different policies": lambda rank: sampled(shared(FORA(interval=2 + rank))),
}
