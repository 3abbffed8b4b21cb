"""What follows from times, on times that were made up."""

from __future__ import annotations

import pytest

from dicompile.bench.results import Cost, Kind, Row, by_kind, compile_rows, generation, median_cost

FULL, REUSE = Kind("full", 2, 100.0), Kind("reuse", 6, 10.0)


def test_a_kind_has_the_median_of_all_its_steps_in_all_rounds() -> None:
    kinds = by_kind(["full", "reuse", "full"], [[0.1, 0.01, 0.2], [0.3, 0.03, 0.4], [9.0, 0.02, 0.2]])
    assert [(kind.name, kind.count) for kind in kinds] == [("full", 2), ("reuse", 1)]
    assert [kind.milliseconds for kind in kinds] == pytest.approx([250.0, 20.0])


def test_a_round_with_another_number_of_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        by_kind(["full", "full"], [[0.1]])


def test_a_generation_is_its_steps() -> None:
    assert generation((FULL, REUSE)) == 260.0


def test_arrival_is_one_where_half_of_the_operations_take_half_of_the_time() -> None:
    assert Row("a", (FULL,), flop_speedup=2.0, speedup=2.0).arrival == 1.0
    assert Row("b", (FULL,), flop_speedup=2.5, speedup=2.0).arrival == pytest.approx(0.8)


def test_costs_are_compared_by_cpu_seconds_and_only_caching_has_targets() -> None:
    costs = {"whole": Cost(50, 100), "blocks": Cost(10, 20), "fora": Cost(90, 25)}
    rows = compile_rows("m", costs, whole="whole", blocks="blocks", most_whole=0.5, most_blocks=1.5)
    assert [(row.whole, row.blocks) for row in rows] == [(1.0, 5.0), (0.2, 1.0), (0.25, 1.25)]
    assert [(row.most_whole, row.most_blocks) for row in rows] == [(None, None), (None, None), (0.5, 1.5)]


def test_what_was_not_measured_gives_no_ratio() -> None:
    (row,) = compile_rows("m", {"fora": Cost(1, 1)}, whole="whole", blocks="blocks", most_whole=1, most_blocks=1)
    assert (row.whole, row.blocks) == (None, None)


def test_the_cost_of_several_processes_is_their_median() -> None:
    assert median_cost([Cost(1, 9), Cost(5, 2), Cost(3, 4)]) == Cost(3, 4)
