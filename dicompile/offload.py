"""Hooks of accelerate and diffusers: what moves weights runs around an optimized module, never inside compiled code.

Hooks that bring the weights of a part stay on it, and compiled code does without them: see `dicompile.parked`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from dicompile.errors import UnsupportedModel
from dicompile.lower import Backend
from dicompile.ops.wrapped import is_wrapped
from dicompile.parallel import check_parts
from dicompile.parked import (
    GROUP,
    OF_GROUPS,
    Home,
    aligning_hooks,
    homes_of,
    hooks_of,
    kind_of,
    place_of,
    registry_of,
)
from dicompile.tensor_parallel import divided_layers

HOOK_ATTRIBUTES = frozenset({"_hf_hook", "_old_forward", "_diffusers_hook"})
"""Where accelerate keeps the hook of a module, and the forward that it wraps, and diffusers its hooks."""


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Take accelerate's hook, if there is one, from a module to the wrapper of it that is called instead.

    Hooks that bring the module's own weights stay, since those are below the wrapper.
    """
    hooks = hooks_of(source)
    staying = [hook for hook in hooks if getattr(hook, "offload", False)]
    if not hooks:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    if staying:
        source._hf_hook = _in_turn(staying)  # what it has brought and taken away stays as it is
    else:
        remove_hook_from_module(source)
    if moving := [hook for hook in hooks if hook not in staying]:
        add_hook_to_module(target, _in_turn(moving))


def take_hook_back(wrapper: nn.Module, module: nn.Module) -> None:
    """Take the hooks of a wrapper, if there are any, to the module in it, around those that this one has."""
    hooks, own = hooks_of(wrapper), hooks_of(module)
    if not hooks:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(wrapper)
    if own:
        module._hf_hook = _in_turn([*hooks, *own])
    else:
        add_hook_to_module(module, _in_turn(hooks))


def _in_turn(hooks: Sequence[Any]) -> Any:
    """One hook of accelerate that does what several do."""
    from accelerate.hooks import SequentialHook

    return hooks[0] if len(hooks) == 1 else SequentialHook(*hooks)


def move_groups(wrapper: nn.Module, module: nn.Module) -> None:
    """Offload the groups of a module that were asked for on its wrapper, to which the module is one whole.

    Raises:
        UnsupportedModel: the whole has been written to a file.
    """
    registry = registry_of(wrapper)
    hook = None if registry is None else registry.get_hook(GROUP)
    if hook is None:
        return
    from diffusers.hooks import apply_group_offloading

    options = {name: getattr(hook.config, name, None) for name in signature(apply_group_offloading).parameters}
    if options["offload_to_disk_path"] is not None:
        raise UnsupportedModel(
            f"the groups of {type(module).__name__} were written to a folder as one",
            where="apply_group_offloading",
            why="it was given the optimized model, which is around the one whose parts are groups",
            fix="offload before dicompile.optimize, or by model.enable_group_offload(...); load adapters before that",
        )
    for name in OF_GROUPS:
        registry.remove_hook(name, recurse=True)
    given = {**options, "module": module, "use_stream": hook.config.stream is not None}
    apply_group_offloading(**given)


def check_whole(module: nn.Module, where: str) -> None:
    """Check that no weights are brought part by part, for work that reads all of them again and again.

    Args:
        module: the module.
        where: what the work is.

    Raises:
        UnsupportedModel: some are.
    """
    if next(divided_layers(module), None) is not None:
        raise UnsupportedModel(
            f"layers of {type(module).__name__} are divided by tensor parallelism",
            where=where,
            why="gradients would have to be summed over its ranks, too",
            fix="train on whole weights, without parallelize_module",
        )
    if homes_of(module):
        raise UnsupportedModel(
            f"the weights of {type(module).__name__} are brought part by part",
            where=where,
            why="it reads all of them for every sample",
            fix="keep whole weights on the device: without fully_shard and offloading, after pipe.remove_all_hooks()",
        )


def check_hooks(module: nn.Module) -> None:
    """Check that the weights can be had wherever they are, and that nothing in the module remembers others.

    Raises:
        UnsupportedModel: hooks on parts do what cannot be told, or keep what parts have computed, as diffusers' caches
            do; weights are on several devices, or nowhere; or those that are brought, or cast, are quantised.
    """
    check_parts(module)
    name, homes = type(module).__name__, homes_of(module)
    for path, part in module.named_modules():
        where = path or name
        if path and "_hf_hook" in vars(part) and not aligning_hooks(part):
            raise UnsupportedModel(
                f"a part of {name} has a {type(part._hf_hook).__name__} of accelerate",
                where=where,
                why="it runs whenever the part does, and compiled code runs several parts as one",
                fix="one hook for the whole model, or pipe.enable_sequential_cpu_offload()",
            )
        _check_registry(name, where, part)
        for weight in part.parameters(recurse=False):
            if id(weight) in homes and kind_of(weight, homes[id(weight)]) is not nn.Parameter:
                raise UnsupportedModel(
                    f"weights of {name} are quantised, and are brought part by part",
                    where=f"{where}, {type(weight).__name__}",
                    why="of what a quantised weight consists cannot be told while it is elsewhere",
                    fix="offload whole models: pipe.enable_model_cpu_offload()",
                )
    _check_places(module, homes)


def _check_registry(name: str, where: str, part: nn.Module) -> None:
    """Check the hooks of diffusers on a part."""
    registry = registry_of(part)
    for hook in () if registry is None else registry.hooks.values():
        if hook._is_stateful:
            raise UnsupportedModel(
                f"{name} caches by itself",
                where=f"{type(hook).__name__} on {where}",
                why="what it keeps from one call to the next is in no plan, and of two caches each would take what "
                "the other reused for computed",
                fix="model.disable_cache() first; or leave out dicompile.optimize",
            )
    if registry is None:
        return
    if registry.get_hook("layerwise_casting") is not None and any(map(is_wrapped, part.parameters(recurse=False))):
        raise UnsupportedModel(
            f"weights of {name} are quantised and cast layer by layer",
            where=where,
            why="to cast a quantised weight is to exchange it for another one at every call",
            fix="one of them: quantise, or model.enable_layerwise_casting(...); both store fewer bits",
        )
    order = [hook in OF_GROUPS for hook in registry._hook_order]
    if order != sorted(order):
        raise UnsupportedModel(
            f"{name} has hooks around those that offload its groups",
            where=f"{', '.join(registry._hook_order)} on {where}",
            why="compiled code cannot leave out the inner ones of several hooks",
            fix="model.enable_group_offload(...) last",
        )


def _check_places(module: nn.Module, homes: Mapping[int, Home]) -> None:
    """Check that all weights are somewhere, and wanted on one device."""
    name = type(module).__name__
    kinds = {home.sharding is None for home in homes.values()}
    if True in kinds and next(divided_layers(module), None) is not None:
        raise UnsupportedModel(
            f"layers of {name} are divided by tensor parallelism, and weights offloaded",
            where=name,
            why="what a rank has of a weight would be somewhere else, which nobody has tried",
            fix="one of them: tensor parallelism leaves a rank a part of every weight",
        )
    if len(kinds) > 1:
        raise UnsupportedModel(
            f"some weights of {name} are sharded by FSDP, and others offloaded",
            where=name,
            why="ranks would wait for each other's copies, which nobody has tried",
            fix="one of them: fully_shard, or hooks that offload",
        )
    absent = next((path for path, each in module.named_parameters() if each.is_meta and id(each) not in homes), None)
    if absent is not None:
        raise UnsupportedModel(
            f"{name} has a weight that is nowhere",
            where=absent,
            why="it is on the meta device, and no hook of accelerate or diffusers brings its value",
            fix="load its weights",
        )
    devices = {str(home.device) for home in homes.values()}
    devices |= {
        str(place_of(hook.execution_device)) for part in module.modules() for hook in aligning_hooks(part)
        if hook.execution_device is not None
    }  # fmt: skip
    if len(devices) > 1:
        raise UnsupportedModel(
            f"parts of {name} run on several devices",
            where=", ".join(sorted(devices)),
            why="a step is compiled for one device",
            fix="leave the denoiser on one: without device_map, or with max_memory for one device and the CPU",
        )


def check_can_bring(module: nn.Module, backend: Backend) -> None:
    """Check that weights may be brought part by part in the steps of a model.

    Raises:
        UnsupportedModel: its steps are recorded as CUDA graphs, or it is one of several ranks.
    """
    reasons = (
        (backend.records_steps, 'compile_mode="reduce-overhead"', "a CUDA graph reads weights where they lay when it "
         "was recorded", "leave out compile_mode, or keep the weights on the device"),
        (getattr(module, "_parallel_config", None) is not None, "model.enable_parallelism", "ranks would wait for each "
         "other's copies, which nobody has tried", "keep whole weights on every rank, or leave out enable_parallelism"),
    )  # fmt: skip
    for is_so, where, why, fix in reasons:
        if is_so:
            raise UnsupportedModel(
                f"the weights of {type(module).__name__} are brought part by part", where=where, why=why, fix=fix
            )
