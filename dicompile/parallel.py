"""Several ranks: which kinds of parallelism go with caching, and that all ranks of a group take the same steps.

A step that one rank computes and another one reuses makes them wait for each other. Plans are made before sampling, so
all ranks take the same steps if they have made the same plan: that is compared once for each plan, before its first
step. What is decided while sampling, by values that a rank has for itself, is refused where ranks need each other.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence

from torch import distributed, fx, nn

from dicompile.compat import process_group
from dicompile.errors import PlansDiffer, UnsupportedModel, UnsupportedParallelism
from dicompile.ops.collectives import groups_of
from dicompile.plan import Plan, Policy


def check_parts(module: nn.Module) -> None:
    """Check that the weights of a module are whole on every rank, and its attention can be captured.

    Raises:
        UnsupportedModel: FSDP or tensor parallelism has sharded its weights, or its keys go around in a ring.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    name = type(module).__name__
    for path, part in module.named_modules():
        if isinstance(part, (FSDPModule, FullyShardedDataParallel)):
            raise UnsupportedModel(
                f"the weights of {name} are sharded by FSDP",
                where=path or name,
                why="FSDP gathers the weights of a part when it is called, and compiled code runs several parts as one",
                fix="leave the denoiser out of FSDP: data parallelism, or model.enable_parallelism(config="
                "ContextParallelConfig(ulysses_degree=...)), keeps whole weights on every rank",
            )
    for path, weight in module.named_parameters():
        if isinstance(weight, DTensor):
            raise UnsupportedModel(
                f"the weights of {name} are sharded by tensor parallelism",
                where=path,
                why=f"it is a DTensor ({weight.placements}), and the sums over ranks are no operators of the graph",
                fix="model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...)) instead",
            )
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    if config is not None and (config.ring_degree > 1 or config.ulysses_anything):
        raise UnsupportedModel(
            f"{name} splits tokens by {'ring attention' if config.ring_degree > 1 else 'ulysses_anything'}",
            where="model.enable_parallelism",
            why="it was never tried, and sizes that ranks tell each other at every call are in no graph",
            fix="ContextParallelConfig(ulysses_degree=...), with token counts and heads that it divides",
        )


def settle_hooks(module: nn.Module) -> None:
    """Tell the hooks that split tokens the arguments of a forward now, which they look up when they first run.

    Dynamo cannot follow them there, and a model that needs other ranks cannot be run to let them settle.
    """
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            signature = getattr(hook, "module_forward_metadata", None)
            if signature is not None and signature.cached_parameter_indices is None:
                names = [*inspect.signature(type(part).forward).parameters][1:]
                signature.cached_parameter_indices = {name: i for i, name in enumerate(names)}


def check_ranks(graph: fx.Graph, policy: Policy, *, in_background: bool, is_observed: bool) -> None:
    """Check that nothing decides on one rank alone what a step of a model does that needs all ranks.

    Args:
        graph: of the model.
        policy: the caching policy.
        in_background: generations run uncached until this process has compiled its code.
        is_observed: values are recorded, from which a plan will be made.

    Raises:
        UnsupportedParallelism: something does.
    """
    reasons = (
        (policy.gate is not None, f"the gate of policy {policy.name!r} decides by the tokens of its rank",
         "use a policy that is planned ahead, such as dicompile.FORA(interval=3)"),
        (policy.predictor is not None, f"the predictor of policy {policy.name!r} was trained for all tokens",
         "use a policy without one, such as dicompile.FORA(interval=3)"),
        (in_background, 'with warmup="background" a rank caches as soon as its own code is compiled',
         "leave out warmup, or call dicompile.warmup on every rank"),
        (is_observed, "every rank records its own tokens, and would plan other steps",
         "calibrate on one rank, without parallelism, and load the recording on all of them"),
    )  # fmt: skip
    for is_so, why, fix in reasons:
        if is_so and groups_of(graph):
            raise UnsupportedParallelism(
                "the ranks of a context-parallel model could take different steps", where="compiler", why=why, fix=fix
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
