"""Hooks by which accelerate moves weights run around an optimized module, never inside of what is compiled."""

from __future__ import annotations

from torch import nn

from dicompile.errors import UnsupportedModel

HOOK_ATTRIBUTES = frozenset({"_hf_hook", "_old_forward"})
"""Where accelerate keeps the hook of a module, and the forward that it wraps."""


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Take accelerate's hook, if there is one, from one module to another, which from then on is called instead."""
    hook = vars(source).get("_hf_hook")
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(source)
    add_hook_to_module(target, hook)


def check_weights_are_whole(module: nn.Module) -> None:
    """Check that the weights are there for a whole call.

    Raises:
        UnsupportedModel: hooks bring the weights of every part when it runs, as sequential offloading does.
    """
    hooked = next((name for name, part in module.named_modules() if name and "_hf_hook" in vars(part)), None)
    absent = next((name for name, tensor in module.named_parameters() if tensor.is_meta), None)
    if hooked is None and absent is None:
        return
    why = f"{hooked} loads its weights when it runs" if hooked else f"{absent} is on the meta device"
    raise UnsupportedModel(
        f"the weights of {type(module).__name__} are not there for a whole call",
        where="dicompile.optimize",
        why=f"{why}, and compiled code runs several parts as one",
        fix="offload whole models: pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
    )
