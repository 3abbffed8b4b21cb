"""Lanes of a plan: like sites of adjacent blocks together, spans only where they do something."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from dicompile.plan import Cadence, Plan, Policy, Reuse, Rule, Table, TimestepSchedule, make_plan
from dicompile.plan.html import plan_html
from dicompile.plan.lanes import MEANING, make_lanes
from dicompile.policies import FORA, DuCa, NoCache, TaylorSeerLite
from tests.plan.toys import toy

BLOCKS = [("self-attention", "mlp"), ("self-attention", "mlp"), ("parallel",)]


def plan(policy: Policy, steps: int = 6, *, spans: bool = False) -> Plan:
    return make_plan(toy(BLOCKS, spans=spans), policy, TimestepSchedule.of(steps))


def test_like_sites_of_adjacent_blocks_are_one_lane() -> None:
    lanes = make_lanes(plan(FORA(interval=3)))
    assert [(lane.label, lane.sites) for lane in lanes] == [
        ("0-1 self-attention", (0, 2)),
        ("0-1 mlp", (1, 3)),
        ("2 parallel", (4,)),
    ]
    assert {lane.cells(plan(FORA(interval=3))) for lane in lanes} == {"F.F..F"}


def test_every_site_can_have_a_lane_of_its_own() -> None:
    lanes = make_lanes(plan(FORA()), every_site=True)
    assert [lane.label for lane in lanes] == [
        "0 self-attention", "0 mlp", "1 self-attention", "1 mlp", "2 parallel"
    ]  # fmt: skip


def test_a_span_shows_where_it_stands_in_for_its_sites() -> None:
    made = plan(TaylorSeerLite(interval=3), spans=True)
    lanes = {lane.label: lane.cells(made) for lane in make_lanes(made)}
    assert set(lanes) == {"0-1 self-attention", "0-1 mlp", "2 parallel", "whole stack"}
    assert lanes["whole stack"].replace("f", "-").replace(" ", "F") == lanes["0-1 mlp"]
    assert "f" in lanes["whole stack"]
    assert "whole stack" not in {lane.label for lane in make_lanes(plan(FORA(), spans=True))}


def test_sites_of_a_lane_that_do_different_things_say_so() -> None:
    table = Table(compute=((True,) * 5, (False, False, True, False, False)))
    made = plan(Policy(name="table", cadence=Cadence(), rules=(Rule(do=table),)), 2)
    assert [lane.cells(made) for lane in make_lanes(made)] == ["F*", "F.", "F."]


def test_several_sites_of_a_kind_in_a_block_are_numbered() -> None:
    made = make_plan(toy([("mlp", "mlp")]), Policy(name="x", rules=(Rule(do=Reuse()),)), TimestepSchedule.of(2))
    assert [lane.label for lane in make_lanes(made)] == ["0 mlp", "0 mlp 2"]


class Page(HTMLParser):
    """What a browser would see: open tags, cells, and addresses of anything outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.cells: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}, "it loads something"
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.cells += [dict(attrs).get("class") for _ in [0] if tag == "i" and self.open[-2:-1] == ["td"]]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("policy", [NoCache(), FORA(), DuCa(score="random", grid_cell=0, aggressive="update")])
def test_its_html_is_well_formed_and_has_a_cell_for_every_lane_and_step(policy: Policy) -> None:
    made = plan(policy, 9, spans=True)
    page = Page(plan_html(made))
    assert page.open == []
    symbols = "".join(lane.cells(made) for lane in make_lanes(made))
    classes = {"F": "F", "t": "t", "f": "f", ".": "r", "-": "s", " ": ""}
    bars = 9 * (2 if made.cache_bytes else 1)
    assert page.cells == [*(classes[symbol] for symbol in symbols), *[None] * bars]
    assert any(MEANING["F"] in title for title in page.titles)
    assert made._repr_html_() == plan_html(made)


MOSTLY_FULL = Policy(name="x", cadence=Cadence(at=tuple(range(9))), rules=(Rule(sites=("mlp",), do=Reuse()),))


@pytest.mark.parametrize(
    ("policy", "steps", "reason"),
    [
        (NoCache(), 6, "every step computes everything"),
        (FORA(interval=3), 1, "every step computes everything"),
        (MOSTLY_FULL, 10, "9 of 10 steps compute everything"),
    ],
)
def test_a_plan_that_gains_nothing_says_why(policy: Policy, steps: int, reason: str) -> None:
    made = plan(policy, steps)
    assert made.no_gain().startswith(f"no gain expected, {made.prediction()}: {reason}")


def test_a_plan_that_gains_says_nothing_of_it() -> None:
    made = plan(FORA(interval=3), 12)
    assert made.no_gain() == ""
    assert made.speedup_of(0) == pytest.approx(1)
    assert max(map(made.speedup_of, range(12))) > made.predicted_speedup
    assert made.held(made.fullest) == made.cache_bytes
