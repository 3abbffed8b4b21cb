"""How much of the weights a step brings to the device, under each policy, where they are offloaded part by part.

    python examples/offload.py
    torchrun --nproc-per-node 2 examples/offload.py --fsdp

A small FLUX (4 double and 8 single blocks) is offloaded as `enable_sequential_cpu_offload` does it, from CPU to CPU, or
sharded over ranks: nothing is timed, and what is brought is counted. Shares are of all weights, for one call; without
dicompile every call brings all of them.
"""

from __future__ import annotations

import argparse
from typing import Any

import accelerate
import torch
from diffusers import FluxTransformer2DModel
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import dicompile

POLICIES = ("none", "toca-flux", "duca-flux", "fora", "taylorseer", "taylorseer-lite")
TOKENS, TEXT = 64, 16


def flux() -> tuple[FluxTransformer2DModel, dict[str, Any]]:
    """A FLUX of width 256, and what it is called with besides the timestep."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=8, num_attention_heads=4, attention_head_dim=64,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    edge = torch.arange(TOKENS) % 8
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.stack([torch.zeros(TOKENS), torch.arange(TOKENS) // 8, edge], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model.eval(), inputs


def shard(model: nn.Module) -> None:
    """Shard a FLUX block by block."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block)
    fully_shard(model)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="*", default=POLICIES, help=" ".join(POLICIES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over ranks, under torchrun")
    options = parser.parse_args()
    if options.fsdp:
        distributed.init_process_group("gloo")
    timesteps = [round(999 - i * 999 / options.steps) for i in range(options.steps)]
    lines = ["| policy | brought for a call of each kind | on average |\n|---|---|---|"]
    for policy in options.policies:
        model, inputs = flux()
        total = sum(weight.nbytes for weight in model.parameters())
        if options.fsdp:
            shard(model)
        else:
            accelerate.cpu_offload(model, "cpu")
        cached = dicompile.optimize(model, policy, schedule=timesteps, backend="eager", hoist="all")
        for time in timesteps:
            cached(**inputs, timestep=torch.tensor([time / 1000]))
        report = dicompile.report(cached)
        share = {kind: report.fetched_bytes[kind] / count / total for kind, count in report.kinds.items()}
        kinds = ", ".join(f"{report.kinds[kind]} {kind}: {part:.0%}" for kind, part in share.items())
        lines.append(f"| {policy} | {kinds} | {report.fetched_bytes.total() / options.steps / total:.0%} |")
    if not options.fsdp or distributed.get_rank() == 0:
        print("\n".join(lines))
    if options.fsdp:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
