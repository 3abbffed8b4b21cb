"""dicompile as a cache backend of vLLM-Omni, and the model runner that puts it into an engine.

Omni(
    model="Qwen/Qwen-Image",
    diffusion_model_runner_cls="dicompile_vllm_omni.Runner",
    cache_config={"dicompile": {"policy": "toca", "max_cache_bytes": "4GiB"}},
    enforce_eager=True,
)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

import dicompile
from dicompile.errors import InvalidSetting, UnsupportedModel

UNTRIED = (
    "step_execution", "streaming_output", "enable_cpu_offload", "enable_layerwise_offload",
    "enable_distributed_layerwise_offload",
)  # fmt: skip
"""Settings of the engine under which several requests take turns in a model, or its weights come and go."""


class DicompileBackend(CacheBackend):
    """Optimizes the denoisers of a pipeline, with what its config has as ``dicompile``."""

    def enable(self, pipeline: Any) -> None:
        """Replace the denoisers; called once, when the pipeline is loaded.

        Args:
            pipeline: of vLLM-Omni; or one of diffusers, inside vLLM-Omni's adapter for those.

        Raises:
            UnsupportedModel: it has no denoiser.
        """
        options = getattr(self.config, "dicompile", {})
        inner = getattr(pipeline, "_pipeline", None)
        if inner is not None:
            self._optimized = [dicompile.optimize(inner, **options)]
        else:
            self._optimized = []
            for holder, name in denoisers(pipeline):
                model = dicompile.optimize(getattr(holder, name), schedule=pipeline, **options)
                setattr(holder, name, model)
                self._optimized.append(model)
        if not self._optimized:
            raise UnsupportedModel(
                f"{type(pipeline).__name__} has no denoiser",
                where="vLLM-Omni",
                why="it names none in _dit_modules, and has neither transformer nor transformer_2",
                fix="run it without dicompile",
            )
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Release what a generation that was left has stored; called before each one.

        The steps come from the pipeline's scheduler, so their number changes nothing here.
        """
        for model in self._optimized:
            dicompile.free(model)


class Runner(DiffusionModelRunner):
    """vLLM-Omni's model runner, with dicompile where its own choice of cache backends stands."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the pipeline, and optimize it.

        Raises:
            InvalidSetting: the engine was told something that does not go with it, or was never tried.
        """
        check(self.od_config)
        super().load_model(*args, **kwargs)
        if self.pipeline is not None:  # a dummy has none
            self.cache_backend = DicompileBackend(self.od_config.cache_config)
            self.cache_backend.enable(self.pipeline)


def denoisers(pipeline: Any) -> Iterator[tuple[Any, str]]:
    """Where a pipeline of vLLM-Omni has its denoisers: what holds one, and as which attribute."""
    for path in getattr(pipeline, "_dit_modules", ("transformer", "transformer_2")):
        *above, name = path.split(".")
        holder = functools.reduce(lambda held, part: getattr(held, part, None), above, pipeline)
        if isinstance(getattr(holder, name, None), nn.Module):
            yield holder, name


def check(config: Any) -> None:
    """Refuse by name what has not been tried, rather than to serve pictures that nobody has compared."""
    said = [name for name in UNTRIED if getattr(config, name, False)]
    if config.cache_backend not in (None, "none"):
        said.append(f"cache_backend={config.cache_backend!r}")
    if (config.num_gpus or 1) > 1:
        said.append(f"num_gpus={config.num_gpus}")
    if said:
        raise InvalidSetting(
            f"{', '.join(said)} does not go with dicompile in vLLM-Omni",
            where="the engine's configuration",
            why="a second cache, requests that take turns in one model, weights that come and go, or several GPUs",
            fix="leave it out, or leave out diffusion_model_runner_cls",
        )
