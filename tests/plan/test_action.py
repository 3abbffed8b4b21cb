from __future__ import annotations

import pytest

from dicompile.analysis import SiteId
from dicompile.plan import COMPUTE, REUSE, SKIP, Action, Clusters, Score, ScoreBase, Selection, Slot, SlotKind, What

CLUSTERS = Clusters(4, rounds=9, share=0.1)
SELECTION = Selection(Score(ScoreBase.RANDOM), 4)


@pytest.mark.parametrize(
    ("action", "computes", "is_full", "symbol"),
    [
        (COMPUTE, True, True, "F"),
        (Action(what=What.UPDATE), True, True, "F"),
        (REUSE, False, False, "."),
        (Action((0.0, 0.5)), False, False, "f"),
        (Action((0.0, 2.0, -1.0)), False, False, "f"),
        (Action((0.25, 0.75)), True, False, "b"),
        (Action.refresh(SELECTION), True, False, "t"),
        (Action((1.0, 2.0, -1.0), tokens=SELECTION), True, False, "t"),
        (SKIP, False, False, "-"),
    ],
)
def test_what_an_action_computes_and_prints(action: Action, computes: bool, is_full: bool, symbol: str) -> None:
    assert (action.computes, action.is_full, action.symbol) == (computes, is_full, symbol)
    assert action.is_skip == (action == SKIP)


def test_refreshed_tokens_are_stored_beside_reused_ones_and_not_beside_forecast_ones() -> None:
    assert Action.refresh(SELECTION).refreshes_store
    assert not Action((1.0, 2.0, -1.0), tokens=SELECTION).refreshes_store
    assert not REUSE.refreshes_store


def test_an_action_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="at least the weight of the fresh value"):
        Action(())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0,), (0.0, 1.0)])
def test_a_token_refresh_with_other_weights_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="takes fresh tokens as they are and others from the store"):
        Action(weights, tokens=SELECTION)


@pytest.mark.parametrize(("base", "clusters"), [(ScoreBase.CLUSTER, None), (ScoreBase.RANDOM, CLUSTERS)])
def test_clusters_belong_to_scores_by_cluster(base: ScoreBase, clusters: Clusters | None) -> None:
    with pytest.raises(ValueError, match="clusters belong to a score by cluster"):
        Score(base, clusters=clusters)


def test_slots_print_short_and_sort_by_site_and_age() -> None:
    slots = [
        Slot.of(SiteId(3), SlotKind.VALUE, 1),
        Slot.of(SiteId(3), SlotKind.VALUE),
        Slot.of(SiteId(1), SlotKind.SCORE),
    ]
    assert [str(slot) for slot in sorted(slots)] == ["score[1]", "value[3]", "value[3]-1"]
    assert [slot.kind for slot in slots] == [SlotKind.VALUE, SlotKind.VALUE, SlotKind.SCORE]
