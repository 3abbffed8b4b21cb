"""dicompile as a plugin of SGLang-Diffusion, around a stand-in.

Names, signatures and order of calls are those of ``sglang.multimodal_gen.plugins``,
``sglang.srt.plugins.hook_registry`` and ``sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline`` of September
2026, as far as the example uses them. Nothing here is their code. What passes here has not been run in SGLang itself.
"""

from __future__ import annotations

import enum
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.errors import InvalidSetting, NotOptimized
from tests.pipelines import pipes
from tests.standins import install

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "sglang"
OPTIONS = {"policy": "fora", "backend": "eager"}
STEPS = 6


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"


class HookRegistry:
    """Hooks by the dotted names of what they are put around; those before a call may give it other arguments."""

    hooks: ClassVar[dict[str, tuple[Callable[..., Any], HookType]]] = {}

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER) -> None:
        cls.hooks[target] = hook, hook_type

    @classmethod
    def apply_hooks(cls) -> None:
        for target, (hook, kind) in cls.hooks.items():
            path, class_name, name = target.rsplit(".", 2)
            owner = getattr(sys.modules[path], class_name)
            assert kind is HookType.BEFORE
            setattr(owner, name, before(getattr(owner, name), hook))


def before(function: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        changed = hook(*args, **kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        return function(*args, **kwargs)

    return both


def pipeline_class() -> type:
    """A new one each time, since hooks are put into it."""

    class DiffusersPipeline:
        def __init__(self, server_args: Any) -> None:
            self.server_args, self.stages = server_args, []
            self.sampler = pipes.flux()
            self.diffusers_pipe = self.sampler.pipe  # loaded

        def post_init(self) -> None:
            self.create_pipeline_stages(self.server_args)

        def create_pipeline_stages(self, server_args: Any) -> None:
            self.stages.append(self.diffusers_pipe)

        def forward(self, steps: int) -> Tensor:
            (pipe,) = self.stages
            with torch.no_grad():
                return pipes.Sampler(pipe, self.sampler.options)(steps)

    return DiffusersPipeline


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A process of SGLang: it loads plugins by their entry points, applies their hooks, and then loads a pipeline."""
    install(
        monkeypatch,
        {
            "sglang.multimodal_gen.plugins": {"HookRegistry": HookRegistry},
            "sglang.srt.plugins.hook_registry": {"HookType": HookType},
            "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline": {"DiffusersPipeline": pipeline_class()},
        },
    )
    monkeypatch.setattr(HookRegistry, "hooks", {})
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "dicompile_sglang", raising=False)

    def start(options: str | None, **server_args: Any) -> Any:
        if options is not None:
            monkeypatch.setenv("SGLANG_DICOMPILE", options)
        group = r'entry-points."sglang.multimodal_gen.plugins"]\ndicompile = "(.+):(.+)"'
        module, name = re.findall(group, (FOLDER / "pyproject.toml").read_text())[0]
        getattr(importlib.import_module(module), name)()
        HookRegistry.apply_hooks()
        loaded = sys.modules["sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline"]
        pipeline = loaded.DiffusersPipeline(SimpleNamespace(cache_dit_config=None, **server_args))
        pipeline.post_init()
        return pipeline

    return start


def test_the_stage_draws_what_the_optimized_pipeline_draws(serve: Callable[..., Any]) -> None:
    pipeline = serve(json.dumps(OPTIONS))
    own = pipes.flux()
    uncached = own(STEPS)
    dicompile.optimize(own.pipe, **OPTIONS)
    picture = pipeline.forward(STEPS)
    assert torch.equal(picture, own(STEPS))
    assert not torch.equal(picture, uncached)
    assert dicompile.report(pipeline.diffusers_pipe).kinds == {"full": 3, "reuse": 3}


def test_without_options_nothing_is_changed(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_DICOMPILE", raising=False)
    with pytest.raises(NotOptimized):
        dicompile.report(serve(None).diffusers_pipe)


@pytest.mark.parametrize("text", ["fora", '["fora"]', ""])
def test_options_that_are_no_object_are_refused(serve: Callable[..., Any], text: str) -> None:
    with pytest.raises(InvalidSetting, match="SGLANG_DICOMPILE cannot be"):
        serve(text)


def test_a_second_cache_is_refused(serve: Callable[..., Any]) -> None:
    pipeline = serve(json.dumps(OPTIONS))
    pipeline.server_args.cache_dit_config = "cache.yaml"
    with pytest.raises(InvalidSetting, match="cache-dit and dicompile do not go together"):
        pipeline.create_pipeline_stages(pipeline.server_args)
