"""The GPU path is Triton, checked without a GPU: how many kernels a variant of a block becomes, and that they compile.

`tests.lower.deviceless` lowers for sm_90 in a process of its own. The figures hold for a DiT of width 384 with 2 x 256
tokens in bfloat16; a change of a pass or of torch may change them, for the better one hopes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


class Figures(NamedTuple):
    """What one call of a variant launches; nothing else runs on the device.

    Attributes:
        triton: launches of generated kernels.
        gemm: products by cuBLAS.
        attention: calls of fused attention.
        received: launches of the hand-written kernel that scores tokens.
        selection: launches of the one that chooses them.
        copies: launches, among those of Triton, that only copy or cast a tensor of the stream's size or more.
    """

    triton: int
    gemm: int
    attention: int = 0
    received: int = 0
    selection: int = 0
    copies: int = 0


FIGURES = {
    "compute": Figures(triton=8, gemm=9, attention=1),
    # Storing values launches and moves nothing more.
    "compute and store": Figures(triton=8, gemm=9, attention=1),
    # The modulation is what is left: 4 small kernels and 4 small products in front of a single one that adds.
    "reuse": Figures(triton=5, gemm=4),
    "reuse two blocks": Figures(triton=8, gemm=8),
    # Besides the kernel that sums over queries: the mean over heads, and stamps that begin with zero.
    "compute, store and score": Figures(triton=10, gemm=9, attention=1, received=1),
    # Choosing is a score of unit length, and one kernel; nothing is sorted, scattered or copied.
    "refresh": Figures(triton=8, gemm=8, selection=1),
    "last refresh": Figures(triton=8, gemm=8, selection=1),
}

TRAFFIC = {
    "compute": 21_206_816,
    "compute and store": 21_206_816,
    "reuse": 5_643_296,
    "reuse two blocks": 10_500_144,
    "compute, store and score": 22_058_784,
}
"""Bytes that everything together reads and writes, where no size is symbolic."""


def from_process(folder: Path, module: str, *arguments: str) -> Any:
    """What a program of this package prints that lowers for a GPU; its caches go to a folder."""
    pytest.importorskip("triton")
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"figures and stubs are for torch 2.13, this is {torch.__version__}")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "TORCHINDUCTOR_"))
    }
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


BY_DAY = ("compute and store", "reuse", "compute, store and score", "refresh")
BY_NIGHT = tuple(name for name in FIGURES if name not in BY_DAY)


@pytest.fixture(
    scope="module",
    params=[pytest.param(BY_DAY, id="by day"), pytest.param(BY_NIGHT, id="by night", marks=pytest.mark.nightly)],
)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = from_process(
        tmp_path_factory.mktemp("inductor"), "tests.lower.deviceless", json.dumps(request.param)
    )
    assert list(found["variants"]) == list(request.param)
    return found


def test_a_variant_is_so_many_triton_kernels_around_library_products(lowered: dict[str, Any]) -> None:
    for name, variant in lowered["variants"].items():
        assert Figures(**variant["calls"], copies=variant["copies"]) == FIGURES[name], name


def test_no_variant_holds_a_map_of_attention(lowered: dict[str, Any]) -> None:
    assert [name for name, variant in lowered["variants"].items() if variant["maps"]] == []


def test_a_variant_moves_so_many_bytes(lowered: dict[str, Any]) -> None:
    moved = {name: variant["bytes"] for name, variant in lowered["variants"].items() if "refresh" not in name}
    assert moved == {name: TRAFFIC[name] for name in moved}


def test_every_kernel_compiles_to_machine_code_for_sm_90(lowered: dict[str, Any]) -> None:
    assert len(lowered["kernels"]) >= max(FIGURES[name].triton for name in lowered["variants"])
    for kernel in lowered["kernels"]:
        assert kernel["cubin_bytes"], kernel["name"]
        assert all(kernel["cubin_bytes"]), kernel["name"]


def test_every_kernel_has_a_configuration_that_spills_no_registers(lowered: dict[str, Any]) -> None:
    """Inductor tries several, and leaves out those that spill more than 16 bytes."""
    for kernel in lowered["kernels"]:
        assert len(kernel["spilled_bytes"]) == len(kernel["cubin_bytes"]), (
            f"the log of ptxas is missing: {kernel['name']}"
        )
        assert 0 in kernel["spilled_bytes"], kernel["name"]


def test_token_count_and_clock_stay_arguments(lowered: dict[str, Any]) -> None:
    for name, variant in lowered["variants"].items():
        assert set(variant["ints"]) == ({"count[1]", "clock[1]"} if "refresh" in name else set()), name
        assert all(variant["ints"].values()), f"an int that no launch of {name} uses was compiled in"


def test_one_compilation_serves_every_token_count(lowered: dict[str, Any]) -> None:
    assert lowered["untrue_assumptions"] == []


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = from_process(tmp_path_factory.mktemp("inductor"), "tests.lower.deviceless_masks")
    return found


MASKED = {
    "sdpa": [
        {"triton": 6, "gemm": 10, "attention": 2},
        {"triton": 9, "gemm": 10, "attention": 2, "log_sum_exp": 1, "entropy": 1},
        {"triton": 10, "gemm": 6, "attention": 1, "log_sum_exp": 1, "entropy": 1, "selection": 2},
    ],
    # Its kernel is one of Inductor's, and one more makes the two numbers that say which keys there are; where a score
    # reads the log-sum-exp, a third one turns that from powers of two.
    "flex": [
        {"triton": 8, "gemm": 10, "attention": 1},
        {"triton": 12, "gemm": 10, "attention": 1, "entropy": 1},
        {"triton": 13, "gemm": 6, "entropy": 1, "selection": 2},
    ],
}
"""Calls of a block of PixArt whose captions have a mask: computed, with a score, and refreshed."""
MASKED_TRAFFIC = {"sdpa": [18_671_904, 19_579_136, 8_754_128], "flex": [17_705_264, 18_175_504, 8_167_648]}


@pytest.mark.nightly
@pytest.mark.parametrize("attention", MASKED)
def test_a_block_with_masks_launches_and_moves_so_much(masked: dict[str, Any], attention: str) -> None:
    assert [variant["calls"] for variant in masked[attention]] == MASKED[attention]
    assert [variant["bytes"] for variant in masked[attention]] == MASKED_TRAFFIC[attention]


@pytest.mark.nightly
def test_flex_attention_copies_nothing_and_spills_nothing(masked: dict[str, Any]) -> None:
    assert not any(variant["copies"] for variant in masked["flex"])
    assert len(masked["kernels"]) == 3
    assert [kernel["spilled_bytes"] for kernel in masked["kernels"]] == [[0]] * 3


@pytest.mark.nightly
def test_one_flex_attention_serves_every_token_count(masked: dict[str, Any]) -> None:
    assert masked["untrue_assumptions"] == []
    assert all(masked["flex"][2]["ints"].values())
