"""What two processes of a gloo group do with models whose layers tensor parallelism has divided, each case by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import dicompile
from dicompile import FORA, Cadence, ClusCa, FirstBlockCache, Policy, Refresh, Rule, ToCaFlux, TokenScore
from dicompile.plan.predictor import Predictor, PredictorFacts
from dicompile.serve import Batcher
from tests import models
from tests.parallel.bare import POLICY, by_backend, sampled
from tests.parallel.processes import RANKS
from tests.parallel.ranks import STEPS, cached, divide, divided, in_background, served, told_of_a_death, twice
from tests.pipelines.pipes import flux_transformer


def of_layers(name: str, policy: Policy | str) -> Callable[[int], Any]:
    return lambda _: twice(cached(divided(name), policy))


def given_back(_: int) -> Any:
    """Latents without caching, by torch's own hooks, before and after; and with it, of edited weights, too."""
    sampler = divided("flux")
    model, plain = sampler.denoisers[0], sampler(STEPS)
    weights = dict(model.named_parameters())
    cached(sampler, POLICY)
    found = sampler(STEPS)
    dicompile.disable(sampler.pipe)
    disabled = sampler(STEPS)
    dicompile.enable(sampler.pipe)
    layer = model.transformer_blocks[0].ff.net[2]
    with torch.no_grad():
        layer.weight.mul_(-1)
    edited = sampler(STEPS)
    layer.weight = nn.Parameter(-layer.weight)
    replaced = sampler(STEPS)
    layer.weight = weights["transformer_blocks.0.ff.net.2.weight"]
    with torch.no_grad():
        layer.weight.mul_(-1)
    frames = len(sampler.denoisers[0].frames)
    assert dicompile.restore(sampler.pipe).transformer is model
    is_same = all(weight is weights[name] for name, weight in model.named_parameters())
    return plain, disabled, sampler(STEPS), found, edited, replaced, frames, is_same


def refused(make: Callable[[nn.Module], Any], policy: Policy | str = POLICY, **options: Any) -> Callable[[int], Any]:
    def case(_: int) -> Any:
        model = flux_transformer()
        make(model)
        return dicompile.optimize(model, policy, schedule=FlowMatchEulerDiscreteScheduler(), **options)

    return case


def laid_out(path: str, style: Any) -> Callable[[nn.Module], Any]:
    return lambda model: parallelize_module(model, init_device_mesh("cpu", (RANKS,)), {path: style})


def by_fsdp_as_well(model: nn.Module) -> None:
    divide(model)
    fully_shard(model.proj_out)


def by_tokens_as_well(model: nn.Module) -> None:
    for part, plan in tensor_parallel._resolve_tp_plan(model, model._tp_plan):  # type: ignore[arg-type]
        parallelize_module(part, init_device_mesh("cpu", (RANKS,)), tensor_parallel._styles(plan))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))  # type: ignore[operator]


def unevenly(model: nn.Module) -> None:
    model.proj_out = nn.Linear(32, 15)
    laid_out("proj_out", ColwiseParallel())(model)


def over_other_ranks(model: nn.Module) -> None:
    laid_out("x_embedder", ColwiseParallel())(model)
    parallelize_module(model, init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("a", "b"))["b"],
                       {"context_embedder": ColwiseParallel()})  # fmt: skip


def of_different_policies(rank: int) -> Any:
    return cached(divided("flux"), FORA(interval=2 + rank))(STEPS)


def calibrated(_: int) -> Any:
    sampler = cached(divided("flux"), POLICY)
    with dicompile.calibrate(sampler.pipe):
        return sampler(STEPS)


def served_by_all(_: int) -> Any:
    sampler = divided("flux")
    return served(sampler, Batcher(sampler.denoisers[0], backend="eager"))


def predicted(_: int) -> Any:
    times = tuple(float(STEPS - step) for step in range(STEPS))
    facts = PredictorFacts(kind="table", blocks=("0", "1"), timesteps=times, penalty=0.1, seed=0, iterations=1)
    predictor = Predictor(torch.rand(STEPS, 2, 16), facts)
    return cached(divided("flux"), dicompile.TokenCache(predictor))(STEPS)


def by_entropy(_: int) -> Any:
    """A policy that ranks tokens by maps of attention, of which every rank has some heads."""
    model, inputs = models.pixart()
    names = {f"transformer_blocks.*.attn2.{name}": ColwiseParallel() for name in ("to_q", "to_k", "to_v")}
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.attn2.heads //= RANKS  # type: ignore[union-attr, operator]
    plan = {**names, "transformer_blocks.*.attn2.to_out.0": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    rule = Rule(sites=("mlp",), do=Refresh(ratio=0.5, score=TokenScore(base="entropy")))
    policy = Policy(name="by entropy", cadence=Cadence(interval=2), rules=(rule,))
    return models.call(models.optimized(models.Sample(model, inputs), policy, STEPS), inputs, 999, 0)


def bare(_: int) -> Any:
    model = flux_transformer()
    divide(model)
    return sampled(by_backend(model))


RUNS: dict[str, tuple[str, Policy | str]] = {
    "flux, fora": ("flux", POLICY),
    "flux, toca": ("flux", "toca"),
    "qwen image, fora": ("qwen image", POLICY),
    "flux, duca": ("flux", "duca"),
    **{f"flux, {base}": ("flux", ToCaFlux(interval=3, score=base, ratio=0.4))
       for base in ("value-norm", "key-norm", "norm", "similarity", "random")},
}  # fmt: skip
COMPILED = "flux, fora", "flux, toca"


def compiled(name: str) -> Callable[[int], Any]:
    """A run of a table, operator by operator and compiled."""
    pipeline, policy = RUNS[name]

    def case(_: int) -> Any:
        wanted = twice(cached(divided(pipeline), policy))
        sampler = divided(pipeline)
        dicompile.optimize(sampler.pipe, policy)
        return wanted, twice(sampler)

    return case


CASES: dict[str, Callable[[int], Any]] = {
    **{name: of_layers(*run) for name, run in RUNS.items()},
    **{f"compiled {name}": compiled(name) for name in COMPILED},
    "given back": given_back,
    "different policies": of_different_policies,
    "gathered": refused(laid_out("proj_out", ColwiseParallel(output_layouts=Replicate()))),
    "scattered": refused(laid_out("proj_out", RowwiseParallel(output_layouts=Shard(1)))),
    "normalised": refused(laid_out("norm_out.norm", SequenceParallel())),
    "unevenly": refused(unevenly),
    "sharded": refused(by_fsdp_as_well),
    "tokens": refused(by_tokens_as_well),
    "other ranks": refused(over_other_ranks),
    "gate": lambda _: cached(divided("flux"), FirstBlockCache(threshold=0.1))(STEPS),
    "clusters": lambda _: cached(divided("flux"), ClusCa(clusters=4))(STEPS),
    "calibrated": calibrated,
    "background": lambda _: in_background(divided("flux")),
    "served": served_by_all,
    "predicted": predicted,
    "entropy": by_entropy,
    "bare": bare,
    "dying": lambda rank: told_of_a_death(rank, cached(divided("flux"), POLICY)),
}
