"""MODEL on the command line -> a module without weights, and inputs for it.

A model is built of fake tensors: structure and plans need shapes, not weights, so any size costs seconds and no memory.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.errors import DicompileError

DEMO = Path(__file__).resolve().parents[1] / "demo" / "assets" / "shapes_dit"
TEXT_TOKENS = 77


class Loaded(NamedTuple):
    """A model to look at: its name, module, keyword arguments of its forward, and the mode of their fake tensors."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    fake_mode: FakeTensorMode


def load(model: str, batch: int, size: int | None) -> Loaded:
    """Resolve MODEL: "demo", ``module:factory``, or a folder that a diffusers model or pipeline was saved to.

    Args:
        model: what the user wrote. A factory returns a module and a dict of keyword arguments.
        batch: rows of the batch; classifier-free guidance in one call needs two per picture.
        size: edge of the latent, or None for the one in the config.

    Raises:
        DicompileError: it is none of these, or its inputs cannot be guessed.
    """
    if model == "demo":
        return _from_folder(DEMO, batch, size)
    if Path(model).is_dir():
        return _from_folder(Path(model), batch, size)
    if ":" in model:
        return _from_factory(model)
    raise DicompileError(
        f"there is no model {model!r}",
        where="MODEL",
        why="it is neither 'demo', nor an existing folder, nor module:factory",
        fix="dicompile inspect demo",
    )


def factory_of(spelled: str) -> Callable[[], Any]:
    """The function that ``module:factory`` names.

    Raises:
        DicompileError: it cannot be imported.
    """
    module_name, _, factory_name = spelled.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise DicompileError(
            f"cannot find {spelled}",
            where="MODEL",
            why=str(error),
            fix="write module:factory, importable from here, returning (module, inputs)",
        ) from None
    return factory


def _from_factory(spelled: str) -> Loaded:
    factory = factory_of(spelled)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made = factory()
    if not (isinstance(made, tuple) and isinstance(made[0], nn.Module) and isinstance(made[1], dict)):
        raise DicompileError(
            f"{spelled} returned {type(made).__name__}",
            where="MODEL",
            fix="return a torch.nn.Module and a dict with the keyword arguments of its forward",
        )
    return Loaded(spelled, made[0].eval(), made[1], mode)


def transformer_of(folder: Path) -> tuple[Path, Any]:
    """Folder of the diffusers transformer that was saved to a folder, of its own or of a pipeline, and its class.

    Raises:
        DicompileError: there is none, or this version of diffusers does not know the class.
    """
    path = next((p for p in (folder, folder / "transformer") if (p / "config.json").is_file()), None)
    if path is None:
        raise DicompileError(
            f"{folder} holds no diffusers transformer",
            where="MODEL",
            why="neither config.json nor transformer/config.json is there",
            fix="give the folder that save_pretrained wrote",
        )
    import diffusers

    name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise DicompileError(
            f"diffusers {diffusers.__version__} has no class {name!r}",
            where=str(path / "config.json"),
            fix="install the diffusers version that saved the model",
        )
    return path, kind


def _from_folder(folder: Path, batch: int, size: int | None) -> Loaded:
    path, kind = transformer_of(folder)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module = kind.from_config(kind.load_config(path)).eval()
        inputs = example_inputs(module, batch, size)
    return Loaded(f"{folder.name} ({kind.__name__})", module, inputs, mode)


def example_inputs(module: nn.Module, batch: int, size: int | None) -> dict[str, Any]:
    """Inputs by the names that diffusers gives to forward arguments, with sizes from the model's config.

    Raises:
        DicompileError: a required argument has no usual meaning.
    """
    config: Mapping[str, Any] = getattr(module, "config", {})
    edge = size or config.get("sample_size") or 32
    makers = _argument_makers(config, batch, int(edge))
    parameters = inspect.signature(inspect.unwrap(module.forward)).parameters
    inputs: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name == "self":
            continue
        if name in makers and (parameter.default is inspect.Parameter.empty or name in _WANTED):
            inputs[name] = makers[name]()
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise DicompileError(
                f"cannot guess the input {name!r} of {type(module).__name__}",
                where="MODEL",
                fix="write a factory that returns (module, inputs) and give module:factory",
            )
    return {name: value for name, value in inputs.items() if value is not None}


_WANTED = (
    "hidden_states", "timestep", "class_labels", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids",
    "guidance", "added_cond_kwargs", "return_dict",
)  # fmt: skip


def _argument_makers(config: Mapping[str, Any], batch: int, edge: int) -> dict[str, Callable[[], Any]]:
    channels = config.get("in_channels", 4)
    packed = "axes_dims_rope" in config
    latent = (batch, (edge // 2) ** 2, channels) if packed else (batch, channels, edge, edge)
    text_width = next(
        (config[key] for key in ("joint_attention_dim", "caption_channels", "cross_attention_dim") if config.get(key)),
        None,
    )

    def floating(*shape: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.empty(shape)

    return {
        "hidden_states": floating(*latent),
        "timestep": floating(batch) if packed else lambda: torch.empty(batch, dtype=torch.long),
        "class_labels": lambda: torch.empty(batch, dtype=torch.long) if config.get("num_embeds_ada_norm") else None,
        "encoder_hidden_states": lambda: torch.empty(batch, TEXT_TOKENS, text_width) if text_width else None,
        "pooled_projections": lambda: torch.empty(batch, config["pooled_projection_dim"]),
        "img_ids": floating((edge // 2) ** 2, 3),
        "txt_ids": floating(TEXT_TOKENS, 3),
        "guidance": lambda: torch.empty(batch) if config.get("guidance_embeds") else None,
        "added_cond_kwargs": lambda: {"resolution": None, "aspect_ratio": None},
        "return_dict": lambda: False,
    }
