"""Global state that a forward may depend on: part of the key under which its graph is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.backends import cuda
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _device
from torch.utils.module_tracker import ModuleTracker

from dicompile.errors import CannotCapture
from dicompile.opened import flatten_comparable

_accelerator = torch.accelerator.current_accelerator()
DEVICES = ("cpu", "cuda" if _accelerator is None else _accelerator.type)
"""Kinds of device whose autocast is looked at."""

HOOKS_OF_ALL = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Where torch keeps the hooks that all modules have (`torch.nn.modules.module`)."""


def ambient() -> tuple[object, ...]:
    """Autocast, inference mode, determinism, defaults, precision, kernels of attention, modes.

    Gradients are off in whatever we run.
    """
    return (
        *(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in DEVICES),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(),  # of a CPU, too
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        *torch._C._get_sdp_priority_order(),
        _device.CURRENT_DEVICE,
        modes := torch._C._len_torch_function_stack(),
        *(function_modes() if modes else ()),
        *hooks_of_all(),
    )


def function_modes() -> Iterator[object]:
    """What sees every call of an operator (`TorchFunctionMode`), by what it holds; devices are told apart already."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, _device.DeviceContext):
            continue
        try:
            held = flatten_comparable(vars(mode))
        except CannotCapture:  # it holds what cannot be told: another one is something else
            yield mode
        else:
            yield type(mode), *held


def hooks_of_all() -> tuple[Any, ...]:
    """Hooks that somebody gave to all modules, but for those of torch that only note which module runs."""
    found = [hook for name in HOOKS_OF_ALL for hook in getattr(_module, name).values()]
    return tuple(hook for hook in found if not _is_tracker(hook))


def entry_of(module: nn.Module) -> str:
    """Name of the method that a capture calls, so that its hooks run inside of what is captured.

    Those of all modules run around an optimized module already, since that is one, too.

    Raises:
        CannotCapture: it has hooks of both kinds, or a ``__call__`` of its own; the outer hooks would come first.
    """
    has_own_call = type(module).__call__ is not nn.Module.__call__
    if not hooks_of_all():
        return "__call__" if has_own_call else "_call_impl"
    if has_own_call or module._forward_hooks or module._forward_pre_hooks:
        has = "a __call__ of its own" if has_own_call else "hooks"
        raise CannotCapture(
            f"{type(module).__name__} has {has}, and all modules have some hooks",
            where="capture",
            why="an optimized module runs those of all modules around its own, and not between them",
            fix="remove the hooks of all modules (torch.nn.modules.module), or those of this one, while it is called",
        )
    return "forward"


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """While open, modules run without the hooks of ``FlopCounterMode`` and the like, which change nothing."""
    kept = {name: dict(getattr(_module, name)) for name in HOOKS_OF_ALL}
    try:
        for name, hooks in kept.items():
            for key in [key for key, hook in hooks.items() if _is_tracker(hook)]:
                del getattr(_module, name)[key]
        yield
    finally:
        for name, hooks in kept.items():
            getattr(_module, name).clear()
            getattr(_module, name).update(hooks)


def _is_tracker(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)
