"""What two processes of a gloo group do with models that FSDP has sharded, each case by name.

Every rank has samples of its own. What it should get is what it gets of the same model before that is sharded.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import accelerate
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard as DTensorShard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dicompile
from dicompile import FORA, FirstBlockCache, cache_context
from dicompile.errors import UnsupportedModel
from dicompile.sharded import Gathering, Sharding, sharded_weights
from dicompile.wrapper import record_of
from tests import models
from tests.models import Sample, optimized, plain_dit, timesteps
from tests.parallel.processes import RANKS
from tests.parallel.ranks import sharded_heads
from tests.pipelines import pipes
from tests.pipelines.pipes import Sampler, flux_transformer

STEPS = 4
POLICY = FORA(interval=2)
NO_CASTS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)

Shard = Callable[..., Any]


def whole(model: nn.Module, **options: Any) -> None:
    fully_shard(model, **options)


def blocks(model: nn.Module, **options: Any) -> None:
    for name, children in model.named_children():
        for block in children if "blocks" in name else ():
            fully_shard(block, **options)


def by_block(model: nn.Module, **options: Any) -> None:
    blocks(model, **options)
    fully_shard(model, **options)


def together(model: nn.Module) -> None:
    """Blocks of which FSDP gathers the weights at once."""
    fully_shard([*model.blocks])
    fully_shard(model)


def replicated(model: nn.Module) -> None:
    """A mesh of two dimensions, with one copy."""
    by_block(model, mesh=init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("copies", "shards")))


def dit() -> Sample:
    return plain_dit(2)


def cached(sampler: Sampler, policy: Any = POLICY, **options: Any) -> Sampler:
    dicompile.optimize(sampler.pipe, policy, mode="eager", **options)
    return sampler


def ran(model: Any, rank: int, samples: int = 4) -> Tensor:
    """Results of a run with pictures of this rank's own."""
    inputs = {name: value[:samples] for name, value in plain_dit(0).inputs.items()}
    return torch.stack(models.run(model, inputs, timesteps(STEPS), seed=rank))


class Exchanges(TorchDispatchMode):
    """Bytes of what ranks have exchanged, those of all ranks together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes.append(args[0].nbytes)
        return func(*args, **kwargs or {})


def brought(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Calls of each kind, and the bytes brought for one of them."""
    report = dicompile.report(model)
    return dict(report.kinds), {kind: n // report.kinds[kind] for kind, n in report.fetched_bytes.items()}


# What gives the bits of the model that is not sharded.


def of_dit(shard: Shard, policy: Any, **options: Any) -> Callable[[int], Any]:
    def case(rank: int) -> Any:
        sample = dit()
        wanted = ran(model := optimized(sample, policy, STEPS, **options), rank)
        shard(dicompile.restore(model))
        model = optimized(sample, policy, STEPS, **options)
        return ran(model, rank), wanted, len(model.frames)

    return case


def of_flux(policy: Any) -> Callable[[int], Any]:
    def case(rank: int) -> Any:
        sampler = pipes.flux()
        wanted = cached(sampler, policy)(STEPS, seed=rank)
        by_block(dicompile.restore(sampler.pipe).transformer)
        found = cached(sampler, policy)(STEPS, seed=rank)
        weights = sum(weight.nbytes for weight in sampler.pipe.transformer.parameters())
        return found, wanted, *brought(sampler.pipe), weights

    return case


def later(rank: int) -> Any:
    """Parts of a model that is optimized already."""
    sample = dit()
    wanted = ran(model := optimized(sample, POLICY, STEPS), rank)
    blocks(record_of(model).module)
    return ran(model, rank), wanted, brought(model)[1]


def in_the_wrong_order(rank: int) -> Any:
    """The error, and that nothing has happened to the model before it."""
    sample = dit()
    wanted = ran(model := optimized(sample, POLICY, STEPS), rank)
    try:
        by_block(model)
    except UnsupportedModel as error:
        told = str(error)
    original = record_of(model).module
    is_whole = not list(sharded_weights(original))
    found = [ran(model, rank)]
    fully_shard(dicompile.restore(model))
    found.append(ran(optimized(sample, POLICY, STEPS), rank))
    return torch.stack(found), torch.stack([wanted, wanted]), told, is_whole


def given_back(**options: Any) -> Callable[[int], Any]:
    """A model is sampled without caching, with it, and without, as FSDP runs it then."""

    def case(rank: int) -> Any:
        sample = dit()
        plain, wanted = ran(sample.model, rank), ran(model := optimized(sample, POLICY, STEPS), rank)
        original = dicompile.restore(model)
        by_block(original, **options)
        found = [ran(original, rank)]
        model = optimized(sample, POLICY, STEPS)
        found.append(ran(model, rank))
        dicompile.disable(model)
        found.append(ran(model, rank))
        dicompile.enable(model)
        found.append(ran(model, rank))
        assert dicompile.restore(model) is original
        found.append(ran(original, rank))
        return torch.stack(found), torch.stack([plain, wanted, plain, wanted, plain])

    return case


def bare(shard: Shard) -> Callable[[int], Any]:
    """By the bare backend, before and after, and which steps are those without caching."""

    def ran_by(model: nn.Module, rank: int) -> Tensor:
        torch._dynamo.reset()
        options = {"policy": POLICY, "steps": STEPS, "mode": "eager"}
        return ran(torch.compile(model, backend="dicache", options=options), rank)

    def case(rank: int) -> Any:
        sample = dit()
        plain, wanted = ran(sample.model, rank), ran_by(sample.model, rank)
        shard(sample.model)
        found = ran_by(sample.model, rank)
        return found, wanted, [torch.equal(*pair) for pair in zip(found, plain, strict=True)]

    return case


def in_half_precision(rank: int) -> Any:
    """Weights are gathered in the dtype that FSDP would gather them in."""
    sample = models.flux(1)
    like = {name: value.bfloat16() for name, value in sample.inputs.items() if isinstance(value, Tensor)}

    def sampled(model: Any) -> Tensor:
        found = []
        for step, timestep in enumerate(timesteps(STEPS)):
            noise = torch.Generator().manual_seed(9 * rank + step)
            latent = torch.randn(like["hidden_states"].shape, generator=noise).bfloat16()
            when = torch.full_like(like["timestep"], timestep / 1000)
            with torch.no_grad():
                found.append(model(**{**like, "hidden_states": latent, "timestep": when}, return_dict=False)[0])
        return torch.stack(found)

    by_block(sample.model, mp_policy=NO_CASTS)
    found, fetched = sampled(model := optimized(sample, POLICY, STEPS)), brought(model)[1]
    other = models.flux(1)
    other.model.to(torch.bfloat16)
    wanted = sampled(optimized(other, POLICY, STEPS))
    return found, wanted, fetched["full"], sum(weight.nbytes for weight in other.model.parameters())


def with_casts(*, grouped: bool = False) -> Callable[[int], Any]:
    """FSDP casts what every part gets; without that, the model would not run in half precision."""

    def case(rank: int) -> Any:
        sample, half = dit(), MixedPrecisionPolicy(torch.bfloat16)
        for part in (sample.model.time, *([[*sample.model.blocks]] if grouped else sample.model.blocks)):
            fully_shard(part, mp_policy=half)
        fully_shard(sample.model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32))
        wanted = ran(sample.model, rank)
        found = ran(model := optimized(sample, "none", STEPS), rank)
        again = ran(model, rank)
        return found, wanted, torch.equal(found, again), len(model.frames)

    return case


def changed(rank: int) -> Any:
    """Weights that are edited, and loaded, between two runs, with what was computed of them before."""
    sample = dit()
    first = ran(model := optimized(sample, POLICY, STEPS, hoist="all"), rank)
    with torch.no_grad():
        sample.model.blocks[1].modulation[1].weight.mul_(2)
    second = ran(model, rank)
    by_block(dicompile.restore(model))
    model = optimized(sample, POLICY, STEPS, hoist="all")
    found = [ran(model, rank)]
    with torch.no_grad():
        sample.model.blocks[1].modulation[1].weight.div_(2)
    found.append(ran(model, rank))
    return torch.stack(found), torch.stack([second, first])


def of_other_shapes(rank: int) -> Any:
    """A rank has fewer pictures than the other one, and none of its shapes come at the same time."""
    sample = dit()
    sizes = [4, 2, 4] if rank else [2, 2, 4]
    wanted = [ran(model := optimized(sample, POLICY, STEPS, hoist="all"), rank, samples)[:, :2] for samples in sizes]
    dicompile.restore(model)
    by_block(sample.model)
    model = optimized(sample, POLICY, STEPS, hoist="all")
    return torch.stack([ran(model, rank, samples)[:, :2] for samples in sizes]), torch.stack(wanted)


def of_other_labels(change: bool) -> Callable[[int], Any]:
    """Guidance, whose halves are alike on one rank only; or labels that one rank changes in the middle."""

    def sampled(model: Any, rank: int) -> tuple[Tensor, list[list[int]]]:
        found, exchanged = [], []
        inputs = plain_dit(0).inputs
        for step, timestep in enumerate(timesteps(STEPS)):
            with Exchanges() as exchanges:
                for half in ("cond", "uncond"):
                    with cache_context(half):
                        label = 3 if half == "cond" or (rank and not change) else 9
                        label += int(change and rank and step == 2)
                        labels = torch.full((4,), label)
                        found.append(models.call(model, {**inputs, "y": labels}, timestep, 9 * rank + step))
            exchanged.append(exchanges.bytes)
        return torch.stack(found), exchanged

    def case(rank: int) -> Any:
        sample = dit()
        wanted, _ = sampled(model := optimized(sample, POLICY, STEPS, hoist="all"), rank)
        by_block(dicompile.restore(model))
        return *(sampled(optimized(sample, POLICY, STEPS, hoist="all"), rank)), wanted

    def ordered(rank: int) -> Any:
        found, exchanged, wanted = case(rank)
        return found, wanted, exchanged

    return ordered


def in_threads(rank: int) -> Any:
    """Two threads, of which another one is ahead on every rank."""
    sample = dit()
    wanted = [ran(model := optimized(sample, "none", STEPS), number) for number in range(2)]
    by_block(dicompile.restore(model))
    model = optimized(sample, "none", STEPS)
    ran(model, rank)

    def in_thread(number: int) -> Tensor:
        with dicompile.session(model):
            time.sleep(0.02 * (number != rank))
            return ran(model, number)

    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(in_thread, range(2)))), torch.stack(wanted)


def put_together(_: int) -> Any:
    """Weights of several dtypes, cut along either dimension, of which ranks have unequal parts, or none."""
    mesh, found, wanted = init_device_mesh("cpu", (RANKS,)), [], []
    like = (
        ((5, 3), 0, torch.float32), ((1, 7), 0, torch.bfloat16), ((3, 4, 2), 1, torch.float32), ((2,), 0, torch.int8),
    )  # fmt: skip
    for shape, dim, dtype in like:
        wanted.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(wanted))).mul(9).to(dtype))
        weight = distribute_tensor(wanted[-1], mesh, [DTensorShard(dim)])
        found.append((weight, Sharding("", dim, dtype, mesh.get_group(), torch.device("cpu"))))
    weights = Gathering(found).take()
    same = [torch.equal(*pair) and pair[0].is_contiguous() for pair in zip(weights, wanted, strict=True)]
    return same, [weight.dtype for weight in weights]


# What is exchanged and held.


def exchanged(_: int) -> Any:
    """Bytes that are exchanged at each step, and the most bytes of whole weights that were there at once."""
    sample = dit()
    by_block(sample.model)
    model = optimized(sample, POLICY, STEPS, hoist="all")
    found, there, most = [], weakref.WeakSet[Any](), [0]
    take = Gathering.take

    def noted(gathering: Gathering) -> list[Tensor]:
        weights = take(gathering)
        for weight in weights:
            there.add(weight)
        most[0] = max(most[0], sum(weight.nbytes for weight in there))
        return weights

    with mock.patch.object(Gathering, "take", noted):
        for step, timestep in enumerate(timesteps(STEPS)):
            with Exchanges() as exchanges:
                models.call(model, sample.inputs, timestep, step)
            found.append(exchanges.bytes)
    left = [type(weight).__name__ for weight in sample.model.parameters()]
    return found, most[0], len(there), left, sum(weight.nbytes for weight in sample.model.parameters())


# What is refused.


def refused(shard: Shard, policy: Any = POLICY, **options: Any) -> Callable[[int], Any]:
    def case(rank: int) -> Any:
        sample = dit()
        shard(sample.model)
        return ran(optimized(sample, policy, STEPS, **options), rank)

    return case


def by_different_policies(rank: int) -> Any:
    sample = dit()
    by_block(sample.model)
    return ran(optimized(sample, FORA(interval=2 + rank), STEPS), rank)


def calibrated(rank: int) -> Any:
    sample = dit()
    by_block(sample.model)
    model = optimized(sample, POLICY, STEPS)
    with dicompile.calibrate(model):
        return ran(model, rank)


def with_parts_of_tokens(_: int) -> Any:
    from diffusers import ContextParallelConfig

    sampler = pipes.flux()
    by_block(sampler.pipe.transformer)
    sampler.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    return cached(sampler)(STEPS)


def with_split_heads(_: int) -> Any:
    model = flux_transformer()
    sharded_heads(model)
    fully_shard(model.proj_out)
    return dicompile.optimize(model, POLICY, schedule=STEPS, mode="eager")


def over_other_ranks(model: nn.Module) -> None:
    """The second block is on every rank as a whole."""
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (RANKS,)))
    fully_shard(model.blocks[1], mesh=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("copies", "shards")))


def by_the_first_fsdp(model: nn.Module) -> None:
    model.blocks[0] = FullyShardedDataParallel(model.blocks[0], device_id=torch.device("cpu"))


def offloaded_beside(model: nn.Module) -> None:
    accelerate.cpu_offload(model.head, "cpu")
    by_block(model, ignored_params={*model.head.parameters()})


def dying(rank: int) -> Any:
    """Rank 1 dies in the middle of a run; what rank 0 is told."""
    sample = dit()
    by_block(sample.model)
    model = optimized(sample, POLICY, STEPS)
    try:
        for step, timestep in enumerate(timesteps(STEPS)):
            if rank == 1 and step == 2:
                os._exit(0)
            models.call(model, sample.inputs, timestep, step)
    except RuntimeError as error:
        return str(error)


CASES: dict[str, Callable[[int], Any]] = {
    "dit, whole, fora": of_dit(whole, "fora"),
    "dit, by_block, toca": of_dit(by_block, "toca"),
    "dit, by_block, duca": of_dit(by_block, "duca"),
    "dit, by_block, hoisted": of_dit(by_block, POLICY, hoist="all"),
    "dit, replicated, fora": of_dit(replicated, POLICY),
    "dit, blocks, fora": of_dit(blocks, POLICY),
    "dit, together, fora": of_dit(together, POLICY),
    **{f"flux, {policy}": of_flux(policy) for policy in ("fora", "duca")},
    "later": later,
    "wrong order": in_the_wrong_order,
    "given back": given_back(),
    "given back, resharded": given_back(reshard_after_forward=True),
    "given back, not resharded": given_back(reshard_after_forward=False),
    "bare, by_block": bare(by_block),
    "bare, whole": bare(whole),
    "half precision": in_half_precision,
    "casts": with_casts(),
    "casts, grouped": with_casts(grouped=True),
    "changed": changed,
    "other shapes": of_other_shapes,
    "alike on one rank": of_other_labels(change=False),
    "changed on one rank": of_other_labels(change=True),
    "threads": in_threads,
    "put together": put_together,
    "exchanged": exchanged,
    "gate": refused(by_block, FirstBlockCache(threshold=0.1)),
    "background": refused(by_block, backend="inductor", warmup="background", mode=None),
    "calibrated": calibrated,
    "different policies": by_different_policies,
    "parts of tokens": with_parts_of_tokens,
    "split heads": with_split_heads,
    "first": refused(by_the_first_fsdp),
    "other ranks": refused(over_other_ranks),
    "offloaded": refused(offloaded_beside),
    "recorded": refused(by_block, backend="inductor", compile_mode="reduce-overhead", mode=None),
    "dying": dying,
}
