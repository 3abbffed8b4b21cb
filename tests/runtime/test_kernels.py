"""The kernels written by hand: right by Triton's interpreter, and compiled for GPUs that are not there.

What they become is recorded: registers per thread, and bytes of shared memory per block, of which an SM of sm_80 has
163 KiB and one of sm_90 227. Both programs run in processes of their own; see `interpreted` and `handwritten`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

FIGURES = {
    "received d=72 bfloat16 sm_80": (98, 50176),
    "received d=72 bfloat16 sm_90": (80, 67584),
    "received d=72 float32 sm_80": (72, 33280),
    "received d=72 float32 sm_90": (64, 33280),
    "received d=128 float16 sm_80": (98, 50176),
    "received d=128 float16 sm_90": (80, 67584),
    "received d=256 bfloat16 sm_80": (64, 33024),
    "received d=256 bfloat16 sm_90": (56, 33024),
    "received d=72 bfloat16 boolean sm_80": (106, 50176),
    "received d=72 bfloat16 boolean sm_90": (102, 67584),
    "log_sum_exp d=72 float32 sm_80": (72, 32768),
    "log_sum_exp d=72 float32 sm_90": (72, 32768),
    "log_sum_exp d=128 bfloat16 sm_80": (96, 50176),
    "log_sum_exp d=128 bfloat16 sm_90": (58, 65536),
    "log_sum_exp d=72 bfloat16 boolean sm_80": (111, 50176),
    "log_sum_exp d=72 bfloat16 boolean sm_90": (69, 65536),
    "entropy d=72 bfloat16 additive sm_80": (208, 49152),
    "entropy d=72 bfloat16 additive sm_90": (214, 98304),
    "entropy d=72 float32 boolean sm_80": (150, 32768),
    "entropy d=72 float32 boolean sm_90": (152, 32768),
    "selection sm_80": (191, 512),
    "selection sm_90": (147, 512),
    "selection aged sm_80": (226, 512),
    "selection aged sm_90": (160, 512),
    "selection aged, grid sm_80": (152, 512),
    "selection aged, grid sm_90": (140, 512),
    "selection aged, film sm_80": (128, 512),
    "selection aged, film sm_90": (136, 512),
}
"""Registers, and bytes of shared memory."""


SPILLS_WITH_TRITON_3_8 = {"log_sum_exp d=72 float32 sm_90", "entropy d=72 float32 boolean sm_90"}
"""Products in float32, which take no tensor cores; see docs/benchmarks.md."""


def program(name: str, **environment: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", f"tests.runtime.{name}"]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    if torch.__version__ < "2.12":
        pytest.skip("wrap_triton of torch 2.11 takes no kernel that is interpreted")
    return program("interpreted", TRITON_INTERPRET="1")


def test_scores_are_those_of_float64_in_every_shape_dtype_and_layout(interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted["scores"]
    assert {name: error for name, error in found.items() if not error < 1e-6} == {}
    assert len(found) == 18


def test_selected_tokens_are_those_of_a_sort(interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted["selections"]
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert len(found) == 10


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = str(tmp_path_factory.mktemp("triton"))
    return program("handwritten", TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=folder)


@pytest.mark.nightly
def test_no_kernel_spills_registers_on_sm_80_or_sm_90(compiled: dict[str, dict[str, int]]) -> None:
    import triton

    spilling = {name for name, kernel in compiled.items() if kernel["spilled"]}
    assert spilling <= (set() if triton.__version__.startswith("3.7.") else SPILLS_WITH_TRITON_3_8)


@pytest.mark.nightly
def test_what_a_kernel_takes_is_recorded(compiled: dict[str, dict[str, int]]) -> None:
    import triton

    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"recorded with triton 3.7, this is {triton.__version__}")
    assert {name: (kernel["registers"], kernel["shared"]) for name, kernel in compiled.items()} == FIGURES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_the_log_sum_exp_of_every_fused_attention_is_the_one_of_the_logits(backend: str, dtype: torch.dtype) -> None:
    from tests.ops.test_attention_scores import attention_map

    if dtype == torch.float32 and backend != "EFFICIENT_ATTENTION":
        pytest.skip("does not take float32")
    aten = torch.ops.aten
    query, key, value = (torch.randn(2, 4, n, 64, device="cuda", dtype=dtype) for n in (300, 333, 333))
    results = {
        "FLASH_ATTENTION": lambda: aten._scaled_dot_product_flash_attention(query, key, value),
        "EFFICIENT_ATTENTION": lambda: aten._scaled_dot_product_efficient_attention(query, key, value, None, True),
        "CUDNN_ATTENTION": lambda: aten._scaled_dot_product_cudnn_attention(query, key, value, None, True),
    }[backend]()
    lse = results[1].squeeze(-1) if results[1].ndim == 4 else results[1]
    received = torch.ops.dicompile.attention_received_cuda_triton(query, key, lse=lse)
    alone = torch.ops.dicompile.attention_received_cuda_triton(query, key)
    expected = attention_map(query.cpu(), key.cpu()).sum(1).float().cuda()
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(received, expected, rtol=1e-3, atol=1e-3)
