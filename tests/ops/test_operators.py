"""The table of operators."""

from __future__ import annotations

import collections

from dicompile.ops import attention, axes, products, rows
from dicompile.ops.kinds import ELEMENTWISE, NORMS, RESHAPES, SPLITS
from dicompile.ops.operators import OPERATORS


def test_every_operator_stands_in_one_part_of_the_table() -> None:
    parts = (ELEMENTWISE, axes.OPERATORS, rows.OPERATORS, products.OPERATORS, attention.OPERATORS)
    times = collections.Counter(operator for part in parts for operator in part)
    assert set(times.values()) == {1}
    assert set(times) == set(OPERATORS)


def test_operators_of_every_kind_that_keeps_tokens_apart_are_in_the_table() -> None:
    assert set(OPERATORS) >= ELEMENTWISE | SPLITS | RESHAPES | NORMS
