"""Several ranks: which kinds of parallelism go with caching, and that all ranks of a group take the same steps.

A step that one rank computes and another one reuses makes them wait for each other. Plans are made before sampling, so
all ranks take the same steps if they have made the same plan: that is compared once for each plan, before its first
step. What is decided while sampling, by values that a rank has for itself, is refused where ranks need each other.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Sequence

from torch import Tensor, distributed, fx, nn

from dicompile.compat import local_part, process_group
from dicompile.errors import PlansDiffer, UnsupportedModel, UnsupportedParallelism
from dicompile.ops.collectives import find_sum, groups_of
from dicompile.plan import Plan, Policy, Propagate
from dicompile.sharded import shard_of, sharded_weights
from dicompile.tensor_parallel import divided_layers

CONTEXT_PARALLEL, SHARDED, TENSOR_PARALLEL = "context-parallel", "sharded", "tensor-parallel"
"""Kinds of model whose ranks need each other in every call."""


def check_parts(module: nn.Module) -> None:
    """Check that the weights of a module are whole on every rank, or can be gathered, and its attention be captured.

    Raises:
        UnsupportedModel: FSDP or tensor parallelism has divided it in a way that is not followed, or both have; or its
            keys go around in a ring.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    _check_first_fsdp(module)
    name = type(module).__name__
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    _check_layers(module, splits_tokens=config is not None)
    _check_shards(module)
    if config is not None and (config.ring_degree > 1 or config.ulysses_anything):
        raise UnsupportedModel(
            f"{name} splits tokens by {'ring attention' if config.ring_degree > 1 else 'ulysses_anything'}",
            where="model.enable_parallelism",
            why="it was never tried, and sizes that ranks tell each other at every call are in no graph",
            fix="ContextParallelConfig(ulysses_degree=...), with token counts and heads that it divides",
        )


def _check_first_fsdp(module: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for path, part in module.named_modules():
        if isinstance(part, fsdp.FullyShardedDataParallel):
            raise UnsupportedModel(
                f"the weights of {type(module).__name__} are sharded by the first FSDP",
                where=path or type(module).__name__,
                why="it makes one flat parameter of all weights of a part",
                fix="torch.distributed.fsdp.fully_shard(model) instead",
            )


def _check_shards(module: nn.Module) -> None:
    """Check that every weight of which a rank has a part can be put together."""
    name, groups = type(module).__name__, set()
    for path, weight, owner in sharded_weights(module):
        place = shard_of(weight)
        if owner is None:
            continue
        if place is None:
            raise UnsupportedModel(
                f"the weights of {name} are sharded by FSDP and divided by tensor parallelism",
                where=path,
                why=f"it is a DTensor that is cut twice ({weight.placements}), which nobody has tried",
                fix="one of them: fully_shard, or parallelize_module",
            )
        part, kind = local_part(weight), weight.device_mesh.device_type
        if type(part) is not Tensor or part.device.type != kind:
            what = "quantised" if type(part) is not Tensor else f"offloaded to the {part.device.type}"
            raise UnsupportedModel(
                f"weights of {name} are sharded by FSDP, and {what}",
                where=path,
                why="how such a weight is put together is known to FSDP alone",
                fix="shard plain weights, without offload_policy; or leave out dicompile.optimize",
            )
        groups.add(tuple(distributed.get_process_group_ranks(weight.device_mesh.get_group(place))))
    if len(groups) > 1:
        raise UnsupportedModel(
            f"parts of {name} are sharded over different ranks",
            where=" and ".join(f"ranks {', '.join(map(str, ranks))}" for ranks in sorted(groups)),
            why="before a call, all ranks that gather weights together agree which ones",
            fix="give fully_shard the same mesh for all parts",
        )


def _check_layers(module: nn.Module, *, splits_tokens: bool) -> None:
    """Check that layers which tensor parallelism has divided are those of `dicompile.tensor_parallel`."""
    layers = list(divided_layers(module))
    of_fsdp = any(owner is not None for _, _, owner in sharded_weights(module))
    ranks = sorted({layer.ranks for layer in layers})
    name, fix = type(module).__name__, "model.enable_parallelism(config=TensorParallelConfig(...)), or its plan, alone"
    for layer in layers:
        if layer.why_not:
            raise UnsupportedModel(
                f"a layer of {name} is divided by tensor parallelism in a way that is not followed",
                where=layer.path or name,
                why=layer.why_not,
                fix="ColwiseParallel() and RowwiseParallel() of linear layers, as in model._tp_plan",
            )
    if layers and (of_fsdp or splits_tokens):
        raise UnsupportedModel(
            f"layers of {name} are divided by tensor parallelism, and its "
            f"{'weights sharded by FSDP' if of_fsdp else 'tokens split over ranks'}",
            where=layers[0].path,
            why="nobody has tried that",
            fix=fix,
        )
    if len(ranks) > 1:
        raise UnsupportedModel(
            f"layers of {name} are divided among different ranks",
            where=" and ".join(f"ranks {', '.join(map(str, some))}" for some in ranks),
            why="of sums over different ranks, nobody can tell which have equal values",
            fix=fix,
        )


def settle_hooks(module: nn.Module) -> None:
    """Tell hooks of diffusers the arguments of a forward now, which they look up when they first run.

    Those that split tokens do, and those that skip blocks. Dynamo cannot follow them there, and a model that needs
    other ranks cannot be run to let them settle.
    """
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            for holder in vars(hook).values():
                for name in ("cached_parameter_indices", "_cached_parameter_indices"):
                    if getattr(holder, name, 0) is None:
                        names = [*inspect.signature(type(part).forward).parameters][1:]
                        setattr(holder, name, {argument: i for i, argument in enumerate(names)})


_ROUNDED = "values whose last bits may be others on other ranks"


def kind_of_ranks(graph: fx.Graph) -> str | None:
    """Why the ranks of a model need each other, as far as its graph tells; None if they do not."""
    if not groups_of(graph):
        return None
    return CONTEXT_PARALLEL if find_sum(graph.nodes) is None else TENSOR_PARALLEL


def check_ranks(kind: str, policy: Policy, *, in_background: bool, is_observed: bool, records_steps: bool) -> None:
    """Check that nothing decides on one rank alone what a step of a model does that needs all ranks.

    Args:
        kind: of the model, "context-parallel", whose ranks have parts of the tokens, "sharded", of which each has
            samples of its own, or "tensor-parallel", all of which compute the same, each with some of the features.
        policy: the caching policy.
        in_background: generations run uncached until this process has compiled its code.
        is_observed: values are recorded, from which a plan will be made.
        records_steps: whole steps are recorded as CUDA graphs.

    Raises:
        UnsupportedParallelism: something does.
    """
    own, why_not = {
        CONTEXT_PARALLEL: ("the tokens of its rank", "was trained for all tokens"),
        SHARDED: ("the samples of its rank", "reads weights before the step"),
        TENSOR_PARALLEL: (_ROUNDED, f"chooses by {_ROUNDED}"),
    }[kind]
    clusters = kind == TENSOR_PARALLEL and any(isinstance(rule.do, Propagate) for rule in policy.rules)
    reasons = (
        (policy.gate is not None, f"the gate of policy {policy.name!r} decides by {own}",
         "use a policy that is planned ahead, such as dicompile.FORA(interval=3)"),
        (policy.predictor is not None, f"the predictor of policy {policy.name!r} {why_not}",
         "use a policy without one, such as dicompile.FORA(interval=3)"),
        (clusters, f"policy {policy.name!r} clusters tokens by {own}",
         "choose tokens by scores, of which ranks take the mean, as dicompile.ToCa does"),
        (in_background, 'with warmup="background" a rank caches as soon as its own code is compiled',
         "leave out warmup, and call dicompile.prepare(model) on every rank"),
        (is_observed, f"a recording holds {own}, and every rank would plan other steps",
         "calibrate on one rank, without parallelism, and load the recording on all of them"),
        (records_steps, "a rank that records a CUDA graph of a step runs it several times, and one that has it, once",
         'leave out compile_mode="reduce-overhead"'),
    )  # fmt: skip
    for is_so, why, fix in reasons:
        if is_so:
            raise UnsupportedParallelism(
                f"the ranks of a {kind} model could take different steps", where="compiler", why=why, fix=fix
            )


def check_same_plan(graph: fx.Graph, plan: Plan) -> None:
    """Check that all ranks which run a graph together have made the same plan; every one of them has to call it.

    Args:
        graph: of the model; without collectives there is nothing to check.
        plan: for one schedule.

    Raises:
        PlansDiffer: they have not; raised on all of them.
    """
    for name in groups_of(graph):
        group = process_group(name)
        plans: list[str] = [""] * distributed.get_world_size(group)
        distributed.all_gather_object(plans, hashlib.sha256(str(plan).encode()).hexdigest(), group)
        check_equal(plans, f"rank {distributed.get_rank()}: policy {plan.policy}, {plan.schedule.steps} steps")


def check_equal(plans: Sequence[str], here: str) -> None:
    """Check that the ranks of a group have one plan.

    Args:
        plans: what tells the plan of each rank from others.
        here: this rank, and what it has planned.

    Raises:
        PlansDiffer: they have not.
    """
    if len(set(plans)) > 1:
        raise PlansDiffer(
            f"{len(set(plans))} different plans on {len(plans)} ranks that run one model together",
            where=here,
            why="a rank that computes would wait for one that reuses",
            fix="give all ranks the same policy, schedule, number of steps and memory budget",
        )
