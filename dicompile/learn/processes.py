"""Several processes that train together: each evaluates its share of a batch, and all take the same step.

Whoever starts them, ``torchrun`` or accelerate, makes the process group; without one there is a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dicompile.errors import InvalidSetting

Item = TypeVar("Item")


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _is_one_of_several() else 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """What this process does of a batch that all of them have drawn alike.

    Raises:
        InvalidSetting: there are more processes than items.
    """
    if not _is_one_of_several():
        return items
    if len(items) < dist.get_world_size():
        raise InvalidSetting(
            f"{dist.get_world_size()} processes cannot share a batch of {len(items)}",
            where="dicompile.learn",
            why="each evaluates trajectories of its own",
            fix=f"a batch of {dist.get_world_size()} or more, or fewer processes",
        )
    return items[dist.get_rank() :: dist.get_world_size()]


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place."""
    if _is_one_of_several():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _is_one_of_several() -> bool:
    return dist.is_available() and dist.is_initialized()
