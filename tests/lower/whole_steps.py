"""What whole steps of deep models launch and move on an H200, counted without one.

Every distinct variant of a step's program is lowered once, and counts as often as the program calls it. Models are
narrow and have their real depth. ``python -m tests.lower.whole_steps dit fora/all toca/all`` prints JSON: a row for the
first step of every kind, besides those of ``torch.compile``, which gets the whole model as one graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from dicompile.bench.deviceless import Row, Steps, move_to_cuda, pretended_cuda
from dicompile.capture import Capture, capture_model
from dicompile.lower import Hoist
from dicompile.plan import TimestepSchedule, make_plan
from dicompile.policies import get_policy
from tests.lower.deviceless import dit

STEPS = 8
TORCH = "torch.compile"
BFLOAT16 = torch.bfloat16


def pixart(layers: int) -> Capture:
    """A narrow PixArt in bfloat16, of which no weight ever exists."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=layers,
            cross_attention_dim=384, sample_size=32, patch_size=2, caption_channels=128, norm_type="ada_norm_single",
            use_additional_conditions=False,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(2, 4, 32, 32, dtype=BFLOAT16),
            "encoder_hidden_states": torch.empty(2, 64, 128, dtype=BFLOAT16),
            "timestep": torch.empty(2, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        return capture_model(model.to(BFLOAT16).eval(), inputs)


def flux(double: int, single: int) -> Capture:
    """A narrow FLUX.1 in bfloat16, of which no weight ever exists."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=64,
            num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=96, axes_dims_rope=[16, 24, 24],
            guidance_embeds=True,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(1, 256, 64, dtype=BFLOAT16),
            "encoder_hidden_states": torch.empty(1, 64, 128, dtype=BFLOAT16),
            "pooled_projections": torch.empty(1, 96, dtype=BFLOAT16),
            "timestep": torch.empty(1, dtype=BFLOAT16),
            "img_ids": torch.empty(256, 3, dtype=BFLOAT16),
            "txt_ids": torch.empty(64, 3, dtype=BFLOAT16),
            "guidance": torch.empty(1, dtype=torch.float32),
            "return_dict": False,
        }
        return capture_model(model.to(BFLOAT16).eval(), inputs)


MODELS: dict[str, Callable[[], Capture]] = {
    "dit": lambda: dit(28),
    "pixart": lambda: pixart(28),
    "flux": lambda: flux(19, 38),
}


def main(model: str, *wanted: str) -> None:
    capture = MODELS[model]()
    with pretended_cuda():
        move_to_cuda(capture)
        steps, rows = Steps(capture), list[Row]()
        for item in wanted:
            policy, _, hoist = item.partition("/")
            if policy == TORCH:
                rows.append(steps.uncached())
                continue
            plan = make_plan(steps.structure, get_policy(policy), TimestepSchedule.of(STEPS))
            rows += steps.rows(plan, policy, Hoist(hoist))
    json.dump([asdict(row) for row in rows], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
