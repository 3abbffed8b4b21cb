"""dicompile in SGLang-Diffusion: a plugin that optimizes the pipeline of ``--backend diffusers``.

SGLANG_DICOMPILE='{"policy": "toca"}' sglang serve --backend diffusers --model-path Qwen/Qwen-Image

The variable holds what `dicompile.optimize` takes besides the pipeline, as JSON; without it nothing is changed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import dicompile
from dicompile.errors import InvalidSetting

OPTIONS = "SGLANG_DICOMPILE"
TARGET = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline.create_pipeline_stages"


def register() -> None:
    """Entry point of the group ``sglang.multimodal_gen.plugins``; SGLang calls it in each of its processes."""
    from sglang.multimodal_gen.plugins import HookRegistry
    from sglang.srt.plugins.hook_registry import HookType

    HookRegistry.register(TARGET, optimize, HookType.BEFORE)


def optimize(pipeline: Any, server_args: Any) -> None:
    """Optimize the diffusers pipeline that is loaded, before SGLang makes the stage of it that runs it.

    Raises:
        InvalidSetting: the options are no JSON object, or cache-dit is turned on as well.
    """
    if OPTIONS not in os.environ:
        return
    if getattr(server_args, "cache_dit_config", None):
        raise InvalidSetting(
            "cache-dit and dicompile do not go together",
            where=f"--cache-dit-config and {OPTIONS}",
            why="what one of them reuses, the other would take for computed",
            fix="leave out one of them",
        )
    dicompile.optimize(pipeline.diffusers_pipe, **_options(os.environ[OPTIONS]))


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise InvalidSetting(
            f"{OPTIONS} cannot be {text!r}",
            where="environment",
            fix=f"""a JSON object with arguments of dicompile.optimize: {OPTIONS}='{{"policy": "fora"}}'""",
        )
    return options
