"""Runs under the eyes of an observer: whatever pipeline and scheduler they have, every step computes everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from dicompile.api import denoising_in, optimize, restore
from dicompile.errors import NotOptimized, UnsupportedModel
from dicompile.lower import Backend, Hoist
from dicompile.model import ModelCalls
from dicompile.pipelines import denoisers, optimized_components
from dicompile.plan import UNLIMITED, recording_plan
from dicompile.policies import NoCache
from dicompile.runtime import Observer
from dicompile.wrapper import CachedModel, find_optimized, record_of, without_compile


class Watcher(Observer, Protocol):
    """Watches the calls of one model.

    Attributes:
        calls: what is watched; set when the watch begins.
    """

    calls: ModelCalls


def watch(cached: CachedModel, watcher: Watcher, backend: str | None) -> None:
    """Let somebody watch the calls of a denoiser from now on; nothing is cached meanwhile.

    Args:
        cached: the denoiser, inside of `followed`.
        watcher: who watches.
        backend: what runs the steps; by default what runs them now.
    """
    record = record_of(cached)
    options = replace(
        record.options, policy=NoCache(), link=record.options.link.whole, cache=UNLIMITED, hoist=Hoist.NOTHING,
        timing=None, observer=watcher, planner=recording_plan,
    )  # fmt: skip
    if backend is not None or options.backend.in_background:
        options = replace(options, backend=Backend.of(backend or "inductor"))
    record.calls = watcher.calls = ModelCalls(record.module, options)


@contextlib.contextmanager
def followed(model: Any, components: Sequence[str] | None, backend: str) -> Iterator[dict[str, CachedModel]]:
    """All denoisers, optimized; whatever calls they are given meanwhile, they have their own again afterwards.

    Args:
        model: a pipeline, optimized or not; or a module that `dicompile.optimize` returned.
        components: of a pipeline that is not optimized: the denoisers, if not all of them.
        backend: what runs the steps of a pipeline that is not.

    Yields:
        The denoisers by component, in the order of the pipeline; a module by itself has no name.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
    """
    is_ours = not isinstance(model, nn.Module) and not optimized_components(model)
    if is_ours:
        optimize(model, NoCache(), backend=backend, components=components)
    elif isinstance(model, nn.Module) and find_optimized(model) is None:
        raise NotOptimized(
            f"this {type(model).__name__} was not optimized",
            where="dicompile.learn",
            why="its steps are followed in calls of the wrapper that `optimize` returns",
            fix="model = dicompile.optimize(model, 'none', schedule=scheduler), and sample with it",
        )
    try:
        found = denoising_in(model)
        calls = {name: record_of(cached).calls for name, cached in found.items()}
        try:
            yield found
        finally:
            for name, cached in found.items():
                record_of(cached).calls = calls[name]
    finally:
        if is_ours:
            restore(model)


@contextlib.contextmanager
def one_followed(model: Any, components: Sequence[str] | None, backend: str) -> Iterator[CachedModel]:
    """As `followed`, where a single denoiser can be served.

    Raises:
        UnsupportedModel: there are several.
    """
    with followed(model, components, backend) as found:
        yield _single(model, list(found.values()), fix='components=["transformer"]')


def output_of(results: Sequence[Any]) -> Tensor:
    """What a model returns first of tensors: its prediction."""
    return next(result for result in results if isinstance(result, Tensor))


def denoiser_of(model: Any) -> nn.Module:
    """The one denoiser itself, of a pipeline or a module, optimized or not.

    Raises:
        UnsupportedModel: there are several, or none.
    """
    found = [model] if isinstance(model, nn.Module) else list(denoisers(model).values())
    module = _single(model, found, fix="give the one that was recorded: pipe.transformer")
    cached = find_optimized(module)
    return without_compile(module) if cached is None else record_of(cached).module


M = TypeVar("M", bound=nn.Module)


def _single(model: Any, found: Sequence[M], *, fix: str) -> M:
    """The one denoiser."""
    if len(found) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(found)} denoisers, and one can be recorded at a time",
            where="dicompile.learn",
            why="a recording is of one model over all steps of the schedule",
            fix=fix,
        )
    return found[0]
