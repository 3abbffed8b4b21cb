"""What whole steps of deep models launch and move on an H200, counted without one.

Every distinct variant of a step's program is lowered once, and counts as often as the program calls it. Models are
narrow and have their real depth. ``python -m tests.lower.whole_steps dit fora/all toca/all`` prints JSON: a row for the
first step of every kind, besides those of ``torch.compile``, which gets the whole model as one graph.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from dicompile.analysis import analyse
from dicompile.capture import Capture, capture_model
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Hoist, Pieces, Program, ProgramBuilder, VariantCache
from dicompile.passes import Segment, outline
from dicompile.plan import TimestepSchedule, make_plan
from dicompile.policies import get_policy
from tests.lower.deviceless import Lowered, Lowering, dit, move_to_cuda, pretended_cuda

STEPS = 8
TORCH = "torch.compile"
BFLOAT16 = torch.bfloat16


BY_HAND = ("received", "entropy", "log_sum_exp")
"""Kernels of `dicompile.runtime.kernels`."""


@dataclass(frozen=True)
class Row:
    """One kind of step.

    Attributes:
        policy: its name, or `TORCH` for the uncached model.
        hoist: what is computed outside of the steps.
        step: kind of step.
        triton: launches of kernels in Triton, generated or by hand.
        library: products and convolutions by cuBLAS and cuDNN.
        attention: calls of fused attention.
        copies: launches, among those of Triton, that only copy or cast a tensor of the stream's size or more.
        bytes: bytes that everything reads and writes.
        least: the fewest of them, see `tests.lower.deviceless.least_bytes`.
    """

    policy: str
    hoist: str
    step: str
    triton: int
    library: int
    attention: int
    copies: int
    bytes: int
    least: int

    @classmethod
    def of(cls, policy: str, hoist: str, step: str, calls: list[Lowered]) -> Row:
        kinds = sum((Counter(call.calls) for call in calls), Counter())
        triton = sum(kinds.pop(name, 0) for name in ("triton", *BY_HAND))
        attention = kinds.pop("attention", 0)
        assert set(kinds) <= {"gemm", "convolution"}, f"unknown calls: {kinds}"
        copies, moved, least = (sum(getattr(call, name) for call in calls) for name in ("copies", "bytes", "least"))
        return cls(policy, hoist, step, triton, kinds.total(), attention, copies, moved, least)


class Steps:
    """Steps of one captured model; whatever they share is lowered once.

    Args:
        capture: the model, whose values are on the pretended device.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.structure = capture, analyse(capture)
        self._stream = min(torch.Size(site.shape).numel() for site in self.structure.sites)
        self._lowered: dict[int, tuple[Segment, Lowered]] = {}

    def rows(self, policy: str, hoist: Hoist) -> Iterator[Row]:
        """One row for the first step of every kind."""
        cache = VariantCache(Backend("eager"), Settings(), DebugFolder(None))
        builder = ProgramBuilder(Pieces(self.capture, self.structure, hoist), cache)
        plan = make_plan(self.structure, get_policy(policy), TimestepSchedule.of(STEPS))
        for kind in dict.fromkeys(step.kind for step in plan.steps):
            program = builder.program(next(step for step in plan.steps if step.kind == kind))
            yield Row.of(policy, hoist.value, kind, self._calls(program, cache))

    def uncached(self) -> Row:
        """The whole model as one graph, as torch.compile gets it."""
        nodes = [node for node in self.capture.graph.nodes if node.op == "call_function"]
        whole = outline(self.capture, self.structure, nodes, ()).segment
        return Row.of(TORCH, Hoist.NOTHING.value, "full", [Lowering(self._stream).lower(whole)])

    def _calls(self, program: Program, cache: VariantCache) -> list[Lowered]:
        segments = {id(variant.function): variant.segment for variant in cache.variants}
        return [self._lower(segments[id(call.function)]) for call in program.calls]

    def _lower(self, segment: Segment) -> Lowered:
        if id(segment) not in self._lowered:
            self._lowered[id(segment)] = segment, Lowering(self._stream).lower(segment)
        return self._lowered[id(segment)][1]


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
            rows += [steps.uncached()] if policy == TORCH else steps.rows(policy, Hoist(hoist))
    json.dump([asdict(row) for row in rows], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
