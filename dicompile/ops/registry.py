"""Operators that dicompile does not know by itself: what their users say of them.

An operator of another library is opaque. Until somebody says what it does, a branch with one is of kind "unknown", is
reused whole or not at all, and is named wherever the model is described.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.flop_counter import shape_wrapper

from dicompile.errors import InvalidSetting
from dicompile.ops.wrapped import WRAPPED_LINEAR

Flops = Callable[..., int]
"""Operations of a call, from the shapes of its tensors, its other arguments, and the result's ``out_shape``."""

_OWN = ("aten", "prims", "prim", "dicompile")


@dataclass(frozen=True, slots=True)
class Registered:
    """What a user said of an operator.

    Attributes:
        tokens: "attention", or see `register_operator`.
        layout: of an attention's query, key, value and result.
        flops: operations of a call, from its tensors and ``out_val``; None to count none.
    """

    tokens: str
    layout: str = "bhnd"
    flops: Flops | None = None


REGISTERED: dict[object, Registered] = {}
"""By overload."""


def _flops_of_linear(source: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(out_shape) * source[-1]


LIBRARIES: Mapping[str, Registered] = {
    "bitsandbytes::gemm_4bit": Registered("rows", flops=shape_wrapper(_flops_of_linear)),
    "_c10d_functional::all_to_all_single": Registered("mixes"),
    "_c10d_functional::all_gather_into_tensor": Registered("mixes"),
    "_c10d_functional::all_reduce": Registered("elementwise"),
    "_c10d_functional::wait_tensor": Registered("elementwise"),
}
"""What is known of operators of other libraries without anybody saying it: linear maps with quantised weights, and the
collectives: of context parallelism, which bring together tokens or heads of other ranks, and of tensor parallelism,
which sum up what all ranks have of the same tokens."""


def said_of(target: object) -> Registered | None:
    """What a user said of an operator, and else what is known of other libraries; None for all others."""
    return REGISTERED.get(target, _known_of(target) if isinstance(target, OpOverload) else None)


@functools.cache
def _known_of(target: OpOverload) -> Registered | None:
    return LIBRARIES.get(target.name())


def register_attention(operator: Any, *, layout: Literal["bhnd", "bnhd"] = "bhnd") -> None:
    """Say that an operator is attention: its first three arguments are query, key and value.

    It is then cached, counted and refreshed token by token like ``scaled_dot_product_attention``. Token scores take its
    logits to be scaled by ``1 / sqrt(d)``.

    Args:
        operator: ``torch.ops.library.name``, or what ``torch.library.custom_op`` returned. Its queries must not see
            each other, and it must not be causal.
        layout: of its tensors: "bhnd" as torch has it, or "bnhd" with heads after tokens, as FlashAttention has it.

    Raises:
        InvalidSetting: it is no operator, or torch's own.

    Example::

        dicompile.register_attention(torch.ops.sageattention.sageattn, layout="bnhd")
    """
    if layout not in ("bhnd", "bnhd"):
        raise InvalidSetting(f"layout {layout!r} does not exist", where="register_attention", fix="'bhnd' or 'bnhd'")
    REGISTERED.update(dict.fromkeys(_overloads(operator), Registered("attention", layout)))


def register_operator(
    operator: Any, *, tokens: Literal["elementwise", "rows", "mixes"], flops: Flops | None = None
) -> None:
    """Say what an operator does to tokens, and what it costs.

    Args:
        operator: ``torch.ops.library.name``, or what ``torch.library.custom_op`` returned.
        tokens: "elementwise": every element by itself, operands broadcast as in an addition. "rows": every row of the
            last axis by itself, as in a normalisation or a quantised linear map; other operands belong to no token.
            "mixes": a token's result may depend on other tokens.
        flops: operations of a call, in the form of torch's ``register_flop_formula``: shapes in the place of tensors,
            and ``out_shape`` by name.

    Raises:
        InvalidSetting: it is no operator, or torch's own, or `tokens` is something else.

    Example::

        dicompile.register_operator(torch.ops.library.fused_norm, tokens="rows")
    """
    if tokens not in ("elementwise", "rows", "mixes"):
        raise InvalidSetting(
            f"tokens={tokens!r} does not exist", where="register_operator", fix="'elementwise', 'rows' or 'mixes'"
        )
    REGISTERED.update(dict.fromkeys(_overloads(operator), Registered(tokens, flops=flops and shape_wrapper(flops))))


def registered() -> tuple[tuple[object, Registered], ...]:
    """All that was said so far: what was made under another state of it need not hold."""
    return tuple(REGISTERED.items())


def is_unknown(node: fx.Node) -> bool:
    """True for an operator of another library of which nobody said what it does."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace not in _OWN and said_of(target) is None


def is_of_torch_or_ours(target: object) -> bool:
    """True for operators of torch's own, ours, and arithmetic: the versions of both decide what they mean.

    Those that exchange values with other ranks look for these by the name of the group when they run.
    """
    if target is WRAPPED_LINEAR:  # the library of the weight decides
        return False
    is_arithmetic = target in (operator.getitem, operator.add, operator.mul)
    of_torch = "aten", "_c10d_functional"
    return is_arithmetic or (isinstance(target, OpOverload) and target.namespace in (*of_torch, "dicompile"))


def _overloads(operator: Any) -> Sequence[OpOverload]:
    operator = getattr(operator, "_opoverload", operator)
    if isinstance(operator, OpOverloadPacket):
        found = [getattr(operator, name) for name in operator.overloads()]
    else:
        found = [operator] if isinstance(operator, OpOverload) else []
    if not found or found[0].namespace in _OWN:
        raise InvalidSetting(
            f"{operator} is no operator of another library",
            where="dicompile.register_...",
            fix="give torch.ops.library.name, or what torch.library.custom_op returned",
        )
    return found


class HeadsFirst:
    """An attention that wants heads after tokens, called with heads first.

    Args:
        operator: takes and returns [b, n, h, d].
    """

    def __init__(self, operator: OpOverload) -> None:
        self.operator = operator
        self.__name__ = operator.name().replace("::", ".")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it gives for query, key and value of [b, h, n, d]."""
        turned = (a.transpose(1, 2) if isinstance(a, torch.Tensor) and i < 3 else a for i, a in enumerate(args))
        return self.operator(*turned, **kwargs).transpose(1, 2)

    def __hash__(self) -> int:
        return hash((type(self), self.operator))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadsFirst) and self.operator is other.operator
