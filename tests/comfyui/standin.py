"""A stand-in for ComfyUI, which no registry has: the hooks that the node uses, written anew, and nothing else.

Names, signatures, order of calls and who copies what are those of ComfyUI's ``comfy.patcher_extension``,
``comfy.model_patcher``, ``comfy.model_base``, ``comfy.samplers``, ``comfy_api.latest`` and ``nodes`` of 2026. Nothing
here is their code. What passes here has not been run in ComfyUI itself.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import types
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMPILE_KEY = "torch.compile"
TORCH_COMPILE_KWARGS = "torch_compile_kwargs"


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


def get_all_wrappers(kind: str, options: Mapping[str, Any]) -> list[Any]:
    return [wrapper for group in options.get("wrappers", {}).get(kind, {}).values() for wrapper in group]


class WrapperExecutor:
    """Calls a function with wrappers around it, the first one outermost; each gets the rest of the chain."""

    def __init__(self, original: Any, class_obj: Any, wrappers: list[Any], index: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, wrappers, index

    @classmethod
    def new_class_executor(cls, original: Any, class_obj: Any, wrappers: list[Any]) -> WrapperExecutor:
        return cls(original, class_obj, wrappers)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rest = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1)
        return rest.execute(*args, **kwargs)


def copied(value: Any) -> Any:
    """Dictionaries and lists anew, what lies in them as it is."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


class ModelSampling(nn.Module):
    """Of a flow model: a sigma is a timestep over `multiplier`."""

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)


class BaseModel(nn.Module):
    def __init__(self, diffusion_model: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = ModelSampling(multiplier)
        self.current_weight_patches_uuid: Any = None
        self.backup: dict[str, nn.Parameter] = {}

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
                    transformer_options: Any = {}, **kwargs: Any) -> Tensor:  # noqa: B006 # fmt: skip
        executor = WrapperExecutor.new_class_executor(
            self._apply_model, self, get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        )
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any,
                     transformer_options: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        dtype = self.diffusion_model.dtype
        timestep = self.model_sampling.timestep(t).float()
        options = {**transformer_options, "prefetch_dynamic_vbars": False}
        context = None if c_crossattn is None else c_crossattn.to(dtype)
        out = self.diffusion_model(
            x.to(dtype), timestep, context=context, control=control, transformer_options=options, **kwargs
        )
        return x - out.float() * t.view(-1, 1, 1, 1)


class ModelPatcher:
    def __init__(self, model: BaseModel, may_batch: Callable[[], bool]) -> None:
        self.model, self.may_batch = model, may_batch
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.attachments: dict[str, Any] = {}
        self.patches: dict[str, Tensor] = {}
        self.patches_uuid = uuid.uuid4()

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        made = ModelPatcher(self.model, self.may_batch)
        made.model_options, made.wrappers = copied(self.model_options), copied(self.wrappers)
        made.attachments, made.patches = dict(self.attachments), dict(self.patches)
        made.patches_uuid = self.patches_uuid
        return made

    def get_model_object(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_patches(self, patches: Mapping[str, Tensor]) -> None:
        self.patches, self.patches_uuid = {**self.patches, **patches}, uuid.uuid4()

    def load(self) -> None:
        """Weights as this patcher has them: other parameters in the same places, the originals kept for the next."""
        if self.model.current_weight_patches_uuid == self.patches_uuid:
            return
        backup = self.model.backup
        for name, original in backup.items():
            self._put(name, original)
        backup.clear()
        for name, change in self.patches.items():
            backup[name] = self.model.get_parameter(name)
            self._put(name, nn.Parameter(backup[name] + change, requires_grad=False))
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _put(self, name: str, weight: nn.Parameter) -> None:
        module, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(module), last, weight)


@dataclass
class Cond:
    """A condition as it is sampled with."""

    context: Tensor
    uuid: uuid.UUID


class CFGGuider:
    def __init__(self, patcher: ModelPatcher, positive: Tensor, negative: Tensor, cfg: float) -> None:
        self.model_patcher, self.model_options, self.cfg = patcher, patcher.model_options, cfg
        self.conds = [Cond(positive, uuid.uuid4()), Cond(negative, uuid.uuid4())]

    def sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, callback: Any = None) -> Tensor:
        kept, self.model_options = self.model_options, copied(self.model_options)
        self.model_options["transformer_options"]["wrappers"] = copied(self.model_patcher.wrappers)
        wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options["transformer_options"])
        try:
            executor = WrapperExecutor.new_class_executor(self.outer_sample, self, wrappers)
            return executor.execute(noise, latent, sampler, sigmas, None, callback, False, None)
        finally:
            self.model_options = kept

    def outer_sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Any,
                     callback: Any, disable_pbar: bool, seed: Any) -> Tensor:  # fmt: skip
        self.model_patcher.load()
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent
        return sampler(lambda x, t: self.predict_noise(x, t, options), x, sigmas, callback)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Tensor:
        positive, negative = self.calc_cond_batch(x, timestep, model_options)
        return negative + (positive - negative) * self.cfg

    def calc_cond_batch(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> list[Tensor]:
        to_run, out = list(enumerate(self.conds)), [x] * len(self.conds)
        while to_run:
            batch = to_run[::-1] if self.model_patcher.may_batch() else to_run[:1]
            to_run = [one for one in to_run if one not in batch]
            options = copied(model_options["transformer_options"])
            options["cond_or_uncond"] = [index for index, _ in batch]
            options["uuids"] = [cond.uuid for _, cond in batch]
            options["sigmas"] = timestep
            results = self.model_patcher.model.apply_model(
                torch.cat([x] * len(batch)), torch.cat([timestep] * len(batch)),
                c_crossattn=torch.cat([cond.context.repeat(len(x), 1, 1) for _, cond in batch]),
                transformer_options=options,
            ).chunk(len(batch))  # fmt: skip
            for (index, _), result in zip(batch, results, strict=True):
                out[index] = result
        return out


def euler(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]))
        if callback is not None:
            callback(i)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def midpoint(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    """Calls the model between the sigmas, as dpm_2 does."""
    for i in range(len(sigmas) - 1):
        between = (sigmas[i] + sigmas[i + 1]) / 2
        half = x + (x - model(x, sigmas[i] * x.new_ones([len(x)]))) / sigmas[i] * (between - sigmas[i])
        denoised = model(half, between * x.new_ones([len(x)]))
        x = x + (half - denoised) / between * (sigmas[i + 1] - sigmas[i])
    return x


def heun(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    """Calls the model at every sigma twice, with two latents."""
    for i in range(len(sigmas) - 1):
        slope = (x - model(x, sigmas[i] * x.new_ones([len(x)]))) / sigmas[i]
        after = x + slope * (sigmas[i + 1] - sigmas[i])
        if sigmas[i + 1] > 0:
            slope = (slope + (after - model(after, sigmas[i + 1] * x.new_ones([len(x)]))) / sigmas[i + 1]) / 2
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpm_2": midpoint}


class Io:
    """``comfy_api.latest.io``: types of inputs and outputs, schema and node."""

    @dataclass
    class Input:
        id: str
        options: list[Any] | None = None
        display_name: str | None = None
        default: Any = None
        min: float | None = None
        max: float | None = None
        step: float | None = None
        tooltip: str | None = None
        advanced: bool | None = None

    @dataclass
    class Output:
        id: str | None = None
        display_name: str | None = None

    @dataclass
    class Schema:
        node_id: str
        display_name: str | None = None
        category: str = "sd"
        inputs: list[Any] = field(default_factory=list)
        outputs: list[Any] = field(default_factory=list)
        description: str = ""
        is_output_node: bool = False

    class NodeOutput:
        def __init__(self, *args: Any, ui: Any = None) -> None:
            self.args, self.ui = args, ui

    class ComfyNode(ABC):
        @classmethod
        @abstractmethod
        def define_schema(cls) -> Any: ...

        @classmethod
        @abstractmethod
        def execute(cls, **kwargs: Any) -> Any: ...


for _name in ("Model", "Combo", "Float", "Int", "String", "Latent", "Conditioning"):
    setattr(Io, _name, type(_name, (), {"Input": Io.Input, "Output": Io.Output}))


class Ui:
    @dataclass
    class PreviewText:
        value: str


class ComfyExtension(ABC):
    async def on_load(self) -> None:  # noqa: B027
        """Nothing to load."""

    @abstractmethod
    async def get_node_list(self) -> list[type]: ...


def modules() -> dict[str, types.ModuleType]:
    """What the node imports of ComfyUI, by name."""
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.patcher_extension": {"WrappersMP": WrappersMP, "WrapperExecutor": WrapperExecutor},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": ComfyExtension, "io": Io, "ui": Ui},
        "comfy_api.torch_helpers": {},
        "comfy_api.torch_helpers.torch_compile": {
            "COMPILE_KEY": COMPILE_KEY,
            "TORCH_COMPILE_KWARGS": TORCH_COMPILE_KWARGS,
        },
    }
    made = {}
    for name, values in contents.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(values)
    return made


@contextmanager
def loaded(folder: Path) -> Iterator[dict[str, type]]:
    """Nodes of a folder by their ids, as ``load_custom_node`` finds them: by file, under a name of no package."""
    name = str(folder).replace(".", "_x_")
    before = dict(sys.modules)
    sys.modules.update(modules())
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield asyncio.run(_nodes(module.comfy_entrypoint))
    finally:
        for added in set(sys.modules) - set(before):
            if added.startswith((name, "comfy")):
                del sys.modules[added]


async def _nodes(entrypoint: Any) -> dict[str, type]:
    extension = await entrypoint() if inspect.iscoroutinefunction(entrypoint) else entrypoint()
    assert isinstance(extension, ComfyExtension)
    await extension.on_load()
    return {node.define_schema().node_id: node for node in await extension.get_node_list()}


class Prompt:
    """Runs a workflow in API format: a node when its inputs are there, and again only where one of them changed.

    Args:
        nodes: by id.
    """

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.nodes, self._made = nodes, {}

    def run(self, workflow: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of all nodes."""
        with torch.inference_mode():
            return {name: self._output(workflow, name)[1] for name in workflow}

    def _output(self, workflow: Mapping[str, Any], name: str) -> tuple[Any, Any]:
        node = self.nodes[workflow[name]["class_type"]]
        inputs, key = {}, [workflow[name]["class_type"]]
        for given, value in workflow[name]["inputs"].items():
            is_link = isinstance(value, list)
            source, output = self._output(workflow, value[0]) if is_link else (value, None)
            inputs[given] = output.args[value[1]] if is_link else value
            key.append((given, source))
        _check(node.define_schema(), inputs)
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = key, node.execute(**inputs)
        return self._made[name]


def _check(schema: Any, inputs: Mapping[str, Any]) -> None:
    known = {one.id: one for one in schema.inputs}
    assert set(inputs) == set(known), schema.node_id
    for name, value in inputs.items():
        assert known[name].options is None or value in known[name].options, (name, value)
