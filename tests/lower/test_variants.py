"""Variants: made once per structure, actions and needed values, and named after them."""

from __future__ import annotations

import pytest

from dicompile.config import DebugFolder, Settings
from dicompile.lower import VariantCache
from dicompile.passes import LocalStep, SlotRef, Value
from dicompile.plan import Score, ScoreBase, SlotKind
from tests.passes.segments import FULL, REUSE, mlp_block

REFRESH = LocalStep((1.0, 1.0), refresh=Score(ScoreBase.RANDOM))
LIVE = frozenset({0})


@pytest.fixture
def cache() -> VariantCache:
    return VariantCache("eager", Settings(), DebugFolder(None))


def test_the_same_request_gets_the_same_variant(cache: VariantCache) -> None:
    segment = mlp_block().segment
    first = cache.get("key", "block0", segment, (FULL,), LIVE)
    assert cache.get("key", "block7", segment, (FULL,), LIVE) is first
    assert cache.variants == (first,)
    assert first.name == "block0-f"


def test_another_structure_action_or_need_gets_another_variant(cache: VariantCache) -> None:
    segment = mlp_block().segment
    requests = [("key", FULL, LIVE), ("other", FULL, LIVE), ("key", REUSE, LIVE), ("key", FULL, frozenset[int]())]
    assert len({id(cache.get(key, "b", segment, (step,), live)) for key, step, live in requests}) == len(requests)


@pytest.mark.parametrize(("step", "letter"), [(FULL, "f"), (REUSE, "r"), (REFRESH, "t")])
def test_a_variant_is_named_after_its_segment_and_actions(cache: VariantCache, step: LocalStep, letter: str) -> None:
    assert cache.get("key", "block3", mlp_block().segment, (step,), LIVE).name == f"block3-{letter}"


def test_arguments_and_results_are_described_in_order(cache: VariantCache) -> None:
    variant = cache.get("key", "block0", mlp_block().segment, (REUSE,), LIVE)
    assert variant.inputs == (Value(0), Value(5), SlotRef(0, SlotKind.VALUE))
    assert variant.outputs == (Value(0),)
    assert [run.name for run in variant.runs][:3] == ["score-tokens", "open-spans", "refresh-tokens"]


def test_a_segment_of_which_nothing_is_needed_computes_nothing(cache: VariantCache) -> None:
    variant = cache.get("key", "block0", mlp_block().segment, (FULL,), frozenset())
    assert (variant.inputs, variant.outputs) == ((), ())
    assert variant.function() == ()
