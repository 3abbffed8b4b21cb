"""MODEL on the command line -> a module without weights, and inputs for it.

A model is built of fake tensors: structure and plans need shapes, not weights, so any size costs seconds and no memory.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from dicompile.analysis import Analysis
from dicompile.capture import capture_model
from dicompile.errors import DicompileError
from dicompile.zoo import MODELS, Published, get_diffusers, get_model

DEMO = Path(__file__).resolve().parents[1] / "demo" / "assets" / "shapes_dit"
TEXT_TOKENS = 77

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICTURE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Shape:
    """What a model is given, as far as the user says it.

    Attributes:
        batch: rows of the batch; where guidance is computed in one call, it takes two per picture.
        size: of the picture in pixels, ``1024`` or ``480x832`` (height first); of well-known models only.
        frames: of the film; of well-known models only.
        text: tokens of the prompt.
        latent: edge of the latent; of 'demo' and folders only.
    """

    batch: int | None = None
    size: str | None = None
    frames: int | None = None
    text: int | None = None
    latent: int | None = None

    @property
    def picture(self) -> tuple[int, int] | None:
        """Height and width in pixels.

        Raises:
            DicompileError: `size` is neither a number nor two.
        """
        if self.size is None:
            return None
        match = _PICTURE.fullmatch(self.size)
        if match is None:
            raise DicompileError(
                f"size cannot be {self.size!r}", where="--size", fix="write 1024, or height x width: 480x832"
            )
        return int(match[1]), int(match[2] or match[1])

    def refuse(self, what: str, **given: object) -> None:
        """Refuse options that mean nothing for a kind of model.

        Raises:
            DicompileError: one of them was given.
        """
        named = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
        if named:
            raise DicompileError(
                f"{what} takes no {named}",
                where="MODEL",
                why="--size, --frames are for well-known models; --latent for 'demo' and folders; a factory brings all",
                fix=f"leave out {named}",
            )


class Loaded(NamedTuple):
    """A model to look at.

    Attributes:
        name: what to call it.
        module: of fake tensors.
        inputs: keyword arguments of its forward.
        fake_mode: the mode of their tensors.
        about: where it comes from, and what it is given.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    fake_mode: FakeTensorMode
    about: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def in_bfloat16(self) -> Loaded:
        """The same with weights and inputs in bfloat16, as models run on a GPU."""

        def cast(value: Any) -> Any:
            return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with self.fake_mode:
            for part in self.module.modules():  # what `Module.to` does swaps storages, which fake tensors have not
                for name, parameter in list(part.named_parameters(recurse=False)):
                    setattr(part, name, nn.Parameter(cast(parameter.detach()), requires_grad=False))
                for name, buffer in list(part.named_buffers(recurse=False)):
                    setattr(part, name, cast(buffer))
            return self._replace(inputs=tree_map(cast, self.inputs))

    def analysis(self) -> Analysis:
        """Its graph, and what is found in it; nothing is compiled."""
        with self.fake_mode:
            return Analysis(capture_model(self.module, self.inputs))


def load(model: str, shape: Shape = Shape(), *, download: bool = False) -> Loaded:
    """Resolve MODEL: a well-known name, "demo", ``module:factory``, a folder that diffusers saved, or a hub id.

    Args:
        model: what the user wrote. A factory returns a module and a dict of keyword arguments.
        shape: what the model is given.
        download: whether the config (nothing else) of a hub id may be fetched.

    Raises:
        DicompileError: it is none of these, or its inputs cannot be guessed.
    """
    if model == "demo" or Path(model).is_dir():
        shape.refuse(model, size=shape.size, frames=shape.frames)
        return _from_folder(DEMO if model == "demo" else Path(model), shape)
    if ":" in model:
        shape.refuse(model, **asdict(shape))
        return _from_factory(model)
    if _HUB_ID.fullmatch(model):
        shape.refuse(model, size=shape.size, frames=shape.frames)
        return _from_hub(model, shape, download=download)
    shape.refuse(model, latent=shape.latent)
    known = get_model(model, why="nor is it 'demo', a folder that exists, module:factory, or a hub id")
    return _from_zoo(known, shape)


def _from_zoo(known: Published, shape: Shape) -> Loaded:
    size = known.sized(shape.picture, shape.frames, shape.text)
    batch = shape.batch or known.batch
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module, inputs = known.build(size), known.call(size, batch)
        if known.is_lazy:
            module(**inputs)
    about = (f"{known.describe(size)}, batch {batch}", f"config: {known.source}")
    return Loaded(f"{known.title} ({type(module).__name__})", module, inputs, mode, about)


def _from_hub(name: str, shape: Shape, *, download: bool) -> Loaded:
    """The model whose config lies on the hub, if the user said that it may be fetched.

    Raises:
        DicompileError: the user did not, or it cannot be.
    """
    known = [model.name for model in MODELS.values() if model.source.partition(",")[0].lower() == name.lower()]
    if not download:
        raise DicompileError(
            f"{name} would have to be fetched",
            where="MODEL",
            why="it is no folder here, and nothing is downloaded unasked",
            fix=f"its config is bundled: {known[0]}" if known else "--download fetches its config.json, no weights",
        )
    diffusers = get_diffusers()
    try:
        try:
            config = diffusers.AutoModel.load_config(name, subfolder="transformer")
        except OSError:
            config = diffusers.AutoModel.load_config(name)
    except OSError as error:
        raise DicompileError(
            f"no config of {name} could be fetched", where="MODEL", why=" ".join(str(error).split()),
            fix="save the model to a folder and give that",
        ) from None  # fmt: skip
    return _from_config(name, _class_of(config, name), config, shape, f"config: {name} on the Hugging Face hub")


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
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return path, _class_of(config, str(path / "config.json"))


def _class_of(config: Mapping[str, Any], where: str) -> Any:
    diffusers, name = get_diffusers(), config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise DicompileError(
            f"diffusers {diffusers.__version__} has no class {name!r}",
            where=where,
            fix="install the diffusers version that saved the model",
        )
    return kind


def _from_folder(folder: Path, shape: Shape) -> Loaded:
    path, kind = transformer_of(folder)
    return _from_config(folder.name, kind, kind.load_config(path), shape)


def _from_config(name: str, kind: Any, config: Any, shape: Shape, *about: str) -> Loaded:
    batch = shape.batch or 2
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module = kind.from_config(config).eval()
        inputs = example_inputs(module, batch, shape.latent, shape.text or TEXT_TOKENS)
    latent = next(iter(inputs.values()))
    size = f"latent {'x'.join(map(str, latent.shape[1:]))}, batch {batch}"
    return Loaded(f"{name} ({kind.__name__})", module, inputs, mode, (size, *about))


def example_inputs(module: nn.Module, batch: int, size: int | None, text: int = TEXT_TOKENS) -> dict[str, Any]:
    """Inputs by the names that diffusers gives to forward arguments, with sizes from the model's config.

    Raises:
        DicompileError: a required argument has no usual meaning.
    """
    config: Mapping[str, Any] = getattr(module, "config", {})
    edge = size or config.get("sample_size") or 32
    makers = _argument_makers(config, batch, int(edge), text)
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


def _argument_makers(config: Mapping[str, Any], batch: int, edge: int, text: int) -> dict[str, Callable[[], Any]]:
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
        "encoder_hidden_states": lambda: torch.empty(batch, text, text_width) if text_width else None,
        "pooled_projections": lambda: torch.empty(batch, config["pooled_projection_dim"]),
        "img_ids": floating((edge // 2) ** 2, 3),
        "txt_ids": floating(text, 3),
        "guidance": lambda: torch.empty(batch) if config.get("guidance_embeds") else None,
        "added_cond_kwargs": lambda: {"resolution": None, "aspect_ratio": None},
        "return_dict": lambda: False,
    }
