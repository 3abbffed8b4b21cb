"""Lower a block of PixArt whose captions have a mask for an H200 on a machine without a GPU, and print what came out.

Once with torch's attention, once with ``attention="flex"``; see `tests.lower.deviceless`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

import dicompile.runtime.kernels  # scores by Triton
from dicompile.analysis import ModelStructure, analyse
from dicompile.bench.deviceless import Lowered, Lowering, move_to_cuda, pretended_cuda
from dicompile.capture import Capture, capture_model
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Pieces, ProgramBuilder, VariantCache
from dicompile.plan import TimestepSchedule, make_plan
from dicompile.policies import NoCache, ToCaPixArt
from tests.lower.deviceless import BATCH, TOKENS, compile_kernel, untrue_assumptions

HEADS, HEAD_WIDTH, WORDS, LAYERS = 4, 72, 120, 2
WIDTH = HEADS * HEAD_WIDTH


def pixart() -> Capture:
    """A narrow PixArt of diffusers in bfloat16, of which no weight ever exists."""
    from diffusers import PixArtTransformer2DModel

    size = 2 * round(TOKENS**0.5)
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, in_channels=4, out_channels=8, num_layers=LAYERS,
            sample_size=size, patch_size=2, cross_attention_dim=WIDTH, caption_channels=256,
            use_additional_conditions=False,
        ).to(torch.bfloat16)  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(BATCH, 4, size, size, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.empty(BATCH, WORDS, 256, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.empty(BATCH, WORDS, dtype=torch.bfloat16),
            "timestep": torch.empty(BATCH, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        return capture_model(model.eval(), inputs)


def lowered(capture: Capture, structure: ModelStructure, attention: str, lowering: Lowering) -> Iterator[Lowered]:
    """The last block: computed, computed with a score, and refreshed."""
    cache = VariantCache(Backend("eager", attention=attention), Settings(), DebugFolder(None))
    builder = ProgramBuilder(Pieces(capture, structure), cache)
    none = make_plan(structure, NoCache(), TimestepSchedule.of(1))
    toca = make_plan(structure, ToCaPixArt(), TimestepSchedule.of(8))
    partial = next(index for index, step in enumerate(toca.steps) if step.kind == "partial")
    for step in (none.steps[0], toca.steps[partial - 1], toca.steps[partial]):
        call = next(call for call in builder.program(step).calls if call.name.startswith(f"block{LAYERS - 1}:"))
        yield lowering.lower(next(v.segment for v in cache.variants if v.function is call.function))


def main() -> None:
    assert dicompile.runtime.kernels
    capture = pixart()
    with pretended_cuda():
        move_to_cuda(capture)
        structure, lowering = analyse(capture), Lowering(BATCH * TOKENS * WIDTH, TOKENS)
        found = {way: list(map(asdict, lowered(capture, structure, way, lowering))) for way in ("sdpa", "flex")}
        flex = [compile_kernel(name, source) for name, source in lowering.kernels.values() if "flex" in name]
    kernels = list(map(asdict, flex))
    json.dump({**found, "kernels": kernels, "untrue_assumptions": untrue_assumptions(capture)}, sys.stdout)


if __name__ == "__main__":
    main()
