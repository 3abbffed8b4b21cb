"""A model that takes ComfyUI's calls, and the nodes of a workflow around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.comfyui.standin import (
    COMPILE_KEY,
    SAMPLERS,
    BaseModel,
    CFGGuider,
    Io,
    ModelPatcher,
    WrapperExecutor,
    WrappersMP,
    get_all_wrappers,
)
from tests.models import PlainBlock, redraw

WIDTH, PATCH = 32, 2


class Block(PlainBlock):
    """Attention over text and image, which another node may replace."""

    def forward(self, x: Tensor, c: Tensor, transformer_options: Mapping[str, Any] = {}) -> Tensor:
        override = transformer_options.get("optimized_attention_override")
        return super().forward(x, c) if override is None else override(super().forward, x, c)


class DiT(nn.Module):
    """Text and image in one stream; it asks for, and writes, options as ComfyUI's FLUX does."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.img_in, self.txt_in = nn.Linear(4 * PATCH * PATCH, WIDTH), nn.Linear(24, WIDTH)
        self.time_in = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.single_blocks = nn.ModuleList(Block(WIDTH, 2) for _ in range(layers))
        self.final = nn.Linear(WIDTH, 4 * PATCH * PATCH)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Any = None, control: Any = None,
                transformer_options: dict[str, Any] = {}, **kwargs: Any) -> Tensor:  # noqa: B006 # fmt: skip
        return WrapperExecutor.new_class_executor(
            self._forward, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        ).execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Any, control: Any,
                 transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:  # fmt: skip
        patches = transformer_options.get("patches", {})
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        b, c, h, w = x.shape
        grid = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        image, text = self.img_in(grid.reshape(b, -1, c * PATCH * PATCH)), self.txt_in(context)
        for patch in patches.get("post_input", ()):
            image = patch(image)
        frequency = torch.exp(-torch.arange(WIDTH // 2, device=x.device) / (WIDTH // 2) * 9.21)
        angle = 1000 * timesteps[:, None] * frequency[None]
        vec = self.time_in(torch.cat([angle.cos(), angle.sin()], dim=-1))
        tokens = torch.cat([text, image], dim=1)
        transformer_options["total_blocks"] = len(self.single_blocks)
        for i, block in enumerate(self.single_blocks):
            transformer_options["block_index"] = i
            assert ("single_block", i) not in replaced
            tokens = block(tokens, vec, transformer_options=transformer_options)
        out = self.final(tokens[:, text.shape[1] :]).reshape(b, h // PATCH, w // PATCH, c, PATCH, PATCH)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Loads:
    """One model, that the nodes of several workflows may share, and what happens meanwhile."""

    def __init__(self, *, multiplier: float = 1.0) -> None:
        self.batches = True
        self.at_step: Callable[[int], None] = lambda step: None
        self.base = BaseModel(redraw(DiT()), multiplier)

    def may_batch(self) -> bool:
        """Whether memory allows two conditions in one call."""
        return self.batches

    def on_step(self, step: int) -> None:
        """A sampler has called the model, as its progress bar is told."""
        self.at_step(step)

    def nodes(self) -> dict[str, type]:
        """By their ids."""
        kinds = (Loader, Text, Lora, TorchCompile, KSampler, Empty)
        return {kind.define_schema().node_id: type(kind.__name__, (kind,), {"loads": self}) for kind in kinds}


class Node(Io.ComfyNode):
    """A node of the workflow.

    Attributes:
        loads: where the model is.
    """

    loads: ClassVar[Loads]


class Loader(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        return Io.Schema("UNETLoader", inputs=[], outputs=[Io.Model.Output()])

    @classmethod
    def execute(cls) -> Io.NodeOutput:
        return Io.NodeOutput(ModelPatcher(cls.loads.base, cls.loads.may_batch))


class Text(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        inputs = [Io.Int.Input("text")]
        return Io.Schema("CLIPTextEncode", inputs=inputs, outputs=[Io.Conditioning.Output()])

    @classmethod
    def execute(cls, text: int) -> Io.NodeOutput:
        return Io.NodeOutput(torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(text)))


class Lora(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        inputs = [Io.Model.Input("model"), Io.Float.Input("strength_model")]
        return Io.Schema("LoraLoaderModelOnly", inputs=inputs, outputs=[Io.Model.Output()])

    @classmethod
    def execute(cls, model: ModelPatcher, strength_model: float) -> Io.NodeOutput:
        made, name = model.clone(), "diffusion_model.single_blocks.1.mlp.0.weight"
        change = torch.randn(cls.loads.base.get_parameter(name).shape, generator=torch.Generator().manual_seed(7))
        made.add_patches({name: strength_model * change})
        return Io.NodeOutput(made)


class TorchCompile(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        return Io.Schema("TorchCompileModel", inputs=[Io.Model.Input("model")], outputs=[Io.Model.Output()])

    @classmethod
    def execute(cls, model: ModelPatcher) -> Io.NodeOutput:
        made = model.clone()
        made.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        made.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, _compiled)
        return Io.NodeOutput(made)


class KSampler(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        names = ("model", "seed", "steps", "cfg", "positive", "negative", "latent_image", "denoise")
        inputs = [*map(Io.Input, names), Io.Combo.Input("sampler_name", options=list(SAMPLERS))]
        return Io.Schema("KSampler", inputs=inputs, outputs=[Io.Latent.Output()])

    @classmethod
    def execute(cls, *, model: ModelPatcher, seed: int, steps: int, cfg: float, positive: Tensor, negative: Tensor,
                latent_image: Any, denoise: float, sampler_name: str) -> Io.NodeOutput:  # fmt: skip
        latent = latent_image["samples"]
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        sigmas = cls.loads.base.model_sampling.sigmas(round(steps / denoise))[-steps - 1 :]
        guider = CFGGuider(model, positive, negative, cfg)
        samples = guider.sample(noise, latent, SAMPLERS[sampler_name], sigmas, cls.loads.on_step)
        return Io.NodeOutput({"samples": samples})


class Empty(Node):
    @classmethod
    def define_schema(cls) -> Io.Schema:
        inputs = [Io.Int.Input("width"), Io.Int.Input("height"), Io.Int.Input("batch_size")]
        return Io.Schema("EmptyLatentImage", inputs=inputs, outputs=[Io.Latent.Output()])

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> Io.NodeOutput:
        return Io.NodeOutput({"samples": torch.zeros(batch_size, 4, height // 8, width // 8)})


def _compiled(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch.compile's wrapper does, but for the compiling: another module meanwhile."""
    model = executor.class_obj
    kept, model.diffusion_model = model.diffusion_model, Counted(model.diffusion_model)
    try:
        return executor(*args, **kwargs)
    finally:
        model.diffusion_model = kept


class Counted(nn.Module):
    """Stands for what torch.compile returns."""

    calls = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.dtype = module, torch.float32

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        Counted.calls += 1
        return self.module(*args, **kwargs)
