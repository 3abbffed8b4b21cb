"""Pipelines: which of their components are denoisers, and how those are replaced: all of them, or none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from dicompile.errors import AlreadyOptimized, UnsupportedModel
from dicompile.wrapper import CachedModel, record_of

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "sigma", "sigmas")


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Components of a pipeline that take a timestep.

    Raises:
        UnsupportedModel: it is no pipeline, or has none.
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict) or getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} is neither a torch.nn.Module nor a pipeline with a scheduler",
            where="dicompile",
            fix="give the denoiser and its scheduler: optimize(model, policy, schedule=scheduler)",
        )
    found = {
        name: component
        for name, component in components.items()
        if isinstance(component, nn.Module) and _takes_timestep(component)
    }
    if not found:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no denoiser",
            where="dicompile",
            why=f"no component's forward takes one of {', '.join(TIMESTEP_ARGUMENTS)}",
            fix="give the denoiser itself: optimize(model, policy, schedule=scheduler)",
        )
    return found


def replace_denoisers(pipeline: Any, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Put a wrapper in the place of every denoiser; where one of them cannot be wrapped, all stay as they were.

    Raises:
        AlreadyOptimized: one of them is.
    """
    found = denoisers(pipeline)
    done = next((name for name, denoiser in found.items() if isinstance(denoiser, CachedModel)), None)
    if done is not None:
        raise AlreadyOptimized(f"the pipeline's {done} is optimized already", fix="dicompile.restore(pipe) first")
    for name, wrapped in {name: wrap(denoiser) for name, denoiser in found.items()}.items():
        setattr(pipeline, name, wrapped)


def _takes_timestep(module: nn.Module) -> bool:
    original = record_of(module).module if isinstance(module, CachedModel) else module
    return any(name in inspect.signature(original.forward).parameters for name in TIMESTEP_ARGUMENTS)
