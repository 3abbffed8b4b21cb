"""What two processes of a gloo group do, each case by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from dicompile import FORA, FirstBlockCache, Policy, ToCa, ToCaFlux, cache_context, optimize, plan_of, structure_of
from dicompile.capture import capture_functional
from dicompile.learn.processes import share
from dicompile.ops.attention_scores import attention_received
from dicompile.ops.ulysses import ulysses_attention, ulysses_received
from dicompile.plan import Cadence, Refresh, Reuse, Rule, SlotKind, TokenScore
from dicompile.serve import Batcher
from tests import models
from tests.learn.flows import trained
from tests.models import PlainDiT, Sample, optimized, plain_dit, redraw, state_of, timesteps
from tests.parallel.processes import RANKS
from tests.pipelines.pipes import FLUX_PROMPTS, PIPELINES, Sampler, flux_transformer

STEPS = 4


def split(sampler: Sampler, **config: Any) -> Sampler:
    """Tokens of the denoiser are split over the ranks."""
    for denoiser in sampler.denoisers:
        denoiser.enable_parallelism(config=ContextParallelConfig(**config or {"ulysses_degree": RANKS}))
    return sampler


def divide(model: Any) -> None:
    """Layers of a model are divided among the ranks, as diffusers does it on other devices than a CPU."""
    with mock.patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",)):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=RANKS))


def divided(name: str) -> Sampler:
    sampler = PIPELINES[name]()
    divide(sampler.denoisers[0])
    return sampler


def cached(sampler: Sampler, policy: Policy | str) -> Sampler:
    optimize(sampler.pipe, policy, mode="eager")
    return sampler


class Collectives(TorchDispatchMode):
    """Counts collectives; waiting for one is none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "_c10d_functional" and "wait" not in func.name()
        return func(*args, **kwargs or {})


def counted(sampler: Sampler) -> tuple[Tensor, list[int]]:
    """Latents of a run, and the collectives of each of its steps; what is captured for the first two counts, too."""
    counts: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        counts.append(mode.count - sum(counts))
        return values

    with Collectives() as mode:
        return sampler(STEPS, callback_on_step_end=note), counts


def two_prompts(model: Any, halves: Sequence[int], combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """A loop with guidance; `halves` are the prompts that this process computes."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = optimize(model, FORA(interval=2), schedule=scheduler, mode="eager")
    scheduler.set_timesteps(STEPS)
    latent = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "guidance": torch.ones(1)}
    for t in scheduler.timesteps:
        found = []
        for half in halves:
            prompt = FLUX_PROMPTS[half]
            with cache_context(("cond", "uncond")[half]):
                found.append(model(
                    latent, timestep=t[None] / 1000, encoder_hidden_states=prompt["prompt_embeds"],
                    pooled_projections=prompt["pooled_prompt_embeds"], return_dict=False, **ids,
                )[0])  # fmt: skip
        latent = scheduler.step(combine(found), t, latent, return_dict=False)[0]
    return latent


def guided(values: list[Tensor]) -> Tensor:
    cond, uncond = values
    return uncond + 3 * (cond - uncond)


def from_all_ranks(values: list[Tensor]) -> Tensor:
    gathered = [torch.empty_like(values[0]) for _ in range(RANKS)]
    distributed.all_gather(gathered, values[0].contiguous())
    return guided(gathered)


def of_every_rank(rank: int) -> Any:
    return cached(PIPELINES["flux"](), FORA(interval=2))(STEPS, seed=rank)


def of_every_half(rank: int) -> Any:
    return two_prompts(flux_transformer(), [rank], from_all_ranks)


def of_tokens(name: str, policy: Policy | str) -> Callable[[int], Any]:
    return lambda _: counted(cached(split(PIPELINES[name]()), policy))


def of_tokens_afterwards(_: int) -> Any:
    sampler = cached(PIPELINES["flux"](), FORA(interval=2))
    sampler(STEPS)
    return split(sampler)(STEPS)


def of_scores(name: str) -> Callable[[int], Any]:
    return lambda _: scores(split(PIPELINES[name]()))


def of_given_tokens(context: str) -> Callable[[int], Any]:
    return lambda _: by_place(split(PIPELINES["flux"]()), context)


def published(_: int) -> Any:
    sampler = cached(split(PIPELINES["flux"]()), "toca")
    sampler(STEPS)
    _, counts = counted(sampler)
    return plan_of(sampler.denoisers[0]).policy, counts


def of_different_policies(rank: int) -> Any:
    return cached(split(PIPELINES["flux"]()), FORA(interval=2 + rank))(STEPS)


def of_a_model(make: Callable[[nn.Module], Any]) -> Callable[[int], Any]:
    def case(_: int) -> Any:
        model = flux_transformer()
        make(model)
        return optimize(model, "fora", schedule=FlowMatchEulerDiscreteScheduler(), mode="eager")

    return case


def twice(sampler: Sampler) -> Any:
    """Latents of two runs, the exchanges of each step of the second, and what was planned."""
    first = sampler(STEPS)
    again, counts = counted(sampler)
    return first, again, counts, str(plan_of(sampler.denoisers[0]))


def of_layers_afterwards(_: int) -> Any:
    sampler = cached(PIPELINES["flux"](), FORA(interval=2))
    sampler(STEPS)
    divide(sampler.denoisers[0])
    return twice(sampler)


def sharded_heads(model: nn.Module) -> None:
    block = model.get_submodule("transformer_blocks.0")
    parallelize_module(block, init_device_mesh("cpu", (RANKS,)), {"attn.to_q": ColwiseParallel()})


def in_background(sampler: Sampler) -> Any:
    optimize(sampler.pipe, "fora", warmup="background")
    return sampler(STEPS)


def served(sampler: Sampler, batcher: Batcher) -> Any:
    with batcher.pipeline(sampler.pipe, FORA(interval=2)) as pipe:
        return replace(sampler, pipe=pipe)(STEPS)


def split_when_served(_: int) -> Any:
    sampler = PIPELINES["flux"]()
    batcher = Batcher(sampler.denoisers[0], backend="eager")
    return served(split(sampler), batcher)


def in_another_class(_: int) -> Any:
    """As a library does that swaps the class of a module."""
    model = cached(PIPELINES["flux"](), "fora").denoisers[0]
    model.__class__ = type(fully_shard(flux_transformer()))


class Summed(PlainDiT):
    """Its result is the sum over all ranks."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return all_reduce(super().forward(x, t, y), "sum", distributed.group.WORLD)  # type: ignore[arg-type]


def of_two_models(_: int) -> Any:
    """How often models of one kind are captured."""
    with mock.patch("dicompile.capture.shared.capture_functional", wraps=capture_functional) as captures:
        for _ in range(2):
            sample = Sample(redraw(Summed(layers=2)), plain_dit().inputs)
            models.run(optimized(sample, FORA(interval=2), STEPS), sample.inputs, timesteps(STEPS))
    return torch.tensor(captures.call_count)


def exchanged(rank: int) -> Any:
    """Attention and its score of the tokens of this rank, and what they are of all tokens on one."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, tokens, 8, generator=generator) for tokens in (6, 10, 10))
    own = [each.chunk(RANKS, 2)[rank] for each in (query, key, value)]
    mask = torch.randn(2, 1, 1, 10, generator=generator)
    among: dict[str, Any] = {"ranks": RANKS, "group": distributed.group.WORLD.group_name, "scale": 0.3}  # type: ignore[union-attr]
    return (
        ulysses_attention(*own, mask, **among),
        scaled_dot_product_attention(query, key, value, mask, scale=0.3).chunk(RANKS, 2)[rank],
        ulysses_received(*own[:2], mask, **among),
        attention_received(query, key, mask, 0.3).chunk(RANKS, 1)[rank],
    )


def scores(sampler: Sampler) -> tuple[dict[str, Tensor]]:
    """Scores that the first step of a run has kept, by the site that made them."""
    kept: list[dict[str, Tensor]] = []

    def note(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        model = sampler.denoisers[0]
        sites, slots = structure_of(model).everything, plan_of(model).slots
        context = next(iter(state_of(model).contexts.values()))
        stored = zip(slots, context.store, strict=False)  # as many as were stored so far
        found = {slot.site: value for slot, value in stored if slot.kind is SlotKind.SCORE and value is not None}
        kept.append({f"{sites[site].kind.value} {site}": value for site, value in found.items()})
        return values

    cached(sampler, ToCa(interval=3, score="attention", grid_cell=0, ratio=0.2))(STEPS, callback_on_step_end=note)
    return (kept[0],)


PLACES = {3: [*range(3)], 8: [*range(8)], 6: [*range(3)] * 2, 16: [*range(8)] * 2}
"""Places of tokens within a rank's text or picture, by the tokens of one rank, or of both in the order of the whole."""


def by_place(sampler: Sampler, context: str) -> tuple[Tensor, list[int]]:
    """A run that refreshes the first tokens of every rank, with the collectives of each step; on one rank, the same."""

    def noise(shape: tuple[int, int], *_: object, **__: object) -> Tensor:
        text, picture = (6, 16) if shape[1] in (6, 16, 22) else (3, 8)
        joined = [*PLACES[text], *(place + 3 for place in PLACES[picture])]
        return -torch.tensor(PLACES.get(shape[1], joined), dtype=torch.float32).expand(shape)

    def refresh(sites: str, seen: Any) -> Rule:
        by_noise = TokenScore(base="random", age_weight=0)
        return Rule(sites=(sites,), do=Refresh(ratio=0.4, context=seen, score=by_noise))

    rules = Rule(sites=("joint-attention",), do=Reuse(what="attention")), refresh("mlp", "stored")
    policy = Policy(name="by-place", cadence=Cadence(interval=2), rules=(*rules, refresh("parallel", context)))
    with mock.patch("dicompile.runtime.values.drawn", noise):
        cached(sampler, policy)(STEPS)  # what is traced counts, too
        return counted(sampler)


def trained_together(_: int) -> Any:
    """What training ends with, and how many iterations its logs tell of."""
    folder: list[Any] = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    found = trained(Path(folder[0]))
    distributed.barrier()  # what rank 0 writes is there
    return found, *(
        len((Path(folder[0]) / f"{name}.jsonl").read_text().splitlines()) for name in ("router", "predictor")
    )


def told_of_a_death(rank: int, sampler: Sampler) -> Any:
    """Rank 1 dies in the middle of a run; what rank 0 is told."""

    def leave(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and step == 1:
            os._exit(0)
        return values

    try:
        sampler(STEPS, callback_on_step_end=leave)
    except RuntimeError as error:
        return str(error)


CHOOSING = ToCaFlux(interval=3, ratio=0.4)
LOCAL = ToCa(interval=2, score="random", grid_cell=0, ratio=0.5)
CASES: dict[str, Callable[[int], Any]] = {
    "data": of_every_rank,
    "guidance": of_every_half,
    **{f"tokens of {name}": of_tokens(name, FORA(interval=2)) for name in ("flux", "wan", "qwen image")},
    "tokens afterwards": of_tokens_afterwards,
    "chosen tokens": of_tokens("flux", LOCAL),
    "attention": exchanged,
    **{f"scores of {name}": of_scores(name) for name in ("flux", "wan", "qwen image")},
    **{f"given tokens, {context}": of_given_tokens(context) for context in ("stored", "all", "kept")},
    "published": published,
    "gate": of_tokens("flux", FirstBlockCache(threshold=0.1)),
    "different policies": of_different_policies,
    "background": lambda _: in_background(split(PIPELINES["flux"]())),
    "served": split_when_served,
    "two models": of_two_models,
    "training": trained_together,
    "a batch of one": lambda _: share([0]),
    "ring": lambda _: cached(split(PIPELINES["flux"](), ring_degree=RANKS), "fora"),
    "another class": in_another_class,
    "layers afterwards": of_layers_afterwards,
    "layers": lambda _: twice(cached(divided("flux"), CHOOSING)),
    "dying": lambda rank: told_of_a_death(rank, cached(split(PIPELINES["flux"]()), FORA(interval=2))),
}


def check_layers(found: Sequence[Any], one: Sampler) -> list[int]:
    """Check that ranks which divide layers did what one rank does, twice; returns the exchanges of each step."""
    (first, again, counts, plan), other = found
    torch.testing.assert_close(first, one(STEPS), atol=1e-5, rtol=1e-5)  # sums over features in another order
    assert torch.equal(first, again)
    assert all(map(torch.equal, (first, again), other))
    assert (counts, plan) == other[2:]
    return counts  # type: ignore[no-any-return]
