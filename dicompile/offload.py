"""Hooks of accelerate and diffusers: what moves weights runs around an optimized module, never inside compiled code."""

from __future__ import annotations

from torch import nn

from dicompile.errors import UnsupportedModel
from dicompile.ops.wrapped import is_wrapped
from dicompile.parallel import check_parts

HOOK_ATTRIBUTES = frozenset({"_hf_hook", "_old_forward", "_diffusers_hook"})
"""Where accelerate keeps the hook of a module, and the forward that it wraps, and diffusers its hooks."""


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Take accelerate's hook, if there is one, from one module to another, which from then on is called instead."""
    hook = vars(source).get("_hf_hook")
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(source)
    add_hook_to_module(target, hook)


def check_hooks(module: nn.Module) -> None:
    """Check that the weights are there for a whole call, and that nothing in the module remembers others.

    Raises:
        UnsupportedModel: hooks bring the weights of every part when it runs, as sequential offloading and diffusers'
            group offloading do; they keep what parts have computed, as diffusers' caches do; or they cast weights that
            are quantised.
    """
    check_parts(module)
    _check_weights_are_whole(module)
    for name, part in module.named_modules():
        hooks = vars(part).get("_diffusers_hook")
        if hooks is None or hooks._module_ref is not part:
            continue
        where = name or type(module).__name__
        for hook in hooks.hooks.values():
            if hook._is_stateful:
                raise UnsupportedModel(
                    f"{type(module).__name__} caches by itself",
                    where=f"{type(hook).__name__} on {where}",
                    why="what it keeps from one call to the next is in no plan, and of two caches each would take what "
                    "the other reused for computed",
                    fix="model.disable_cache() first; or leave out dicompile.optimize",
                )
        if hooks.get_hook("layerwise_casting") is not None and any(map(is_wrapped, part.parameters(recurse=False))):
            raise UnsupportedModel(
                f"weights of {type(module).__name__} are quantised and cast layer by layer",
                where=where,
                why="to cast a quantised weight is to exchange it for another one at every call",
                fix="one of them: quantise, or model.enable_layerwise_casting(...); both store fewer bits",
            )


def _check_weights_are_whole(module: nn.Module) -> None:
    root, *parts = module.named_modules()
    for name, part in (*parts, root):
        if name and "_hf_hook" in vars(part):
            raise _not_whole(module, f"{name} loads its weights when it runs", "enable_sequential_cpu_offload()")
        if _is_in_a_group(part):
            where = name or type(module).__name__
            raise _not_whole(module, f"group offloading loads the weights of {where} when it runs", "group offloading")
    absent = next((name for name, tensor in module.named_parameters() if tensor.is_meta), None)
    if absent is not None:
        raise _not_whole(module, f"{absent} is on the meta device", "enable_sequential_cpu_offload()")


def _is_in_a_group(part: nn.Module) -> bool:
    """True for a module under diffusers' group offloading; what was put on a wrapper of it runs around that."""
    hooks = vars(part).get("_diffusers_hook")
    return hooks is not None and hooks._module_ref is part and hooks.get_hook("group_offloading") is not None


def _not_whole(module: nn.Module, why: str, instead_of: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of {type(module).__name__} are not there for a whole call",
        where="dicompile.optimize",
        why=f"{why}, and compiled code runs several parts as one",
        fix=f"offload whole models: pipe.enable_model_cpu_offload() instead of {instead_of}",
    )
