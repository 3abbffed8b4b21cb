"""Compile the hand-written kernels for GPUs that are not there, and print what the assembler says as JSON.

Triton compiles to cubins with the ptxas of its wheel. Whoever is asked for the device has to be replaced, which must
not leak into other tests, so this is a program: ``TRITON_DUMP_PTXAS_LOG=1 python -m tests.runtime.handwritten``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dicompile.runtime.kernels import attention_scores, select_tokens

TARGETS = {80: 166_912, 90: 232_448}
"""Shared memory that a block may ask for, by architecture."""


class Case(NamedTuple):
    """Shapes of one call: b, h, n, m, d, and what the model computes in.

    Attributes:
        kernel: name.
        shape: see above.
        dtype: name.
        mask: "none", "boolean" or "additive".
    """

    kernel: str
    shape: tuple[int, int, int, int, int]
    dtype: str
    mask: str = "none"

    def __str__(self) -> str:
        return f"{self.kernel} d={self.shape[-1]} {self.dtype}" + (f" {self.mask}" if self.mask != "none" else "")


DIT, PIXART = (2, 16, 256, 256, 72), (2, 16, 4096, 120, 72)
FLUX, WIDE = (1, 24, 4608, 4608, 128), (1, 8, 1024, 1024, 256)
CASES = (
    Case("received", DIT, "bfloat16"),
    Case("received", DIT, "float32"),
    Case("received", FLUX, "float16"),
    Case("received", WIDE, "bfloat16"),
    Case("received", PIXART, "bfloat16", "boolean"),
    Case("log_sum_exp", DIT, "float32"),
    Case("log_sum_exp", FLUX, "bfloat16"),
    Case("log_sum_exp", PIXART, "bfloat16", "boolean"),
    Case("entropy", PIXART, "bfloat16", "additive"),
    Case("entropy", PIXART, "float32", "boolean"),
)


SELECTIONS: dict[str, tuple[int, float, list[int], int]] = {
    "selection": (256, 0.0, [], 0),
    "selection aged": (4608, 0.25, [], 0),
    "selection aged, grid": (4096, 0.25, [64, 64], 4),
    "selection aged, film": (8192, 0.25, [8, 32, 32], 2),
}
"""Tokens, weight of age, grid, and edge of its cells."""


def scoring(case: Case) -> dict[str, Any]:
    """Arguments of a kernel of attention."""
    batch, heads, queries, keys, width = case.shape
    dtype = getattr(torch, case.dtype)
    query = torch.empty(batch, queries, heads, width, dtype=dtype, device="meta").transpose(1, 2)
    key = torch.empty(batch, keys, heads, width, dtype=dtype, device="meta").transpose(1, 2)
    masks = {"none": None, "boolean": torch.bool, "additive": dtype}
    mask = None if case.mask == "none" else torch.empty(batch, 1, 1, keys, dtype=masks[case.mask], device="meta")
    lse = torch.empty(batch, heads, queries, device="meta")
    tiles = attention_scores.tiles_for(width, dtype)
    arguments: dict[str, Any] = attention_scores.launch_arguments(query, key, mask, None, False, lse, tiles)
    if case.kernel != "log_sum_exp":
        arguments["result"] = lse
    if case.kernel == "entropy":
        arguments |= {"SHARE": 0.5 / heads, "EPSILON": 1e-7}
    return arguments


def selecting(tokens: int, age_weight: float, grid: list[int], cell: int) -> dict[str, Any]:
    """Arguments of the kernel that selects tokens."""
    score = torch.empty(2, tokens, device="meta")
    chosen, places = (torch.empty(2, n, dtype=torch.int64, device="meta") for n in (tokens // 4, tokens))
    stamp, stamped = (torch.empty(2, tokens, dtype=torch.int32, device="meta") for _ in range(2))
    given = score, stamp if age_weight else None, tokens // 4, 3, age_weight, grid, cell, 0.6
    return {
        **select_tokens.launch_arguments(*given), "chosen": chosen, "places": places, "stamped": stamped
    }  # fmt: skip


def compiled(function: Any, arguments: dict[str, Any], target: int) -> dict[str, int]:
    """Registers per thread, bytes of shared memory per block, and bytes that spill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    given = {name: MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target, 32), get_current_device=lambda: 0,
        get_current_stream=lambda _=None: 0,
        utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": TARGETS[target]}),
    )  # fmt: skip
    function.device_caches.clear()
    with patch.object(triton.runtime.driver, "_active", driver), contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = function.warmup(grid=(1,), **given)
    used = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert used is not None
    assert spills is not None
    assert kernel.asm["cubin"]
    return {
        "registers": int(used[1]), "shared": kernel.metadata.shared, "spilled": int(spills[1]) + int(spills[2]),
    }  # fmt: skip


def main() -> None:
    calls = {str(case): (getattr(attention_scores, case.kernel), scoring(case)) for case in CASES}
    calls |= {name: (select_tokens.selection, selecting(*case)) for name, case in SELECTIONS.items()}
    found = {f"{name} sm_{target}": compiled(*call, target) for name, call in calls.items() for target in TARGETS}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
