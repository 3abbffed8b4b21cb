"""The two nodes: one that optimizes a model, and one that says what happened in the last run."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from dicompile.policies import POLICIES, required_options

from .sampling import Sampling

KEY = "dicompile"
GIB = 2**30


class Dicompile(io.ComfyNode):
    """Model in, model out: sampled with a cache, and compiled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Dicompile",
            display_name="dicompile",
            category="model/optimization",
            description="Compiles a diffusion transformer with feature caching. Takes the place of torch.compile. "
            "Conditions that are batched in another way in the middle of a run are computed anew.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "policy",
                    options=[name for name in POLICIES if not required_options(name)],
                    default="fora",
                    tooltip="what is computed at which step; 'none' compiles only",
                ),
                io.Float.Input(
                    "max_cache_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.25,
                    tooltip="the most that one batch of conditions may remember, in GiB; 0 for no bound",
                ),
                io.Combo.Input(
                    "over_budget",
                    options=["refuse", "degrade"],
                    default="refuse",
                    tooltip="what becomes of a policy that needs more: an error, or fewer branches are cached",
                ),
                io.Combo.Input(
                    "backend",
                    options=["inductor", "eager"],
                    default="inductor",
                    advanced=True,
                    tooltip="'eager' compiles nothing, for debugging",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, policy: str, max_cache_gib: float, over_budget: str, backend: str) -> io.NodeOutput:
        """A clone of the model with the wrappers."""
        patched = model.clone(disable_dynamic=True)
        sampling = Sampling(
            patched.get_model_object("diffusion_model"),
            policy,
            max_cache_bytes=int(max_cache_gib * GIB) or None,
            over_budget=over_budget,
            backend=backend,
        )
        patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        patched.model_options.pop(TORCH_COMPILE_KWARGS, None)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, sampling.apply_model)
        patched.set_attachments(KEY, sampling)
        return io.NodeOutput(patched)


class DicompileReport(io.ComfyNode):
    """What happened when the model was sampled last."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DicompileReport",
            display_name="dicompile report",
            category="model/optimization",
            description="Calls by kind of step, and memory, of the last sampling. It waits for the sampler's latent.",
            inputs=[io.Model.Input("model"), io.Latent.Input("latent")],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> io.NodeOutput:
        """The report of the sampling that made the latent."""
        sampling = model.attachments.get(KEY)
        text = "dicompile was not applied to this model" if sampling is None else sampling.report or "not sampled yet"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Both of them."""
        return [Dicompile, DicompileReport]


async def comfy_entrypoint() -> Extension:
    """Where ComfyUI finds the extension."""
    return Extension()
