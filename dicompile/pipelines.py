"""Pipelines: which of their components are denoisers, and how those are replaced: all of them, or none.

A pipeline may hold another one that uses the same denoiser; it is replaced wherever it is held.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dicompile.errors import AlreadyOptimized, UnsupportedModel
from dicompile.names import sounds_like_denoiser
from dicompile.wrapper import CachedModel, find_optimized, record_of, released, without_compile


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """Modules of a pipeline, by name.

    Raises:
        UnsupportedModel: it is no pipeline.
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict) or getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} is neither a torch.nn.Module nor a pipeline with a scheduler",
            where="dicompile",
            fix="give the denoiser and its scheduler: optimize(model, policy, schedule=scheduler)",
        )
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Components of a pipeline that denoise: they take a timestep, and neither steer a denoiser nor encode for it.

    Raises:
        UnsupportedModel: it is no pipeline, or has none.
    """
    modules = components_of(pipeline)
    found = {name: module for name, module in modules.items() if _is_denoiser(name, module)}
    if not found:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no denoiser",
            where=f"components {', '.join(modules) or 'without any module'}",
            why="none takes an argument that is called after a timestep, other than ControlNets and encoders",
            fix='optimize(pipe, policy, components=["its name"]), or give the denoiser itself and schedule=scheduler',
        )
    return found


def is_denoiser_of(pipeline: Any, module: nn.Module) -> bool:
    """True for what `denoisers` finds in a pipeline."""
    if isinstance(pipeline, nn.Module):
        return pipeline is module
    return any(
        module in (found, find_optimized(found)) and _is_denoiser(name, found)
        for name, found in components_of(pipeline).items()
    )


def components_named(pipeline: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Components of some names, or the denoisers where no name is given.

    Raises:
        UnsupportedModel: it is no pipeline, has no denoiser, or no such component.
    """
    if names is None:
        return denoisers(pipeline)
    modules = components_of(pipeline)
    missing = [name for name in names if name not in modules]
    if missing or not names or isinstance(names, str):
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no component {', '.join(missing) or repr(names)}",
            where="components",
            fix=f"a list of some of: {', '.join(modules)}",
        )
    return {name: modules[name] for name in names}


def replace_components(
    pipeline: Any, found: Mapping[str, nn.Module], wrap: Callable[[str, nn.Module], CachedModel]
) -> None:
    """Put a wrapper in the place of some components; where one of them cannot be wrapped, all stay as they were.

    A denoiser that was optimized in another pipeline, whose scheduler this one does not share, gets a second wrapper;
    the other pipeline keeps its own.

    Args:
        pipeline: the pipeline.
        found: the components, by name.
        wrap: makes a wrapper of a component, given its name.

    Raises:
        AlreadyOptimized: one of them is.
    """
    done = next((name for name, module in found.items() if _is_optimized_for(pipeline, module)), None)
    if done is not None:
        raise AlreadyOptimized(f"the pipeline's {done} is optimized already", fix="dicompile.restore(pipe) first")
    wrapped = {id(module): wrap(name, _given(module)) for name, module in found.items()}
    for holder, name, module in list(_places(pipeline)):
        if id(module) in wrapped:
            setattr(holder, name, wrapped[id(module)])


def restore_components(pipeline: Any) -> None:
    """Put back what was replaced."""
    optimized = {id(module): find_optimized(module) for module in components_of(pipeline).values()}
    found = {place: released(module) for place, module in optimized.items() if module is not None}
    for holder, name, module in list(_places(pipeline)):
        if id(module) in found:
            setattr(holder, name, found[id(module)])


def optimized_components(pipeline: Any) -> dict[str, CachedModel]:
    """What was replaced in a pipeline, by name, denoisers first.

    Raises:
        UnsupportedModel: it is no pipeline.
    """
    items = ((name, find_optimized(module)) for name, module in components_of(pipeline).items())
    found = [(name, module) for name, module in items if module is not None]
    found.sort(key=lambda item: not _is_denoiser(*item))
    return dict(found)


def _is_optimized_for(pipeline: Any, module: nn.Module) -> bool:
    optimized = find_optimized(module)
    return optimized is not None and record_of(optimized).options.link.follows(pipeline)


def _given(module: nn.Module) -> nn.Module:
    """What to wrap: not another pipeline's wrapper, but what that one was made of."""
    optimized = find_optimized(module)
    return module if optimized is None else record_of(optimized).given


def _is_denoiser(name: str, module: nn.Module) -> bool:
    optimized = find_optimized(module)
    original = without_compile(module) if optimized is None else record_of(optimized).module
    arguments = frozenset(inspect.signature(original.forward).parameters)
    return sounds_like_denoiser(name, type(original).__name__, arguments)


def _places(pipeline: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[Any, str, nn.Module]]:
    """Every component of a pipeline and of the pipelines that it holds: where it is, under which name."""
    if id(pipeline) in seen:
        return
    seen |= {id(pipeline)}
    for name, module in components_of(pipeline).items():
        yield pipeline, name, module
    for held in vars(pipeline).values():
        if not isinstance(held, nn.Module) and isinstance(getattr(held, "components", None), dict):
            yield from _places(held, seen)
