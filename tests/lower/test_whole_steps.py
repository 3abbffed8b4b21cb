"""Whole steps of deep models on sm_90, counted without a GPU: launches, products, copies and bytes per kind of step.

`tests.lower.whole_steps` lowers them in a process of its own. A change of a pass or of torch may change the figures,
for the better one hopes. They hold for narrow models (width 384, 256 tokens of picture, bfloat16) of real depth.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import pytest

from dicompile.bench.deviceless import Row
from tests.lower.test_triton import from_process
from tests.lower.whole_steps import TORCH

pytestmark = pytest.mark.nightly  # minutes; by day `test_triton` counts single blocks


class Figures(NamedTuple):
    """What one kind of step launches and moves; see `dicompile.bench.deviceless.Row`."""

    triton: int
    library: int
    attention: int
    copies: int
    bytes: int
    least: int

    @property
    def launches(self) -> int:
        """Of kernels, generated or of a library."""
        return self.triton + self.library + self.attention


Step = tuple[str, str, str, str]
"""Model, policy, what is hoisted, kind of step."""

MOST = {"dit": 12, "pixart": 12, "flux": 20}
"""Launches of a reuse step, with everything hoisted."""

FIGURES: dict[Step, Figures] = {
    ("dit", "fora", "all", "full"): Figures(117, 170, 28, 0, 532_218_688, 498_672_448),
    ("dit", "fora", "all", "reuse"): Figures(9, 2, 0, 0, 28_192_576, 28_192_576),
    ("dit", "toca", "all", "full"): Figures(201, 170, 28, 0, 556_073_792, 522_527_552),
    ("dit", "toca", "all", "reuse"): Figures(9, 2, 0, 0, 28_192_576, 28_192_576),
    ("dit", "toca", "all", "partial"): Figures(145, 58, 0, 0, 190_475_776, 168_197_632),
    ("dit", "torch.compile", "off", "full"): Figures(185, 257, 28, 0, 586_503_088, 541_135_712),
    ("dit", "fora", "conditioning", "full"): Figures(233, 257, 28, 0, 597_668_576, 564_003_552),
    ("dit", "fora", "conditioning", "reuse"): Figures(101, 117, 0, 0, 143_015_264, 142_896_096),
    ("pixart", "torch.compile", "off", "full"): Figures(121, 287, 56, 0, 673_265_488, 616_608_592),
    ("pixart", "fora", "conditioning", "full"): Figures(149, 229, 56, 0, 656_441_168, 611_235_664),
    ("pixart", "fora", "conditioning", "reuse"): Figures(13, 5, 0, 0, 41_405_264, 41_401_168),
    ("pixart", "fora", "all", "full"): Figures(145, 226, 56, 0, 654_146_368, 608_944_960),
    ("pixart", "fora", "all", "reuse"): Figures(9, 2, 0, 0, 39_110_464, 39_110_464),
    ("pixart", "toca", "all", "full"): Figures(229, 226, 56, 0, 668_826_432, 623_625_024),
    ("pixart", "toca", "all", "partial"): Figures(313, 114, 28, 0, 293_105_184, 253_265_440),
    ("flux", "torch.compile", "off", "full"): Figures(412, 504, 57, 0, 987_065_286, 902_021_830),
    ("flux", "fora", "conditioning", "full"): Figures(522, 499, 57, 0, 1_000_929_410, 939_203_202),
    ("flux", "fora", "conditioning", "reuse"): Figures(25, 119, 0, 0, 193_574_786, 193_572_738),
    ("flux", "fora", "all", "full"): Figures(460, 420, 57, 0, 898_285_440, 836_561_280),
    ("flux", "fora", "all", "reuse"): Figures(12, 2, 0, 0, 23_874_432, 23_874_432),
    ("flux", "toca", "all", "full"): Figures(460, 420, 57, 0, 898_285_440, 836_561_280),
    ("flux", "toca", "all", "partial"): Figures(401, 192, 0, 19, 391_554_104, 372_589_368),
}


def counted(folder: Path, step: Step) -> Figures:
    """What comes out for a step; what is asked of a model is counted in one process."""
    together = [other for other in FIGURES if other[0] == step[0]]
    wanted = dict.fromkeys(policy if policy == TORCH else f"{policy}/{hoist}" for _, policy, hoist, _ in together)
    return rows(folder, step[0], *wanted)[step]


@functools.cache
def rows(folder: Path, model: str, *wanted: str) -> dict[Step, Figures]:
    found = [Row(**row) for row in from_process(folder, "tests.lower.whole_steps", model, *wanted)]
    return {
        (model, row.policy, row.hoist, row.step): Figures(*(getattr(row, name) for name in Figures._fields))
        for row in found
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.mark.parametrize("step", FIGURES, ids="-".join)
def test_a_step_launches_and_moves_so_much(folder: Path, step: Step) -> None:
    assert counted(folder, step) == FIGURES[step]


@pytest.mark.parametrize("step", FIGURES, ids="-".join)
def test_a_step_moves_at_most_a_third_more_than_it_must(folder: Path, step: Step) -> None:
    found = counted(folder, step)
    assert found.least <= found.bytes <= 1.3 * found.least


@pytest.mark.parametrize("step", [(model, "fora", "all", "reuse") for model in MOST], ids="-".join)
def test_a_reuse_step_is_a_handful_of_launches(folder: Path, step: Step) -> None:
    assert counted(folder, step).launches <= MOST[step[0]]


@pytest.mark.parametrize("model", MOST)
def test_a_full_step_is_fewer_launches_than_torch_compile_makes_of_the_model(folder: Path, model: str) -> None:
    full, uncached = (model, "fora", "all", "full"), (model, TORCH, "off", "full")
    assert counted(folder, full).launches < counted(folder, uncached).launches
