"""Linear layers of which every rank computes a part (tensor parallelism, torch's ``parallelize_module``).

torch keeps the weights of such a layer as DTensors, and has hooks around its forward that make DTensors of what enters
it, and of what leaves it what one rank has of that. A graph has neither. A layer that is cut column-wise is a smaller
one, whose results are some of the features, of some heads. Behind one that is cut row-wise, the products of all ranks
are summed. So captures and calls take what a rank has of a weight for the weight, at no cost, and in the place of
torch's hooks captures see what is left of them (`of_one_rank`).
"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from dicompile.compat import hook_of_layer, local_part
from dicompile.ops.collectives import sum_over_ranks
from dicompile.sharded import is_hook_of, sharded_weights

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Where a module keeps what runs in front of its forward and behind it."""


class Cut(enum.Enum):
    """How the weight of a linear layer is cut, [d, c]: of its results a rank has some features, or a summand of all."""

    COLUMN_WISE = "column-wise"
    ROW_WISE = "row-wise"


@dataclass(frozen=True)
class SumOverRanks:
    """What is left of the hook of torch behind a layer that is cut row-wise.

    Attributes:
        group: name of the process group.
    """

    group: str

    def __call__(self, part: Any, args: Any, results: Any) -> Tensor:
        """Results of the whole layer, whose bias is added once, behind the sum; what came without it is of no use."""
        del results
        summed = sum_over_ranks(linear(args[0], part.weight), self.group)
        return summed if part.bias is None else summed + part.bias.to(summed.dtype)


def is_divided(weight: object) -> bool:
    """True for a DTensor, which is a weight of such a layer, or one that FSDP has sharded."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(weight, tensor.DTensor)


def of_one_rank(value: Any) -> Any:
    """What a capture sees in the place of a weight or a hook of such a layer; None for a hook that leaves nothing.

    Everything else is what it is.
    """
    if isinstance(value, Tensor):
        return local_part(value) if is_divided(value) else value
    found = _known(value)
    if found is None:
        return value
    cut, is_behind, mesh = found
    return SumOverRanks(mesh.get_group().group_name) if cut is Cut.ROW_WISE and is_behind else None


def _known(hook: Any) -> tuple[Cut, bool, Any] | None:
    """How the layer is cut around whose forward a hook is, whether it is behind it, and the mesh; None for others."""
    found = hook_of_layer(hook)
    if found is None:
        return None
    function, mesh = found
    does = getattr(function, "func", None), getattr(function, "args", None)
    cut = next((place for known, place in _hooks() if known == does), None)
    return None if cut is None or mesh.ndim != 1 else (*cut, mesh)


@functools.cache
def _hooks() -> tuple[tuple[tuple[Any, Any], tuple[Cut, bool]], ...]:
    """What the hooks of torch do with the layouts that it chooses by itself, for which all ranks have plain tensors."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    whole, features = (Replicate(),), (Shard(-1),)
    return (
        ((ColwiseParallel._prepare_input_fn, (whole, whole)), (Cut.COLUMN_WISE, False)),
        ((ColwiseParallel._prepare_output_fn, (features, True)), (Cut.COLUMN_WISE, True)),
        ((RowwiseParallel._prepare_input_fn, (features, features)), (Cut.ROW_WISE, False)),
        ((RowwiseParallel._prepare_output_fn, (whole, True)), (Cut.ROW_WISE, True)),
    )


@dataclass(frozen=True)
class Layer:
    """A layer that tensor parallelism has a hand in.

    Attributes:
        path: of the module.
        ranks: among which it is divided.
        why_not: why that cannot be followed; empty if it can.
    """

    path: str
    ranks: tuple[int, ...]
    why_not: str


def divided_layers(module: nn.Module) -> Iterator[Layer]:
    """Layers of a module with hooks or weights of tensor parallelism, those of FSDP left out."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    of_fsdp = {id(weight) for _, weight, owner in sharded_weights(module) if owner is not None}
    for path, part in module.named_modules():
        meshes = [w.device_mesh for w in part._parameters.values() if is_divided(w) and id(w) not in of_fsdp]
        hooks = (hook for name in HOOKS for hook in vars(part)[name].values())
        if meshes or any(is_hook_of("torch.distributed.tensor", hook) for hook in hooks):
            ranks = tuple(meshes[0].mesh.flatten().tolist()) if meshes else ()
            yield Layer(path, ranks, _why_not(part))


def _why_not(part: nn.Module) -> str:
    """Why a layer cannot be followed; empty if it can."""
    if type(part).forward is not nn.Linear.forward or "forward" in vars(part):
        return f"it is a {type(part).__name__}, and no linear layer"
    around = [[*map(_known, vars(part)[name].values())] for name in HOOKS]
    found = [hooks[0] for hooks in around if len(hooks) == 1 and hooks[0] is not None]
    if len(found) != len(HOOKS) or found[0][0] is not found[1][0]:
        return "what enters or leaves it is laid out in another way than ColwiseParallel() and RowwiseParallel() do"
    return _why_not_cut(part, found[0][0])


def _why_not_cut(part: Any, cut: Cut) -> str:
    from torch.distributed.tensor import Replicate, Shard

    of_weight, of_bias = (Shard(0), Shard(0)) if cut is Cut.COLUMN_WISE else (Shard(1), Replicate())
    for weight, placement in ((part.weight, of_weight), (part.bias, of_bias)):
        if weight is None:
            continue
        if not is_divided(weight) or tuple(weight.placements) != (placement,):
            return f"of its weights, {weight.placements if is_divided(weight) else 'plain ones'} are not {cut.value}"
        own, ranks = local_part(weight), weight.device_mesh.size()
        if type(own) is not Tensor or own.device.type != weight.device_mesh.device_type:
            return f"what a rank has of its weights is a {type(own).__name__} on the {own.device.type}"
        if isinstance(placement, Shard) and own.shape[placement.dim] * ranks != weight.shape[placement.dim]:
            return f"{weight.shape[placement.dim]} rows or columns are not divided evenly among {ranks} ranks"
    return ""
