"""Weights of which every rank has a part (FSDP2, ``torch.distributed.fsdp.fully_shard``): how they are put together.

FSDP puts hooks around the forward of a part, in which all ranks gather its weights. Compiled code runs several parts as
one, and of others nothing at all; so it runs none of these hooks, and gathers what a call of it reads, in one exchange.

An exchange needs all ranks. Each has samples of its own, so before a call of the model they tell each other which
weights they are going to gather (`tell`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from dicompile.compat import all_gather, local_part, mixed_precision, policy_of_hook

MARKS = frozenset({"_is_fsdp_managed_module", "_fsdp_use_orig_params"})
"""Attributes that FSDP gives to every module below one that it shards."""

_APART = 64
"""Bytes, a multiple of which lies between the weights of an exchange."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a weight is spread over ranks.

    Attributes:
        name: of the weight.
        dim: along which it was cut.
        dtype: that it is gathered in, and computed with.
        group: ranks that have a part of it.
        device: of the parts.
    """

    name: str
    dim: int
    dtype: torch.dtype
    group: distributed.ProcessGroup
    device: torch.device


def shardings_of(module: nn.Module) -> Iterator[tuple[Tensor, Sharding]]:
    """Weights of a module that FSDP has sharded, each with how; those that are whole just now are not among them."""
    for name, weight, owner in sharded_weights(module):
        place = shard_of(weight)
        if owner is not None and place is not None:
            yield weight, _sharding(name, weight, place, owner)


def _sharding(name: str, weight: Any, place: int, owner: nn.Module) -> Sharding:
    dtype = mixed_precision(owner).param_dtype if weight.is_floating_point() else None
    return Sharding(
        name=name,
        dim=weight.placements[place].dim,
        dtype=dtype or weight.dtype,
        group=weight.device_mesh.get_group(place),
        device=local_part(weight).device,
    )


def sharded_weights(module: nn.Module) -> Iterator[tuple[str, Any, nn.Module | None]]:
    """Name of every parameter that is a DTensor, itself, and the part with which FSDP shards it; None where it is not.

    There are none where nobody has imported what makes them.
    """
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None:
        yield from _sharded_weights(module, "", None, tensor.DTensor)


def _sharded_weights(
    part: nn.Module, prefix: str, owner: nn.Module | None, kind: type
) -> Iterator[tuple[str, Any, nn.Module | None]]:
    owner = part if is_sharded_part(part) else owner
    for name, weight in part._parameters.items():
        if isinstance(weight, kind):
            yield prefix + name, weight, owner
    for name, child in part.named_children():
        yield from _sharded_weights(child, f"{prefix}{name}.", owner, kind)


def is_sharded_part(part: nn.Module) -> bool:
    """True for a module that was given to ``fully_shard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(part, fsdp.FSDPModule)


def shard_of(weight: Any) -> int | None:
    """The dimension of the mesh along which a DTensor is cut, if it is cut along one; it may have copies."""
    from torch.distributed.tensor import Replicate, Shard

    kinds = list(map(type, weight.placements))
    is_known = kinds.count(Shard) == 1 and kinds.count(Replicate) == len(kinds) - 1
    return kinds.index(Shard) if is_known else None


# Hooks of FSDP.


@dataclass(frozen=True)
class CastInputs:
    """What is left of a hook of FSDP in front of a forward, whose weights are there.

    Attributes:
        dtype: of the floating-point inputs.
    """

    dtype: torch.dtype

    def __call__(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        """Arguments of a forward, cast."""
        del part
        return _cast((args, kwargs), self.dtype)


@dataclass(frozen=True)
class CastResults:
    """What is left of a hook of FSDP behind a forward.

    Attributes:
        dtype: of the floating-point results.
    """

    dtype: torch.dtype

    def __call__(self, part: nn.Module, args: Any, results: Any) -> Any:
        """Results of a forward, cast."""
        del part, args
        return _cast(results, self.dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values)


def is_hook_of(package: str, hook: object) -> bool:
    """True for what a package of torch, such as "torch.distributed.fsdp", runs around the forward of a part."""
    return str(getattr(hook, "__module__", "")).startswith(f"{package}.")


def casts_of(hook: Any) -> Any:
    """What a capture sees in the place of a hook of FSDP: what it casts; None if it does nothing but bring weights.

    Everything else is what it is.
    """
    if not (isinstance(hook, (types.FunctionType, types.MethodType)) and is_hook_of("torch.distributed.fsdp", hook)):
        return hook
    policy = policy_of_hook(hook)
    if "pre" not in hook.__name__:
        return None if policy.output_dtype is None else CastResults(policy.output_dtype)
    return CastInputs(policy.param_dtype) if policy.cast_forward_inputs and policy.param_dtype is not None else None


# Exchanges.


class Gathering:
    """Weights that all ranks put together, each for itself; every rank has to ask for the same ones.

    The exchange runs beside what is queued after it. In memory are what comes from all ranks, until it is taken, and
    the weights then.

    Args:
        weights: with the sharding of each, all over the same ranks; at least one.
    """

    def __init__(self, weights: Sequence[tuple[Any, Sharding]]) -> None:
        self._weights, first = weights, weights[0][1]
        self._ranks = distributed.get_world_size(first.group)
        sizes = [math.prod(self._part(*pair)) * pair[1].dtype.itemsize for pair in weights]
        *starts, total = itertools.accumulate(map(_rounded, sizes), initial=0)
        self._places = list(zip(sizes, starts, strict=True))
        mine = torch.empty(total, dtype=torch.uint8, device=first.device)
        for (weight, how), (size, start) in zip(weights, self._places, strict=True):
            part = local_part(weight)
            room = mine[start : start + size].view(how.dtype).view(self._part(weight, how))
            room.narrow(how.dim, 0, part.shape[how.dim]).copy_(part)
        self._mine = mine  # nobody may use its memory before the exchange is done
        self._all, self._work = all_gather(mine, first.group, in_background=True)

    def start(self) -> None:
        """It has begun."""

    def take(self) -> list[Tensor]:
        """The weights; the computation that is queued from now on waits for them."""
        if self._work is not None:
            self._work.wait()
        return [self._whole(*pair, *place) for pair, place in zip(self._weights, self._places, strict=True)]

    def _part(self, weight: Any, how: Sharding) -> list[int]:
        """Shape of the part of the first rank; those of the last ones may be smaller, or empty."""
        shape = list(weight.shape)
        shape[how.dim] = -(-shape[how.dim] // self._ranks)
        return shape

    def _whole(self, weight: Any, how: Sharding, size: int, start: int) -> Tensor:
        part = self._part(weight, how)
        parts = self._all[:, start : start + size].view(how.dtype).view(self._ranks, *part).movedim(0, how.dim)
        part[how.dim] *= self._ranks
        return parts.reshape(part).narrow(how.dim, 0, weight.shape[how.dim]).contiguous()


def _rounded(size: int) -> int:
    return -(-size // _APART) * _APART


def tell(texts: Sequence[str], group: distributed.ProcessGroup, device: torch.device) -> list[list[int]]:
    """What all ranks of a group say, as numbers that are equal for equal texts; every rank has to say as many.

    Args:
        texts: of this rank.
        group: the ranks.
        device: on which they can exchange tensors.

    Returns:
        Of every rank as many numbers as texts.
    """
    numbers = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True) for text in texts]
    mine = torch.tensor(numbers, device=place_to_tell(group, device))
    found: list[list[int]] = all_gather(mine, group)[0].tolist()
    return found


def place_to_tell(group: distributed.ProcessGroup, device: torch.device) -> torch.device:
    """Where a group exchanges what the host wants to know: in its own memory, if it can do that."""
    return torch.device("cpu") if "cpu" in distributed.get_backend_config(group) else device
