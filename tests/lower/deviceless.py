"""Lower the variants of a DiT block for an H200 on a machine without a GPU, and print what came out as JSON.

`dicompile.bench.deviceless` makes torch believe in a device, and Triton compiles what Inductor then generates to cubins
with the ptxas of its wheel. The belief must not leak into other tests, so this is a program that runs in a process of
its own: ``TRITON_DUMP_PTXAS_LOG=1 python -m tests.lower.deviceless '["compute"]'``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import sympy
import torch
from torch._inductor.codecache import PyCodeCache

from dicompile.analysis import ModelStructure, analyse
from dicompile.bench.deviceless import Lowering, move_to_cuda, pretended_cuda
from dicompile.capture import Capture, capture_model
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Pieces, Program, ProgramBuilder, Variant, VariantCache
from dicompile.plan import COMPUTE, REUSE, Plan, TimestepSchedule, make_plan, plan_actions
from dicompile.policies import FORA, NoCache, ToCa

BATCH, TOKENS, HEADS, HEAD_WIDTH, LAYERS = 2, 256, 6, 64, 3
WIDTH = HEADS * HEAD_WIDTH


@dataclass
class Kernel:
    """A Triton kernel: one entry per configuration that autotuning would try.

    Attributes:
        name: name at its first launch.
        cubin_bytes: size of the machine code.
        spilled_bytes: bytes that ptxas stores and loads because registers ran out; empty if its log could not be read.
    """

    name: str
    cubin_bytes: list[int] = field(default_factory=list)
    spilled_bytes: list[int] = field(default_factory=list)


def dit(layers: int) -> Capture:
    """A narrow class-conditional DiT of diffusers in bfloat16, of which no weight ever exists."""
    from diffusers import DiTTransformer2DModel

    size = 2 * round(TOKENS**0.5)
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, in_channels=4, out_channels=8, num_layers=layers,
            sample_size=size, patch_size=2, attention_bias=True, activation_fn="gelu-approximate",
            num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(BATCH, 4, size, size, dtype=torch.bfloat16),
            "timestep": torch.empty(BATCH, dtype=torch.int64),
            "class_labels": torch.empty(BATCH, dtype=torch.int64),
            "return_dict": False,
        }
        return capture_model(model.to(torch.bfloat16).eval(), inputs)


def find_variants(capture: Capture) -> dict[str, Variant]:
    """Every variant of a block in the middle that the policies need, not compiled yet."""
    structure = analyse(capture)
    cache = VariantCache(Backend("eager"), Settings(), DebugFolder(None))
    builder = ProgramBuilder(Pieces(capture, structure), cache)

    def find(plan: Plan, step: int, piece: str) -> Variant:
        return _variant_of(builder.program(plan.steps[step]), piece, cache.variants)

    none = make_plan(structure, NoCache(), TimestepSchedule.of(1))
    fora = make_plan(structure, FORA(interval=2), TimestepSchedule.of(3))
    toca = make_plan(structure, ToCa(), TimestepSchedule.of(6))
    partial = [index for index, step in enumerate(toca.steps) if step.kind == "partial"]
    return {
        "compute": find(none, 0, "block1"),
        "compute and store": find(fora, 0, "block1"),
        "reuse": find(_reusing_one_block(structure), 1, "block1"),
        "reuse two blocks": find(fora, 1, "blocks0-1"),
        "compute, store and score": find(toca, partial[0] - 1, "block1"),
        "refresh": find(toca, partial[0], "block1"),
        "last refresh": find(toca, partial[-1], "block1"),
    }


def _reusing_one_block(structure: ModelStructure) -> Plan:
    rows = [tuple(COMPUTE for _ in structure.sites), tuple(REUSE if s.block == 1 else COMPUTE for s in structure.sites)]
    return plan_actions(structure, rows, TimestepSchedule.of(2), "reuse block 1")


def _variant_of(program: Program, piece: str, known: Iterable[Variant]) -> Variant:
    call = next(call for call in program.calls if call.name.startswith(f"{piece}:"))
    return next(variant for variant in known if variant.function is call.function)


def compile_kernel(name: str, source: str) -> Kernel:
    """Compile a kernel in every configuration, and read what ptxas says about it."""
    autotuner, kernel = getattr(PyCodeCache.load(source), name), Kernel(name)
    for configuration in autotuner.configs:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = autotuner._precompile_config(configuration).kernel
        kernel.cubin_bytes.append(len(compiled.asm["cubin"]))
        stores = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        kernel.spilled_bytes += [int(stored) + int(loaded) for stored, loaded in stores]
    return kernel


def untrue_assumptions(capture: Capture) -> list[str]:
    """What was assumed of the symbolic ints and does not hold for every count of fewer than all tokens."""
    assert capture.fake_mode.shape_env is not None
    return [
        f"{guard.expr} fails for {value}"
        for guard in capture.fake_mode.shape_env.guards
        for value in range(1, TOKENS)
        if guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, value)) != sympy.true
    ]


def main(names: list[str]) -> None:
    capture = dit(LAYERS)
    with pretended_cuda():
        move_to_cuda(capture)
        lowering = Lowering(BATCH * TOKENS * WIDTH, TOKENS)
        found = find_variants(capture)
        variants = {name: asdict(lowering.lower(found[name].segment)) for name in names}
        kernels = [asdict(compile_kernel(name, source)) for name, source in lowering.kernels.values()]
    printed = {"variants": variants, "kernels": kernels, "untrue_assumptions": untrue_assumptions(capture)}
    json.dump(printed, sys.stdout)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
