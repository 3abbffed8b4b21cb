"""Gradients, transforms of functions and modes: compiled code has none, and whoever asks for them is told so.

A model that samples records no gradients. Who differentiates through it all the same would get a gradient in which the
model is left out: wrong numbers and no error, since the latent reaches most losses in other ways, too. So a result of a
call in which gradients could be meant has a place in autograd's graph, and raises when somebody comes there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dicompile.compat import dispatch_modes, transform_around
from dicompile.errors import UnsupportedCall
from dicompile.opened import opened_result


def check_no_transform(name: str) -> None:
    """Check that nobody traces or transforms a call.

    Args:
        name: of the model.

    Raises:
        UnsupportedCall: somebody does.
    """
    transform = transform_around()
    if transform is None:
        return
    raise UnsupportedCall(
        f"{name} is optimized, and was called within {transform}",
        where="a call of the model",
        why="compiled code reads and stores what it remembers, which no transform sees",
        fix="dicompile.disable(model) around it, or dicompile.restore(model)",
    )


def check_no_mode(name: str) -> None:
    """Check that nobody would see the operators of a call, and do something else in their place.

    Those of torch count or log: what they tell is of what runs.

    Args:
        name: of the model, which is compiled.

    Raises:
        UnsupportedCall: a `TorchDispatchMode` that is not of torch is active.
    """
    mode = next((mode for mode in dispatch_modes() if not type(mode).__module__.startswith("torch.")), None)
    if mode is None:
        return
    raise UnsupportedCall(
        f"{name} is compiled, and was called within {type(mode).__name__}",
        where="a call of the model",
        why="compiled code is no sequence of operators which a dispatch mode could see, or replace",
        fix='dicompile.optimize(..., backend="eager"), or dicompile.disable(model) around it',
    )


def without_gradients(name: str, result: Any, given: Iterable[Tensor]) -> Any:
    """A result through which no gradient goes, without anybody being told a wrong one.

    Args:
        name: of the model.
        result: tensors, and whatever else it returns.
        given: tensors that it may depend on.

    Returns:
        The same. If gradients are on, and a tensor wants one, so do floating-point tensors of the result, and whoever
        asks for it gets an `UnsupportedCall`.
    """
    if not torch.is_grad_enabled():
        return result
    wanted = next((tensor for tensor in given if tensor.requires_grad), None)
    if wanted is None:
        return result

    def refusing(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        own: list[Tensor] = [leaf.clone() if leaf._is_view() else leaf]  # no view may be written to behind a function
        made: Tensor = _Refusal.apply(name, own, wanted)  # type: ignore[no-untyped-call]
        return made

    return pytree.tree_map_only(Tensor, refusing, opened_result(result))


class _Refusal(torch.autograd.Function):
    """Raises where a gradient would go on."""

    @staticmethod
    def forward(ctx: Any, name: str, result: list[Tensor], _: Tensor) -> Tensor:
        ctx.name = name
        return result[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UnsupportedCall(
            f"{ctx.name} is optimized, and was asked for gradients",
            where="backward",
            why="caching is for sampling: a step that reuses has no gradient, and compiled code records none",
            fix="differentiate through the model as it is (dicompile.disable(model), then dicompile.enable(model)), or "
            "call it under torch.no_grad()",
        )
