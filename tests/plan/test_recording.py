"""Plans of a calibration: everything computed and stored until the next step, and what is tried beside it."""

from __future__ import annotations

from typing import Literal

import pytest

from dicompile.analysis import SiteKind
from dicompile.plan import TimestepSchedule, recording_plan, reusing_plan
from tests.plan.toys import toy

TOY = toy([["self-attention", "mlp"], ["self-attention", "mlp"]], spans=True)


def kinds(slots: frozenset[object]) -> list[tuple[str, int]]:
    return sorted((slot.kind.value, int(slot.site)) for slot in slots)  # type: ignore[attr-defined]


def test_every_site_and_the_stack_are_computed_and_stored() -> None:
    plan = recording_plan(TOY, TimestepSchedule(3))
    stored = [int(site.id) for site in TOY.everything if site.kind is not SiteKind.BLOCK]
    assert plan.flops == 3 * TOY.flops
    for step in plan.steps:
        assert all(site.action.is_full and not site.reads for site in step.sites)
        assert kinds(step.live) == [("value", number) for number in stored]
    assert plan.cache_bytes == len(stored) * 1024


@pytest.mark.parametrize("kind", ["site", "stack"])
def test_what_is_tried_reads_only_what_is_stored(kind: Literal["site", "stack"]) -> None:
    tried = reusing_plan(TOY, kind).steps[1]
    stored = {slot for site in recording_plan(TOY, TimestepSchedule(2)).steps[0].sites for slot in site.writes}
    read = {slot for site in tried.sites for slot in site.reads}
    spans = {int(span.id) for span in TOY.spans if span.kind is SiteKind.STACK}
    assert read <= stored
    assert {int(slot.site) for slot in read} == (set(range(len(TOY.sites))) if kind == "site" else spans)
    assert tried.flops < TOY.flops / 4
