"""The plot of compute against error: every method is a line, fewer steps another."""

from __future__ import annotations

from dataclasses import replace

from dicompile.demo.methods import STEPS, methods
from dicompile.demo.metrics import Accuracy
from dicompile.demo.pareto import draw_pareto
from dicompile.demo.run import Row

ACCURACY = Accuracy(1.0, 1.0, 1.0, 1.0)
FULL = Row("uncached, eager", "", 50, False, 2.0, 0.0, 1.0, 100.0, 1.0, 0, None, 0.0, ACCURACY, 2.0)


def row(name: str, family: str, flops: float, error: float) -> Row:
    return replace(FULL, name=name, family=family, cached=bool(family), flops=flops, relative_error=error)


def test_every_family_has_a_line_over_its_compute() -> None:
    rows = (
        FULL,
        replace(FULL, name="uncached"),
        row("FORA, interval 3", "FORA", 40.0, 0.03),
        row("FORA, interval 2", "FORA", 53.0, 0.01),
        row("ToCa, interval 3", "ToCa", 47.0, 0.02),
        row("uncached, 25 steps", "", 50.0, 0.04),
    )
    error, frechet = draw_pareto(rows, frechet_floor=1.5).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in error.get_lines()}
    assert lines["FORA"] == [[40.0, 0.03], [53.0, 0.01]]
    assert lines["ToCa"] == [[47.0, 0.02]]
    assert lines["fewer steps"] == [[50.0, 0.04]]
    assert {"true pictures", "uncached, 50 steps"} <= {line.get_label() for line in frechet.get_lines()}


def test_every_published_method_takes_part_at_two_speeds_or_more() -> None:
    families = [method.family for method in methods(STEPS)]
    assert {"FORA", "ToCa", "DuCa", "L2C", "TokenCache", "TaylorSeer", "fitted"} == set(families)
    assert min(families.count(family) for family in set(families)) >= 2
    assert {method.family for method in methods(STEPS, every=False)} == set(families)


def test_learned_methods_stay_out_at_other_numbers_of_steps() -> None:
    assert not {"L2C", "TokenCache", "fitted"} & {method.family for method in methods(20)}
