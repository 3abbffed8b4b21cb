"""dicompile as a cache backend of vLLM-Omni, around a stand-in.

Names, signatures, defaults and order of calls are those of ``vllm_omni.diffusion.cache.base``, ``.data``,
``.worker.diffusion_model_runner`` and ``.models.diffusers_adapter`` of September 2026, as far as the example uses them.
Nothing here is their code. What passes here has not been run in vLLM-Omni itself.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dicompile
from dicompile.errors import InvalidSetting, UnknownPolicy, UnsupportedModel
from dicompile.wrapper import find_optimized, record_of
from tests.models import PlainDiT, redraw, state_of
from tests.pipelines import pipes
from tests.standins import install

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "vllm_omni"
EAGER = {"policy": "fora", "backend": "eager"}
STEPS = 6


@dataclass
class DiffusionCacheConfig:
    """One setting of theirs, and whatever else the user said, as attributes."""

    rel_l1_thresh: float = 0.2
    _extra_params: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DiffusionCacheConfig:
        known = {each.name for each in fields(cls)}
        return cls(
            **{name: value for name, value in data.items() if name in known},
            _extra_params={name: value for name, value in data.items() if name not in known},
        )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._extra_params:
            return self._extra_params[name]
        raise AttributeError(name)


class CacheBackend(ABC):
    def __init__(self, config: DiffusionCacheConfig) -> None:
        self.config, self.enabled = config, False

    @abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


class DiffusionModelRunner:
    def __init__(self, vllm_config: Any, od_config: Any, device: torch.device) -> None:
        self.od_config, self.pipeline, self.cache_backend = od_config, None, None

    def load_model(
        self, memory_pool_context_fn: Any = None, load_format: str = "default", custom_pipeline_name: str | None = None
    ) -> None:
        if load_format == "dummy":
            return
        self.pipeline = self.od_config.model()
        assert self.od_config.cache_backend in {None, "none"}  # else it makes one of its own

    def execute(self, steps: int | None, seed: int = 1) -> Tensor:
        """A request, as `execute_model` serves it."""
        with torch.inference_mode():
            if self.cache_backend is not None and self.cache_backend.is_enabled() and steps is not None:
                self.cache_backend.refresh(self.pipeline, steps)
            picture: Tensor = self.pipeline.forward(SimpleNamespace(steps=steps, seed=seed))
        return picture


class NativePipeline(nn.Module):
    """Denoisers and a scheduler, which its forward sets; either half of guidance is a call."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DDIMScheduler()
        self.transformer = redraw(PlainDiT(layers=2))
        self.stopped_after: int | None = None

    def forward(self, request: Any) -> Tensor:
        self.scheduler.set_timesteps(request.steps)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(request.seed))
        for i, timestep in enumerate(self.scheduler.timesteps):
            if i == self.stopped_after:
                raise InterruptedError
            halves = [self.denoiser(i)(latents, timestep.expand(1), torch.tensor([label])) for label in (3, 9)]
            noise = halves[1] + 2 * (halves[0] - halves[1])
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    def denoiser(self, step: int) -> nn.Module:
        return self.transformer


class Experts(NativePipeline):
    """Two denoisers, one after the other, by the names that it gives them."""

    _dit_modules = ("transformer", "low.transformer", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Module()
        self.low.transformer = redraw(PlainDiT(layers=2), seed=1)

    def denoiser(self, step: int) -> nn.Module:
        return self.transformer if step < 3 else self.low.transformer


class DiffusersAdapterPipeline(nn.Module):
    """A pipeline of diffusers as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = pipes.flux()
        self._pipeline = self.sampler.pipe

    def forward(self, request: Any) -> Tensor:
        return self.sampler(request.steps, request.seed)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, as vLLM-Omni imports it by its path."""
    install(
        monkeypatch,
        {
            "vllm_omni.diffusion.cache.base": {"CacheBackend": CacheBackend},
            "vllm_omni.diffusion.worker.diffusion_model_runner": {"DiffusionModelRunner": DiffusionModelRunner},
        },
    )
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "dicompile_vllm_omni", raising=False)
    return importlib.import_module("dicompile_vllm_omni")


def started(example: ModuleType, model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The runner of an engine that was told so; what is in `OmniDiffusionConfig` besides stays at its defaults."""
    config = SimpleNamespace(
        model=model,
        cache_backend="none",
        cache_config=DiffusionCacheConfig.from_dict({} if options is None else {"dicompile": options}),
        num_gpus=1,
        **settings,
    )
    runner = example.Runner(vllm_config=None, od_config=config, device=torch.device("cpu"))
    runner.load_model(load_format="default")
    return runner


def by_hand(pipeline: NativePipeline, *holders: Any) -> Tensor:
    """What a pipeline draws whose denoisers were optimized one by one."""
    for holder in holders:
        holder.transformer = dicompile.optimize(holder.transformer, schedule=pipeline.scheduler, **EAGER)
    with torch.inference_mode():
        return pipeline(SimpleNamespace(steps=STEPS, seed=1))


def test_a_native_pipeline_draws_what_the_optimized_module_draws(example: ModuleType) -> None:
    runner = started(example, NativePipeline, EAGER)
    assert isinstance(runner.cache_backend, CacheBackend)
    assert runner.cache_backend.is_enabled()
    picture = runner.execute(STEPS)
    pipeline = NativePipeline()
    assert torch.equal(picture, by_hand(pipeline, pipeline))
    assert not torch.equal(picture, NativePipeline()(SimpleNamespace(steps=STEPS, seed=1)))
    assert dicompile.report(runner.pipeline.transformer).kinds == {"full": 6, "reuse": 6}
    assert torch.equal(runner.execute(STEPS), picture)
    assert runner.execute(4).shape == picture.shape  # the scheduler says how many


def test_every_denoiser_that_a_pipeline_names_is_optimized(example: ModuleType) -> None:
    runner = started(example, Experts, EAGER)
    pipeline = Experts()
    assert torch.equal(runner.execute(STEPS), by_hand(pipeline, pipeline, pipeline.low))
    assert find_optimized(runner.pipeline.transformer) is not None
    assert find_optimized(runner.pipeline.low.transformer) is not None


def test_a_pipeline_of_diffusers_is_optimized_inside_the_adapter(example: ModuleType) -> None:
    runner = started(example, DiffusersAdapterPipeline, EAGER)
    own = pipes.flux()
    dicompile.optimize(own.pipe, **EAGER)
    assert torch.equal(runner.execute(STEPS), own(STEPS, 1))
    assert dicompile.report(runner.pipeline._pipeline).kinds == {"full": 3, "reuse": 3}


def test_a_generation_that_was_left_is_forgotten_before_the_next_one(example: ModuleType) -> None:
    runner = started(example, NativePipeline, EAGER)
    picture = runner.execute(STEPS)
    runner.pipeline.stopped_after = 1
    with pytest.raises(InterruptedError):
        runner.execute(STEPS)
    state = state_of(runner.pipeline.transformer)
    assert state.cache_bytes > 0
    runner.cache_backend.refresh(runner.pipeline, num_inference_steps=STEPS, verbose=False)
    assert state_of(runner.pipeline.transformer).cache_bytes == 0
    runner.pipeline.stopped_after = None
    assert torch.equal(runner.execute(STEPS), picture)


def test_without_options_a_model_is_compiled_and_nothing_cached(example: ModuleType) -> None:
    runner = started(example, NativePipeline)
    assert record_of(runner.pipeline.transformer).options.policy.rules == ()


def test_a_dummy_has_nothing_to_optimize(example: ModuleType) -> None:
    config = SimpleNamespace(cache_backend="none", cache_config=DiffusionCacheConfig(), num_gpus=None)
    runner = example.Runner(None, config, torch.device("cpu"))
    runner.load_model(load_format="dummy")
    assert runner.cache_backend is None


def test_what_does_not_go_with_it_is_refused_by_name(example: ModuleType) -> None:
    for name in example.UNTRIED:
        with pytest.raises(InvalidSetting, match=name):
            started(example, NativePipeline, EAGER, **{name: True})
    config = SimpleNamespace(cache_backend="tea_cache", num_gpus=2)
    with pytest.raises(InvalidSetting, match="cache_backend='tea_cache', num_gpus=2"):
        example.check(config)
    with pytest.raises(UnknownPolicy):
        started(example, NativePipeline, {"policy": "nobody"})
    with pytest.raises(UnsupportedModel, match="no denoiser"):
        started(example, nn.Module, EAGER)
