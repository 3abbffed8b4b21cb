"""Recorded sampling runs of the research codes, replayed step by step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.golden_plugin import make, make_eager

CASES = (
    "dit_baseline",
    "dit_duca_attention",
    "dit_duca_kvnorm",
    "dit_fora_n3",
    "dit_l2c_random_router",
    "dit_taylorseer_i3_o2",
    "dit_toca_attention",
    "flux_baseline",
    "flux_toca_attention",
    "pixart_baseline",
    "pixart_toca_attention",
)
COMPILED = ()
"""Compiled always; all cases are compiled nightly, and tests/lower compiles what is in them always."""


@pytest.fixture(scope="module")
def replay_check(shared: Path) -> ModuleType:
    """The script that builds models, feeds recorded inputs and compares; it belongs to the traces."""
    spec = importlib.util.spec_from_file_location("replay_check", shared / "golden" / "replay_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the recording; the order of float32 sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("case", "make_model"),
    [
        *(
            pytest.param(
                case,
                make_eager,
                id=f"{case}-rewritten graphs",
                marks=[pytest.mark.nightly] if "baseline" in case else [],
            )
            for case in CASES
        ),
        *(pytest.param(case, make, id=f"{case}-compiled") for case in COMPILED),
        *(
            pytest.param(case, make, id=f"{case}-compiled", marks=pytest.mark.nightly)
            for case in CASES
            if case not in COMPILED
        ),
    ],
)
def test_every_step_equals_the_recording(
    case: str, make_model: Callable[..., Any], shared: Path, replay_check: ModuleType
) -> None:
    meta = replay_check.load_meta(str(shared / "golden" / "public" / case))
    result = replay_check.run_sampling(meta, make_model)
    assert len(result["steps"]) == meta["num_steps"]
    assert [step for step in result["steps"] if not step["max_abs"] <= result["tol"]] == []
    assert result["sets_equal"] == result["sets_total"]
    assert (result["sets_total"] > 0) == ("toca" in case or "duca" in case)
