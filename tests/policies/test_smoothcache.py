"""SmoothCache: the published schedules, the rule that makes them, and what calibration runs feed into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dicompile
from dicompile.errors import InvalidPolicy, InvalidRecording, PolicyDoesNotFit
from dicompile.learn.graph import learnable
from dicompile.plan import TimestepSchedule, What, make_plan
from dicompile.policies import MagCache, SmoothCache, smooth_schedule
from tests.capture.captured import structure
from tests.models import optimized, plain_dit, run, timesteps

PUBLISHED = [int(bit) for bit in "10001001001010101010101010101010101010101010101011"]
"""Of both kinds, in the file of SmoothCache for DiT-XL/2 in 50 steps with threshold 0.18."""


def scanned(rows: list[list[float]], threshold: float, steps: int) -> list[int]:
    """The loop of its calibration helper: from the longest lag to the shortest, then on behind what is skipped."""
    schedule = [1] * steps
    i = 0
    while i < steps:
        for row in range(len(rows) - 1, -1, -1):
            if i < len(rows[row]) and rows[row][i] <= threshold:
                for skipped in range(i + 1, min(i + row + 2, steps)):
                    schedule[skipped] = 0
                i += row + 2
                break
        else:
            i += 1
    schedule[-1] = 1
    return schedule


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(1, 4), st.floats(0, 1), st.data())
def test_a_schedule_is_what_the_reference_code_scans(steps: int, lags: int, limit: float, data: st.DataObject) -> None:
    rows = [
        data.draw(st.lists(st.floats(0, 1), min_size=max(steps - lag, 0), max_size=max(steps - lag, 0)))
        for lag in range(1, lags + 1)
    ]
    assert smooth_schedule({"mlp": rows}, limit) == {"mlp": scanned(rows, limit, steps)}


def test_the_published_file_is_its_plan(tmp_path: Path) -> None:
    file = tmp_path / "50-N-3-threshold-0.18.json"
    file.write_text(json.dumps({"attn": PUBLISHED, "mlp": PUBLISHED}))
    plan = make_plan(structure("plain_dit"), SmoothCache(file), TimestepSchedule.of(50))
    assert [int(step.kind == "full") for step in plan.steps] == PUBLISHED


def test_kinds_are_reused_apart_and_values_are_gated_anew() -> None:
    """Against the modules, of which hooks keep the outputs, before the gates."""
    sample, times = plain_dit(layers=2), timesteps(6)
    schedule = {"attn1": [1, 0, 0, 1, 0, 1], "mlp": [1, 1, 0, 0, 1, 1]}
    found = run(optimized(sample, SmoothCache(schedule), 6), sample.inputs, times)
    kept: dict[Any, Any] = {}
    calls = {"step": -1}

    def begin(*_: Any) -> None:
        calls["step"] += 1

    def hook(kind: str) -> Any:
        def recall(module: Any, _: Any, fresh: torch.Tensor) -> torch.Tensor:
            if schedule[kind][calls["step"]]:
                kept[module] = fresh
            return kept[module]

        return recall

    sample.model.register_forward_pre_hook(begin)
    for block in sample.model.blocks:
        block.proj.register_forward_hook(hook("attn1"))
        block.mlp.register_forward_hook(hook("mlp"))
    for ours, theirs in zip(found, run(sample.model, sample.inputs, times), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_file_of_single_branches_is_one_of_a_router(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({f"{name}-{i}": [1, i % 2, 1] for i in range(3) for name in ("attn", "mlp")}))
    plan = make_plan(structure("plain_dit"), SmoothCache(file), TimestepSchedule.of(3))
    assert [step.kind for step in plan.steps] == ["full", "mixed", "full"]


def test_a_schedule_holds_for_its_number_of_steps() -> None:
    with pytest.raises(PolicyDoesNotFit, match="has 50 steps, the schedule 20"):
        make_plan(structure("plain_dit"), SmoothCache({"mlp": PUBLISHED}), TimestepSchedule.of(20))


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        ({}, "missing"),
        ({"mlp": [1, 0], "attn": [1]}, "different lengths"),
        ({"gate": [1, 0]}, "'gate' is no kind of branch"),
        ({"mlp": [1, 2]}, "'mlp' is not a list of 0 and 1"),
        ({"mlp": []}, "'mlp' is not a list of 0 and 1"),
        ([1, 0], "not an object"),
        (None, ""),
    ],
)
def test_something_else_is_refused(schedule: Any, why: str, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(schedule) if schedule is not None else "{")
    with pytest.raises(InvalidPolicy, match="a schedule") as caught:
        SmoothCache(file)
    assert why in str(caught.value.why)


# From calibration runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[dicompile.Recording, torch.Tensor, torch.Tensor]:
    """A recording, and the values themselves: of all sites, [steps, sites, n], and of the stack, [steps, n]."""
    sample, times = plain_dit(layers=2), timesteps(5)
    inputs = [{**sample.inputs, "x": torch.randn(4, 4, 16, 16), "t": torch.full((4,), time)} for time in times]
    model = dicompile.optimize(sample.model, "none", schedule=times, backend="eager")
    with dicompile.calibrate(model) as recording:
        for each in inputs:
            model(**each)
    sites, blocks = (
        learnable(sample.model, inputs[0]),
        learnable(sample.model, inputs[0], level="block", what=What.UPDATE),
    )
    values = torch.stack([torch.stack([site.flatten() for site in sites.record(each)[1]]) for each in inputs])
    stack = torch.stack([torch.stack(blocks.record(each)[1]).sum(0).flatten() for each in inputs])
    return recording, values, stack


def test_drifts_are_distances_of_values(recorded: Any) -> None:
    recording, values, _ = recorded
    drifts = recording.drifts(lags=2)
    assert [len(lag) for lag in drifts["mlp"]] == [4, 3]
    for kind, places in {"self-attention": [0, 2], "mlp": [1, 3]}.items():
        for lag in (1, 2):
            own = values[:, places]
            distance = (own[:-lag] - own[lag:]).norm(dim=-1) / own[lag:].norm(dim=-1)
            assert drifts[kind][lag - 1] == pytest.approx(distance.mean(1).tolist(), rel=0.1)
    policy = SmoothCache(smooth_schedule(drifts, threshold=2.0))
    assert {rule.sites[0] for rule in policy.rules} == {"self-attention", "mlp"}


def test_magnitudes_are_ratios_of_norms_of_what_the_stack_adds(recorded: Any) -> None:
    recording, _, stack = recorded
    norms = stack.norm(dim=1)
    ratios = recording.magnitudes()
    assert ratios[0] == 1.0
    assert list(ratios[1:]) == pytest.approx((norms[1:] / norms[:-1]).tolist(), rel=0.05)
    assert MagCache(ratios).cadence.magnitudes.ratios == ratios
    with pytest.raises(InvalidRecording, match="no update of the stack"):
        dicompile.Recording(recording.facts).magnitudes()
