from __future__ import annotations

import pytest

from dicompile.analysis import SiteId
from dicompile.plan import COMPUTE, REUSE, Action, Score, ScoreBase, Selection, Slot, SlotKind, What

SELECTION = Selection(Score(ScoreBase.RANDOM), 4)


@pytest.mark.parametrize(
    ("action", "computes", "history", "symbol"),
    [
        (COMPUTE, True, 0, "F"),
        (Action(what=What.UPDATE), True, 0, "F"),
        (REUSE, False, 1, "."),
        (Action((0.0, 2.0, -1.0)), False, 2, "f"),
        (Action((0.0, 3.0, -3.0, 1.0)), False, 3, "f"),
        (Action((0.25, 0.75)), True, 1, "b"),
        (Action(tokens=SELECTION), True, 1, "t"),
    ],
)
def test_what_an_action_computes_reads_and_prints(action: Action, computes: bool, history: int, symbol: str) -> None:
    assert (action.computes, action.history, action.symbol) == (computes, history, symbol)


def test_an_action_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="at least the weight of the fresh value"):
        Action(())


def test_a_token_refresh_with_other_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights must be \(1\.0,\)"):
        Action((0.5, 0.5), tokens=SELECTION)


def test_slots_print_short_and_sort_by_site_and_age() -> None:
    slots = [
        Slot.of(SiteId(3), SlotKind.VALUE, 1),
        Slot.of(SiteId(3), SlotKind.VALUE),
        Slot.of(SiteId(1), SlotKind.SCORE),
    ]
    assert [str(slot) for slot in sorted(slots)] == ["score[1]", "value[3]", "value[3]-1"]
    assert [slot.kind for slot in slots] == [SlotKind.VALUE, SlotKind.VALUE, SlotKind.SCORE]
