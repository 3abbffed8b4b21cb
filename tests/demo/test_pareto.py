"""The plot of compute against error: every method is a line, fewer steps another."""

from __future__ import annotations

from dicompile.demo.methods import STEPS, methods
from dicompile.demo.pareto import Point, draw_pareto


def test_every_family_has_a_line_over_its_compute() -> None:
    points = (
        Point("", 50, 100.0, 0.0, 2.0),
        Point("", 50, 100.0, 1e-7, 2.0),
        Point("FORA", 50, 40.0, 0.03, 2.0),
        Point("FORA", 50, 53.0, 0.01, 2.0),
        Point("ToCa", 50, 47.0, 0.02, 2.0),
        Point("", 25, 50.0, 0.04, 2.0),
    )
    error, frechet = draw_pareto(points, frechet_floor=1.5).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in error.get_lines()}
    assert lines["FORA"] == [[40.0, 0.03], [53.0, 0.01]]
    assert lines["ToCa"] == [[47.0, 0.02]]
    assert lines["fewer steps"] == [[50.0, 0.04]]
    assert {"true pictures", "uncached, 50 steps"} <= {line.get_label() for line in frechet.get_lines()}


def test_every_published_method_takes_part_at_two_speeds_or_more() -> None:
    families = [method.family for method in methods(STEPS)]
    assert {"FORA", "ToCa", "DuCa", "L2C", "TokenCache", "TaylorSeer", "fitted", "auto"} == set(families)
    assert min(families.count(family) for family in set(families)) >= 2
    assert {method.family for method in methods(STEPS, every=False)} == set(families)


def test_learned_methods_stay_out_at_other_numbers_of_steps() -> None:
    assert not {"L2C", "TokenCache", "fitted"} & {method.family for method in methods(20)}
