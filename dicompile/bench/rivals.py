"""The opponents: the model as it is, compiled, and with the caches of others.

A cache of others is told apart by the operations that its steps take, so that no hook needs an adapter here.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dicompile.bench.contestants import BLOCKS, COMPILED, EAGER, Contestant, DoesNotFit, said
from dicompile.bench.workload import Workload
from dicompile.config import in_environment

THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Of caches that compare what they see: the first at which a run takes half of its operations counts, since the
published ones mean nothing for random weights."""


def prepare(name: str, workload: Workload, backend: str = "inductor") -> Contestant:
    """An opponent by its name.

    Args:
        name: one of `RIVALS`.
        workload: the model, and what it is called with.
        backend: of ``torch.compile``: "inductor" or "eager".

    Raises:
        DoesNotFit: it cannot run this model.
    """
    try:
        return RIVALS[name](workload, backend)
    except DoesNotFit:
        raise
    except Exception as error:  # whatever a library raises is what it has to say about this model
        raise DoesNotFit(said(error)) from error


def _eager(workload: Workload, _: str) -> Contestant:
    return Contestant(EAGER, workload.module, workload.steps)


def _compiled(workload: Workload, backend: str) -> Contestant:
    model = torch.compile(workload.copy(), backend=backend, dynamic=False)
    return Contestant(COMPILED, model, workload.steps)


def _blocks(workload: Workload, backend: str) -> Contestant:
    model: Any = workload.copy()
    if not getattr(model, "_repeated_blocks", None):
        model._repeated_blocks = sorted({type(block).__name__ for block in _blocks_of(model)})  # as diffusers asks for
    model.compile_repeated_blocks(backend=backend)
    return Contestant(BLOCKS, model, workload.steps)


def _hook(
    name: str, configs: Callable[[Workload], Sequence[tuple[str, Any]]], below: Callable[[nn.Module], list[nn.Module]]
) -> Callable[[Workload, str], Contestant]:
    """A cache of diffusers: the first of some configs with which a generation takes half of its operations.

    Args:
        name: of the contestant.
        configs: settings to try, with what they are called.
        below: the modules that its hooks go around, and others beside them.
    """

    def enable(module: Any, config: Any) -> Contestant:
        module.enable_cache(config)
        in_context = functools.partial(module.cache_context, "cond")
        return Contestant(name, module, 0, restart=module._reset_stateful_cache, context=in_context)

    def prepared(workload: Workload, backend: str) -> Contestant:
        if not hasattr(workload.module, "enable_cache"):
            raise DoesNotFit(f"{type(workload.module).__name__} has no enable_cache in diffusers")
        return _first_that_halves(configs(workload), enable, workload, functools.partial(_compile, below, backend))

    return prepared


def _first_block(_: Workload) -> list[tuple[str, Any]]:
    from diffusers.hooks import FirstBlockCacheConfig

    return [(f"threshold {t:g}", FirstBlockCacheConfig(threshold=t)) for t in THRESHOLDS]


def _taylorseer(_: Workload) -> list[tuple[str, Any]]:
    from diffusers.hooks import TaylorSeerCacheConfig

    return [("every 5th step", TaylorSeerCacheConfig())]


def _mag_cache(workload: Workload) -> list[tuple[str, Any]]:
    from diffusers.hooks import MagCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    is_flux = workload.subject.name == "flux"
    ratios = FLUX_MAG_RATIOS if is_flux else [1.0] * workload.steps
    setting = "ratios of FLUX" if is_flux else "ratios of 1"
    return [(setting, MagCacheConfig(num_inference_steps=workload.steps, mag_ratios=ratios))]


def _pyramid(workload: Workload) -> list[tuple[str, Any]]:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: workload.now
    )
    return [("every 2nd step, timesteps 100 to 800", config)]


def _faster_cache(workload: Workload) -> list[tuple[str, Any]]:
    from diffusers.hooks import FasterCacheConfig

    config = FasterCacheConfig(
        current_timestep_callback=lambda: workload.now,
        tensor_format="BCFHW" if workload.subject.model.layout == "packed" else workload.subject.model.layout,
        is_guidance_distilled=workload.subject.model.distilled,
        attention_weight_callback=lambda _: 0.5,
    )
    return [("every 2nd step below timestep 681", config)]


def _cache_dit(workload: Workload, backend: str) -> Contestant:
    try:
        with in_environment("CACHE_DIT_LOG_LEVEL", "ERROR"):  # it reports every block
            import cache_dit
    except ModuleNotFoundError:
        raise DoesNotFit("cache-dit is not installed: pip install 'dicompile[bench]'") from None

    def enable(module: Any, threshold: float) -> Contestant:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=threshold,
            num_inference_steps=workload.steps,
            enable_separate_cfg=False,  # both halves of guidance come in one call
        )
        cache_dit.enable_cache(module, cache_config=config)
        return Contestant(
            "cache-dit", module, 0, restart=lambda: cache_dit.refresh_context(module, cache_config=config)
        )

    settings = [(f"F1B0, threshold {t:g}", t) for t in THRESHOLDS]
    return _first_that_halves(settings, enable, workload, functools.partial(_compile, _blocks_of, backend))


def _first_that_halves(
    configs: Sequence[tuple[str, Any]],
    enable: Callable[[Any, Any], Contestant],
    workload: Workload,
    compile_below: Callable[[nn.Module], None],
) -> Contestant:
    """The first setting that takes half of the operations, else the last one, around compiled code.

    What hooks go around is compiled before they are there: inside of compiled code they break graphs, and those that
    count steps are compiled anew at every step until Dynamo gives up.
    """
    setting, config, counts = "", None, [1]
    for setting, config in configs:  # noqa: B007 - the last one tried counts
        trial = enable(workload.copy(), config)
        trial.steps = workload.steps
        counts = count_flops(trial, workload)
        if 2 * sum(counts) <= len(counts) * max(counts):
            break
    if len(set(counts)) == 1:
        raise DoesNotFit(f"no step takes fewer operations ({setting})")
    module = workload.copy()
    compile_below(module)
    chosen = enable(module, config)
    chosen.steps, chosen.setting, chosen.flops = workload.steps, setting, tuple(counts)
    return chosen


def _compile(parts: Callable[[nn.Module], list[nn.Module]], backend: str, module: nn.Module) -> None:
    """Compile the forward of parts of a module, once for all of a class.

    Every contestant gets code objects of its own: Dynamo counts recompilations by code object, and one contestant that
    reaches its limit would leave the others uncompiled.
    """
    forwards: dict[type[nn.Module], types.FunctionType] = {}
    for part in parts(module):
        kind = type(part)
        if kind not in forwards:
            code = kind.forward.__code__.replace()
            forwards[kind] = types.FunctionType(code, kind.forward.__globals__, closure=kind.forward.__closure__)
            functools.update_wrapper(forwards[kind], kind.forward)
            forwards[kind].__defaults__ = kind.forward.__defaults__
            forwards[kind].__kwdefaults__ = kind.forward.__kwdefaults__
        part.forward = torch.compile(types.MethodType(forwards[kind], part), backend=backend)


def count_flops(contestant: Contestant, workload: Workload) -> list[int]:
    """Operations of every step of a generation, matrix products and attention only; nothing may be compiled."""
    attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch 2.13 does not count
    mapping = {attention_on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    contestant.restart()
    with contestant.context(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        counts = [counter.get_total_flops() for _ in workload.calls(contestant.model, contestant.steps)]
    return [after - before for before, after in itertools.pairwise([0, *counts])]


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of the model's own lists."""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]


def _parts_of_blocks(module: nn.Module) -> list[nn.Module]:
    """Attentions, feed-forwards, norms: what the blocks call."""
    return [part for block in _blocks_of(module) for part in block.children() if not isinstance(part, nn.ModuleList)]


RIVALS: dict[str, Callable[[Workload, str], Contestant]] = {
    EAGER: _eager,
    COMPILED: _compiled,
    BLOCKS: _blocks,
    "first-block": _hook("first-block", _first_block, _blocks_of),
    "taylorseer": _hook("taylorseer", _taylorseer, _parts_of_blocks),
    "magcache": _hook("magcache", _mag_cache, _blocks_of),
    "pab": _hook("pab", _pyramid, _parts_of_blocks),
    "fastercache": _hook("fastercache", _faster_cache, _parts_of_blocks),
    "cache-dit": _cache_dit,
}
"""Opponents by name; ``fewer-steps`` follows from the others."""
