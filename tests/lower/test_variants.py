"""Variants: made once per structure, actions and needed values, and named after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dicompile
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Variant, VariantCache
from dicompile.lower.artifact import nothing
from dicompile.lower.stored import check_can_be_stored
from dicompile.ops.registry import REGISTERED, Registered
from dicompile.passes import LocalStep, Segment, SlotRef, Value
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.plan import Score, ScoreBase, SlotKind
from dicompile.store import Unwritable
from tests.passes.segments import FULL, REUSE, mlp_block, rewritten, self_attention_block

REFRESH = LocalStep((1.0, 1.0), refresh=Score(ScoreBase.RANDOM))
LIVE = frozenset({0})
PLAIN = Settings()
EAGER = Backend("eager")


@pytest.fixture
def cache() -> VariantCache:
    return VariantCache(EAGER, Settings(), DebugFolder(None))


def test_the_same_request_gets_the_same_variant(cache: VariantCache) -> None:
    segment = mlp_block().segment
    first = cache.get("key", "block0", segment, (FULL,), LIVE)
    assert cache.get("key", "block7", segment, (FULL,), LIVE) is first
    assert cache.variants == (first,)
    assert first.name == "block0-f"


def test_models_share_variants_but_none_that_were_made_in_another_way(tmp_path: Path) -> None:
    segment = mlp_block().segment

    def get(backend: Backend = EAGER, settings: Settings = PLAIN, folder: Path | None = None) -> Variant:
        return VariantCache(backend, settings, DebugFolder(folder)).get("key", "block0", segment, (FULL,), LIVE)

    first = get()
    assert get() is first
    assert get(Backend()) is not get(Backend(options=(("max_autotune", True),)))
    assert get(Backend()) is not first
    assert get(settings=Settings(disabled_passes=frozenset({"narrow-linear"}))) is not first
    assert get(folder=tmp_path) is not first, "what is to be written has to be made"
    assert list(tmp_path.iterdir())
    dicompile.reset()
    assert get() is not first


def test_what_is_said_of_operators_is_part_of_the_key(cache: VariantCache, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = mlp_block().segment
    first = cache.get("key", "block0", segment, (FULL,), LIVE)
    monkeypatch.setitem(REGISTERED, "operator", Registered("rows"))
    other = VariantCache(EAGER, PLAIN, DebugFolder(None)).get("key", "block0", segment, (FULL,), LIVE)
    assert other is not first


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
    assert [run.name for run in variant.runs][:3] == ["score-tokens", "cluster-tokens", "open-spans"]


def test_a_segment_of_which_nothing_is_needed_computes_nothing(cache: VariantCache) -> None:
    variant = cache.get("key", "block0", mlp_block().segment, (FULL,), frozenset())
    assert (variant.inputs, variant.outputs) == ((), ())
    assert variant.function() == ()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """The segments that are compiled."""
    done: list[Segment] = []

    def compile_(segment: Segment, _: Backend) -> Any:
        done.append(segment)
        return nothing

    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", compile_)
    return done


def get_in_another_process(folder: Path, step: LocalStep = FULL, key: object = "key", **options: Any) -> Variant:
    dicompile.reset()
    cache = VariantCache(Backend(**options), Settings(cache=folder), DebugFolder(None))
    return cache.get(key, "block0", mlp_block().segment, (step,), LIVE)


def test_another_process_finds_what_one_compiled(tmp_path: Path, compiled: list[Segment]) -> None:
    steps = (FULL, REUSE, REFRESH)
    first = [get_in_another_process(tmp_path, step) for step in steps]
    second = [get_in_another_process(tmp_path, step) for step in steps]
    assert len(compiled) == 3
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.inputs, one.outputs, one.memory) == (
            other.name,
            other.inputs,
            other.outputs,
            other.memory,
        )
        assert str(one.segment) == str(other.segment)
        assert len(one.runs) == len(other.runs)
    get_in_another_process(tmp_path, options=(("max_autotune", True),))
    get_in_another_process(tmp_path, key="other")
    assert len(compiled) == 5
    get_in_another_process(tmp_path, key=object())
    get_in_another_process(tmp_path, key=object())
    assert len(compiled) == 7, "a key that means something in this process only"


def test_code_that_cannot_be_loaded_is_made_anew(
    tmp_path: Path, compiled: list[Segment], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_in_another_process(tmp_path)
    monkeypatch.setattr("dicompile.lower.stored.code_of", lambda _: (_ for _ in ()).throw(OSError("no such symbol")))
    variant = get_in_another_process(tmp_path)
    assert len(compiled) == 2
    assert variant.function.compile() is nothing
    assert "compiled code of another process cannot be used: OSError('no such symbol')" in caplog.text


def test_operators_of_others_stay_in_their_process() -> None:
    segment = mlp_block().segment.copy(())
    check_can_be_stored(segment)
    next(node for node in segment.graph.nodes if node.op == "call_function").target = torch.ops.prims.exp.default
    with pytest.raises(Unwritable, match="prims"):
        check_can_be_stored(segment)


def test_what_exchanges_values_with_other_ranks_does_not() -> None:
    segment = mlp_block().segment.copy(())
    collective = torch.ops._c10d_functional.all_gather_into_tensor.default
    next(node for node in segment.graph.nodes if node.op == "call_function").target = collective
    check_can_be_stored(segment)


def test_our_own_operators_do_not() -> None:
    scored = LocalStep(produces=Score(ScoreBase.ATTENTION), writes=(SlotKind.SCORE,))
    segment = rewritten(self_attention_block().segment, [scored], ScoreTokens())
    assert "dicompile.attention_received" in str(segment)
    check_can_be_stored(segment)
