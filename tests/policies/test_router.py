"""Routers: published files, schedules, and every way in which a file can be no router."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dicompile.errors import InvalidRouter
from dicompile.policies import Router, RouterFacts, load_router, save_router, schedule_from_json, schedule_to_json

PUBLISHED = {
    "DiT_DDIM20_router.pt": (0.1, 10, 248, 560),
    "DiT_DDIM50_router.pt": (0.1, 25, 664, 1400),
    "U-ViT_dpm20_router.pth": (0.9, 9, 333, 522),
    "U-ViT_dpm50_router.pth": (0.9, 24, 1304, 1392),
}
DDIM20 = {0: 0, 2: 1, 4: 1, 6: 1, 8: 3, 10: 30, 12: 48, 14: 52, 16: 56, 18: 56}
DDIM50 = {
    0: 0, 2: 0, 4: 1, 6: 1, 8: 0, 10: 1, 12: 1, 14: 1, 16: 1, 18: 2, 20: 2, 22: 20, 24: 27, 26: 30, 28: 45, 30: 48,
    32: 49, 34: 50, 36: 54, 38: 55, 40: 53, 42: 56, 44: 56, 46: 55, 48: 56,
}  # fmt: skip
DPM20 = {1: 58, 2: 56, 3: 52, 4: 52, 5: 50, 6: 42, 7: 9, 8: 6, 9: 8}


def published(shared: Path, name: str) -> Router:
    return load_router(shared / "routers" / name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_routers_cache_as_many_sites_as_the_paper_says(shared: Path, name: str) -> None:
    threshold, cache_steps, cached, possible = PUBLISHED[name]
    router = published(shared, name)
    assert router.threshold == threshold
    assert (len(router.rows), sum(router.cached().values())) == (cache_steps, cached)
    assert f"{cached} of {possible} sites" in router.summary()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("DiT_DDIM20_router.pt", DDIM20), ("DiT_DDIM50_router.pt", DDIM50), ("U-ViT_dpm20_router.pth", DPM20)],
)
def test_published_routers_cache_what_the_paper_says_at_every_step(
    shared: Path, name: str, expected: dict[int, int]
) -> None:
    router = published(shared, name)
    assert {router.rows[call]: count for call, count in router.cached().items()} == expected


@pytest.mark.parametrize(("threshold", "cached"), [(0.1, 248), (0.5, 268), (0.9, 309)])
def test_a_larger_threshold_caches_more(shared: Path, threshold: float, cached: int) -> None:
    assert sum(published(shared, "DiT_DDIM20_router.pt").cached(threshold).values()) == cached


def test_a_published_router_says_how_it_was_trained(shared: Path) -> None:
    facts = published(shared, "DiT_DDIM50_router.pt").facts
    assert (facts.model, facts.penalty, facts.batch, facts.seed) == ("DiT-XL/2", 1e-6, 64, 0)
    assert (facts.sites[:3], len(facts.sites)) == (("0.self-attention", "0.mlp", "1.self-attention"), 56)


# Schedules ------------------------------------------------------------------------------------------------------------


def test_ddim_computes_everything_at_odd_rows_and_follows_even_ones() -> None:
    logits = torch.full((4, 2), -9.0)
    logits[2, 1] = logits[0, 0] = 9.0
    assert Router(logits).schedule().tolist() == [[True, True], [False, True], [True, True], [True, False]]


def test_dpm_solver_follows_its_rows_at_the_start_of_every_step_but_the_first() -> None:
    logits = torch.full((6, 2), -9.0)
    logits[1, 0] = logits[2, 1] = 9.0
    full = [True, True]
    expected = [full, full, [True, False], full, [False, True], full]
    assert Router(logits, "dpm-solver-2").schedule().tolist() == expected


def test_a_score_equal_to_the_threshold_is_cached() -> None:
    logits = torch.tensor([[0.0, 1e-3], [0.0, 0.0]])
    assert Router(logits, threshold=0.5).schedule()[1].tolist() == [False, True]


def test_a_schedule_survives_json(shared: Path) -> None:
    router = published(shared, "DiT_DDIM50_router.pt")
    text = schedule_to_json(router.schedule(), router.facts.sites)
    compute, sites = schedule_from_json(text)
    assert torch.equal(compute, router.schedule())
    assert sites == router.facts.sites
    data = json.loads(text)
    assert set(data) == {f"{branch}-{block}" for branch in ("attn", "mlp") for block in range(28)}
    assert {row: sum(1 - column[49 - row] for column in data.values()) for row in DDIM50} == DDIM50


def test_a_schedule_with_two_sites_of_one_kind_in_a_block_has_no_json() -> None:
    with pytest.raises(InvalidRouter, match=r"more than one site 0\.mlp"):
        schedule_to_json(torch.ones(2, 2, dtype=torch.bool), ("0.mlp", "0.mlp"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "Expecting value"),
        ("[]", "not an object"),
        ('{"norm-0": [1]}', "'norm-0' is not attn-0"),
        ('{"attn-0": [1, 2]}', "'attn-0' is not a list of 0 and 1"),
        ('{"attn-0": [1], "mlp-0": [1, 0]}', "different lengths"),
    ],
)
def test_json_that_is_no_schedule_says_why(text: str, why: str) -> None:
    with pytest.raises(InvalidRouter, match=why):
        schedule_from_json(text, "file.json")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_router_survives_its_file_and_leaves_text_beside_it(tmp_path: Path) -> None:
    facts = RouterFacts(("0.mlp", "1.mlp"), (3.5, 2.0, 1.0, 0.0), "Sampler", "Model", 1e-6, 100, 8, 1)
    router = Router(torch.randn(4, 2), "ddim", 0.25, facts)
    save_router(router, tmp_path / "new" / "r.safetensors")
    again = load_router(tmp_path / "new" / "r.safetensors")
    assert torch.equal(again.logits, router.logits)
    assert (again.grid, again.threshold, again.facts) == ("ddim", 0.25, facts)
    assert again.source.endswith("r.safetensors")
    text = json.loads((tmp_path / "new" / "r.json").read_text())
    assert text["summary"] == router.summary()
    assert text["facts"]["timesteps"] == [3.5, 2.0, 1.0, 0.0]


def test_options_of_a_checkpoint_that_are_no_numbers_are_not_facts(tmp_path: Path) -> None:
    options = argparse.Namespace(model=3, l1="much", global_seed=None)
    torch.save({"routers": rows(4, 2), "args": options}, tmp_path / "r.pt")
    assert load_router(tmp_path / "r.pt").facts == RouterFacts(sites=("0.self-attention", "0.mlp"))


def rows(steps: int, sites: int) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"{k}.prob", torch.zeros(sites)) for k in range(steps))


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def saved(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def truncated(path: Path) -> None:
    torch.save({"routers": rows(4, 2)}, path)
    path.write_bytes(path.read_bytes()[:-200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is not a router"),
    "truncated": (truncated, "is not a router"),
    "text": (lambda path: path.write_text("not a checkpoint"), "is not a router"),
    "a list": (saved([torch.zeros(2)]), "it holds a list"),
    "no rows": (saved({"routers": {}}), "its keys are not"),
    "other keys": (saved({"weight": torch.zeros(2)}), "its keys are not"),
    "a gap": (saved(OrderedDict([("0.prob", torch.zeros(2)), ("2.prob", torch.zeros(2))])), "without a gap"),
    "ragged": (
        saved(OrderedDict([("0.prob", torch.zeros(2)), ("1.prob", torch.zeros(3))])),
        "not tensors of one shape",
    ),
    "no tensors": (saved(OrderedDict([("0.prob", 1), ("1.prob", 2)])), "not tensors of one shape"),
    "NaN": (saved({"routers": {**rows(4, 2), "2.prob": torch.tensor([0.0, torch.nan])}}), "row 2 holds"),
    "double": (saved({f"{k}.prob": torch.zeros(2).double() for k in range(4)}), r"they are float64 \[4, 2\]"),
    "a matrix per row": (saved({f"{k}.prob": torch.zeros(2, 2) for k in range(4)}), "not float32"),
    "odd": (saved({"routers": rows(5, 2)}), "5 steps are odd"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_router_says_so_and_what_file_it_is(name: str, tmp_path: Path) -> None:
    write, why = BROKEN[name]
    path = tmp_path / "broken.pt"
    write(path)
    with pytest.raises(InvalidRouter, match=why) as caught:
        load_router(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_nothing_in_a_hostile_file_is_executed(protocol: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "hostile.pt", tmp_path / "made"
    content = {"routers": rows(4, 2), "args": Hostile(folder)}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InvalidRouter, match=r"hostile\.pt is not a router"):
        load_router(path)
    assert not folder.exists()


def test_a_class_other_than_the_known_ones_is_named(tmp_path: Path) -> None:
    torch.save({"routers": rows(4, 2), "args": Hostile(tmp_path / "made")}, tmp_path / "hostile.pt")
    with pytest.raises(InvalidRouter, match=r"GLOBAL .*mkdir"):
        load_router(tmp_path / "hostile.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRouter, match=r"there is no router .*gone\.safetensors"):
        load_router(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("damage", ["empty", "no header", "no logits", "wrong header"])
def test_a_damaged_file_of_our_own_is_named(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "mine.safetensors"
    header = {"no header": None, "wrong header": {"dicompile.router": '{"grid": "euler", "threshold": 0.1}'}}
    if damage == "empty":
        path.write_bytes(b"")
    else:
        name = "other" if damage == "no logits" else "logits"
        save_file({name: torch.zeros(4, 2)}, path, header.get(damage))
    with pytest.raises(InvalidRouter, match=r"mine\.safetensors is not a router"):
        load_router(path)


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_outside_the_scores_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidRouter, match="has no meaning"):
        Router(torch.zeros(4, 2)).schedule(threshold)


def test_facts_of_another_router_are_refused() -> None:
    with pytest.raises(InvalidRouter, match="names 3 sites, its logits are for 2"):
        Router(torch.zeros(4, 2), facts=RouterFacts(sites=("0.mlp", "1.mlp", "2.mlp")))
