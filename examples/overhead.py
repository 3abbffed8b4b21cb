"""What dicompile itself costs per call: guards, step and context, slots; everything but the compiled code.

    python examples/overhead.py

The compiled segments are replaced by ones that give back what they computed before, so that only dicompile's own time
is left: taking the arguments apart, comparing everything that the forward read, finding step and context, moving slots.
Models are tiny: the time depends on the number of blocks, parameters and attributes, not on their sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

import dicompile
from dicompile.lower import Program
from dicompile.runtime import execute

STEPS, ROUNDS = 20, 20
TIMESTEPS = [round(999 - i * 999 / STEPS) for i in range(STEPS)]


class ReadsItsMask(nn.Module):
    """A model around another whose Python reads a mask, so that it is captured by running it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
        """Only the tokens that the longest row of the mask has."""
        hidden_states = hidden_states[:, : max(mask.sum(1).tolist())]
        output: Tensor = self.model(hidden_states=hidden_states, timestep=timestep, return_dict=False, **inputs)[0]
        return output


def dit(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=blocks, sample_size=8,
        patch_size=2, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2]), "return_dict": False}
    return model.eval(), inputs


def flux(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    double = blocks // 3
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=double, num_single_layers=blocks - double, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=40, axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 24),
        "pooled_projections": torch.randn(1, 40), "txt_ids": torch.zeros(6, 3), "img_ids": torch.randn(16, 3),
        "guidance": torch.full((1,), 3.5), "return_dict": False,
    }  # fmt: skip
    return model.eval(), inputs


def run_flux(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = flux(blocks)
    del inputs["return_dict"]
    return ReadsItsMask(model), {**inputs, "mask": torch.ones(1, 16, dtype=torch.bool)}


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, dict[str, Any]]], int]] = {
    "DiT, 28 blocks": (dit, 28),
    "FLUX, 57 blocks": (flux, 57),
    "FLUX, 57 blocks, captured by running it": (run_flux, 57),
}


def replayed() -> Callable[..., None]:
    """`run_calls` that computes the first time, and gives the same results ever after."""
    computed: dict[int, list[Any]] = {}
    compute = execute.run_calls

    def run(program: Program, registers: list[Any], *options: Any) -> None:
        if id(program) not in computed:
            compute(program, registers, *options)
            computed[id(program)] = list(registers)
        registers[:] = computed[id(program)]

    return run


def milliseconds_per_call(model: nn.Module, inputs: dict[str, Any], policy: str) -> float:
    """Median over all calls of some runs."""
    optimized = dicompile.optimize(model, policy, schedule=TIMESTEPS, mode="eager")
    batch = next(iter(inputs.values())).shape[0]
    times = [torch.full((batch,), float(t)) for t in TIMESTEPS]
    seconds: list[float] = []
    with mock.patch.object(execute, "run_calls", replayed()), torch.no_grad():
        for _ in range(ROUNDS):
            for timestep in times:
                start = time.perf_counter()
                optimized(timestep=timestep, **inputs)
                seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2 * STEPS :])


def table(models: Sequence[str], policies: Sequence[str] = ("none", "fora", "taylorseer")) -> str:
    """One line per model, one column per policy."""
    lines = ["| model | " + " | ".join(policies) + " |", "|---" * (len(policies) + 1) + "|"]
    for name in models:
        make, blocks = MODELS[name]
        torch.manual_seed(0)
        model, inputs = make(blocks)
        cells = [f"{milliseconds_per_call(model, inputs, policy):.3f} ms" for policy in policies]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest model and one policy")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(table(list(MODELS)[:1], ("fora",)) if quick else table(list(MODELS)))
