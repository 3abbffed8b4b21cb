"""Policies as data: they go to and from text, hash, and say what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.errors import InvalidPolicy, PolicyDoesNotFit, UnknownPolicy
from dicompile.plan import (
    Cadence,
    Fitted,
    Forecast,
    Line,
    Policy,
    Refresh,
    Reuse,
    Rule,
    Table,
    TimestepSchedule,
    TokenScore,
    TokenTable,
    Window,
    make_plan,
)
from dicompile.policies import (
    FORA,
    POLICIES,
    DuCa,
    DuCaFlux,
    DuCaPixArt,
    HiCache,
    NoCache,
    Spectrum,
    TaylorSeer,
    TaylorSeerLite,
    ToCa,
    ToCaFlux,
    ToCaOpenSora,
    ToCaPixArt,
    get_policy,
)
from tests.capture.captured import structure

LEARNED = {"l2c", "l2p", "smoothcache", "tokencache"}
"""Policies that need a file."""

ratios, numbers = st.floats(0, 1), st.floats(-10, 10)
lines = st.builds(Line, start=numbers, slope=numbers)
token_scores = st.builds(
    TokenScore,
    base=st.sampled_from(["attention", "entropy", "value-norm", "random"]),
    age_weight=numbers,
    grid_cell=st.integers(0, 8),
    grid_bonus=numbers,
    share_guidance=st.booleans(),
)
refreshes = st.builds(
    Refresh,
    ratio=ratios,
    factor=numbers,
    by_step=lines,
    by_depth=lines,
    depth_denominator=st.none() | st.integers(1, 60),
    score=token_scores,
    context=st.sampled_from(["stored", "all", "kept"]),
    otherwise=st.builds(Reuse) | st.builds(Forecast, order=st.integers(0, 4)),
)
kinds = st.sampled_from(["self-attention", "cross-attention", "joint-attention", "mlp", "parallel", "block", "stack"])
whats = st.sampled_from(["core", "update", "attention"])
counts = st.lists(st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3).map(tuple)
recalls = st.one_of(
    st.builds(Reuse, what=whats),
    st.builds(Forecast, order=st.integers(0, 4), what=whats),
    st.builds(Fitted, weights=st.lists(st.lists(numbers, max_size=3).map(tuple), max_size=3).map(tuple), what=whats),
)
tables = st.builds(
    Table, compute=st.lists(st.lists(st.booleans(), max_size=3).map(tuple), max_size=3).map(tuple), otherwise=recalls
)
token_tables = st.builds(
    TokenTable, counts=counts, score=token_scores, context=st.sampled_from(["all", "kept"]), what=whats
)
cadences = st.builds(
    Cadence,
    interval=st.integers(1, 20),
    counting=st.sampled_from(["down", "up"]),
    warmup=st.integers(1, 9),
    stretch=st.floats(-0.9, 0.9),
    dense=st.none() | st.builds(Window, start=ratios, end=ratios, interval=st.integers(1, 9)),
    anchor=st.sampled_from(["index", "last"]),
    at=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    decide=st.sampled_from(["step", "block"]),
)
rules = st.builds(
    Rule,
    sites=st.lists(kinds, max_size=3).map(tuple),
    when=st.sampled_from(["always", "odd", "even"]),
    cadence=st.none() | cadences,
    do=recalls | refreshes | tables | token_tables,
)
own = st.builds(
    Policy,
    name=st.text(max_size=12),
    cadence=cadences,
    rules=st.lists(rules, max_size=3).map(tuple),
    seed=st.integers(),
)
shared = {
    "interval": st.integers(1, 20),
    "ratio": ratios,
    "score": st.sampled_from(["attention", "entropy", "value-norm", "random"]),
    "age_weight": numbers,
    "grid_cell": st.integers(0, 8),
    "grid_bonus": numbers,
    "decide": st.sampled_from(["step", "block"]),
    "depth_denominator": st.none() | st.integers(1, 60),
    "seed": st.integers(0, 2**31),
}
published = st.one_of(
    st.builds(NoCache),
    st.builds(FORA, interval=st.integers(1, 50)),
    st.builds(ToCa, schedule=st.sampled_from(["ddim50", "ddpm250"]), **shared),
    st.builds(ToCaPixArt, share_guidance=st.booleans(), **shared),
    st.builds(ToCaOpenSora, interval=st.integers(1, 9), ratio=ratios, share_guidance=st.booleans()),
    st.builds(ToCaFlux, interval=st.integers(1, 9), ratio=ratios, seed=st.integers(0, 9)),
    st.builds(DuCa, aggressive=st.sampled_from(["stream", "update"]), **shared),
    st.builds(TaylorSeer, interval=st.integers(1, 9), order=st.integers(0, 5), warmup=st.integers(1, 5)),
    st.builds(HiCache, order=st.integers(0, 5), scale=st.floats(0.1, 2)),
    st.builds(Spectrum, growth=st.floats(0, 3), degree=st.integers(0, 6), share=ratios),
    st.builds(TaylorSeerLite, order=st.integers(0, 5), what=st.sampled_from(["stream", "update"])),
)


@settings(max_examples=20, deadline=None)
@given(own | published)
def test_a_policy_survives_yaml_json_and_plain_data(policy: Policy) -> None:
    for again in (
        Policy.from_yaml(policy.to_yaml()),
        Policy.from_json(policy.to_json()),
        Policy.from_dict(json.loads(json.dumps(policy.to_dict()))),
    ):
        assert again == policy
        assert hash(again) == hash(policy)
        assert again.to_yaml() == policy.to_yaml()


def test_a_name_beyond_the_basic_plane_survives_every_format(tmp_path: Path) -> None:
    policy = FORA().model_copy(update={"name": "fast \N{ROCKET}"})
    file = tmp_path / "mine.json"
    file.write_text(policy.to_json(), encoding="utf-8")
    assert get_policy(str(file)) == Policy.from_json(policy.to_json()) == Policy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize("name", sorted(set(POLICIES) - LEARNED))
def test_every_published_policy_has_a_round_trip_with_its_defaults(name: str) -> None:
    policy = POLICIES[name]()
    by_name = get_policy(name).model_copy(update={"elsewhere": ()})  # settings for other kinds of model
    for again in (Policy.from_yaml(policy.to_yaml()), Policy.from_json(policy.to_json()), by_name):
        assert again == policy
        assert hash(again) == hash(policy)


def test_policies_can_be_keys_and_different_options_make_different_keys() -> None:
    table = {FORA(interval=3): "three", FORA(interval=4): "four", ToCa(): "toca", ToCa(seed=1): "seeded"}
    assert len(table) == 4
    assert table[FORA(interval=4)] == "four"


def test_policies_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FORA().name = "other"  # type: ignore[misc]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("name: x\ncadenze: {}", "unknown option 'cadenze'", "Policy"),
        ("name: x\ncadence: {intervall: 3}", "unknown option 'intervall'", "Cadence"),
        ("name: x\nrules: [{site: [mlp], do: {do: reuse}}]", "unknown option 'site'", "Rule"),
        ("name: x\nrules: [{do: {do: reuse, ratio: 1}}]", "unknown option 'ratio'", "Reuse"),
        (
            "name: x\nrules: [{do: {do: refresh, ratio: 0.5, score: {bass: random}}}]",
            "unknown option 'bass'",
            "TokenScore",
        ),
        ("name: x\nrules: [{do: {do: refresh, ratio: 0.5, by_step: {slop: 1}}}]", "unknown option 'slop'", "Line"),
        ("name: x\ncadence: {interval: 0}", "option 'interval' cannot be 0", "Cadence"),
        ("name: x\ncadence: {stretch: 1}", "option 'stretch' cannot be 1", "Cadence"),
        ("name: x\ncadence: {counting: sideways}", "option 'counting' cannot be 'sideways'", "Cadence"),
        ("name: x\nrules: [{do: {do: refresh, ratio: 1.5}}]", "option 'ratio' cannot be 1.5", "Refresh"),
        ("name: x\nrules: [{sites: [mpl], do: {do: reuse}}]", "option 'sites.0' cannot be 'mpl'", "Rule"),
        ("name: x\nrules: [{do: {do: rest}}]", "option 'do' cannot be {'do': 'rest'}", "Rule"),
        ("1: 2", "an option's name is not text", "mine.yaml"),
        ("name: x\ncadence: {3: 4}", "an option's name is not text", "mine.yaml"),
        ("name: [", "this is not valid YAML", "mine.yaml"),
        ("- name", "option '' cannot be ['name']", "mine.yaml"),
        ("", "option '' cannot be None", "mine.yaml"),
    ],
)
def test_a_mistake_is_named_with_the_part_it_is_in(text: str, what: str, where: str) -> None:
    with pytest.raises(InvalidPolicy) as error:
        Policy.from_yaml(text, "mine.yaml")
    assert (error.value.what, error.value.where) == (what, where)
    assert str(error.value).startswith(f"{what}\n  where: {where}\n")


def test_json_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidPolicy) as error:
        Policy.from_json("{name: x}", "mine.json")
    assert (error.value.what, error.value.where) == ("this is not valid JSON", "mine.json")
    assert "line 1 column 2" in error.value.why


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: FORA(interval=0), "option 'interval' cannot be 0"),
        (lambda: ToCa(ratio=-0.1), "option 'ratio' cannot be -0.1"),
        (lambda: ToCa(score="magic"), "option 'base' cannot be 'magic'"),  # type: ignore[arg-type]
        (lambda: ToCa(schedule="ddim51"), "option 'schedule' cannot be 'ddim51'"),  # type: ignore[arg-type]
        (lambda: Cadence(interval="often"), "option 'interval' cannot be 'often'"),  # type: ignore[arg-type]
    ],
)
def test_an_option_out_of_range_is_named_where_policies_are_made_in_python(make: Callable[[], Any], what: str) -> None:
    with pytest.raises(InvalidPolicy) as error:
        make()
    assert error.value.what == what


# Getting one ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_found_by_itself_by_name_by_data_and_with_options() -> None:
    policy = FORA(interval=5)
    assert get_policy(policy) is policy
    assert get_policy("fora", interval=5) == policy
    assert get_policy(policy.to_dict()) == policy
    assert get_policy("none") == NoCache()
    assert get_policy("toca", ratio=0.1, score="random") == ToCa(ratio=0.1, score="random")


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_a_policy_is_read_from_a_file(tmp_path: Path, ending: str) -> None:
    policy = ToCaPixArt(interval=4, seed=3)
    file = tmp_path / f"mine.{ending}"
    file.write_text(policy.to_json() if ending == "json" else policy.to_yaml(), encoding="utf-8")
    assert get_policy(str(file)) == policy


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- nothing", encoding="utf-8")
    with pytest.raises(InvalidPolicy) as error:
        get_policy(str(file))
    assert error.value.where == str(file)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_file_that_is_no_text_is_an_invalid_policy(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"mine.{ending}"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(InvalidPolicy) as error:
        get_policy(str(file))
    assert error.value.where == str(file)


@pytest.mark.parametrize(
    ("name", "near"),
    [("forra", "did you mean fora? "), ("Tea_Cache", "did you mean teacache or "), ("42.yaml", ""), ("", "")],
)
def test_an_unknown_name_lists_the_published_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownPolicy) as error:
        get_policy(name)
    told = str(error.value)
    assert told.startswith(
        f"no policy is called {name!r}\n"
        "  why:   it is neither a published name nor an existing .yaml or .json file\n"
        f"  fix:   {near}"
    )
    assert told.endswith(f"use one of: {', '.join(POLICIES)}")
    assert ("did you mean" in told) == bool(near)
    assert {"none", "fora", "toca", "toca-pixart"} <= set(POLICIES)


def test_an_unknown_option_lists_those_of_the_policy() -> None:
    with pytest.raises(InvalidPolicy) as error:
        get_policy("fora", intervall=3)
    assert str(error.value) == (
        "policy 'fora' has no option 'intervall'\n  where: options\n  fix:   its options are: interval"
    )
    with pytest.raises(InvalidPolicy, match=r"score, aggressive, age_weight, depth_denominator, seed$"):
        get_policy("duca-flux", grid_cell=2)  # the last three are handed on to ToCaFlux
    with pytest.raises(InvalidPolicy, match="its options are: none"):
        get_policy("none", interval=3)


@pytest.mark.parametrize("source", [FORA(), FORA().to_dict(), "mine.yaml"])
def test_options_beside_a_complete_policy_are_refused_instead_of_ignored(source: Any) -> None:
    with pytest.raises(InvalidPolicy, match="options are given, but the policy is not a published name: interval"):
        get_policy(source, interval=3)


def test_policy_files_are_readable_text() -> None:
    data = yaml.safe_load(FORA(interval=4).to_yaml())
    assert list(data)[:4] == ["name", "cadence", "rules", "seed"]
    assert data["cadence"]["interval"] == 4
    everywhere = {"sites": [], "when": "always", "during": [0.0, 1.0], "blocks": [0.0, 1.0], "cadence": None}
    assert data["rules"] == [{**everywhere, "do": {"do": "reuse", "what": "core"}}]


# Published settings ---------------------------------------------------------------------------------------------------


def test_fora_reuses_every_site_between_full_steps() -> None:
    policy = FORA(interval=4)
    assert (policy.name, policy.rules) == ("fora-4", (Rule(do=Reuse()),))


def test_toca_refreshes_mlps_by_attention_and_reuses_attention() -> None:
    mlp, rest = ToCa().rules
    assert rest == Rule(do=Reuse())
    assert mlp.sites == ("mlp",)
    assert mlp.do == Refresh(
        ratio=0.07,
        factor=2.5,
        by_step=Line(start=3.0, slope=-4.0),
        by_depth=Line(start=0.8, slope=0.4),
        score=TokenScore(base="attention", age_weight=0.25, grid_cell=2, grid_bonus=0.6),
    )


def test_the_ddpm_schedule_of_toca_has_its_own_lines() -> None:
    refresh = ToCa(schedule="ddpm250").rules[0].do
    assert isinstance(refresh, Refresh)
    assert (refresh.by_step, refresh.by_depth) == (Line(start=1.4, slope=-0.8), Line(start=1.8, slope=-1.6))


def test_toca_for_pixart_refreshes_cross_attention_less_than_mlps() -> None:
    cross, mlp, rest = ToCaPixArt().rules
    assert (cross.sites, mlp.sites, rest) == (("cross-attention",), ("mlp",), Rule(do=Reuse()))
    assert isinstance(cross.do, Refresh) and isinstance(mlp.do, Refresh)
    assert (cross.do.factor, mlp.do.factor) == (0.6, 1.6)
    assert cross.do.model_copy(update={"factor": 1.6}) == mlp.do
    assert mlp.do.score == TokenScore(base="entropy", age_weight=0.25, grid_cell=4, grid_bonus=0.4, share_guidance=True)


# Models that cannot ---------------------------------------------------------------------------------------------------


def test_toca_does_not_fit_blocks_without_the_attention_that_ranks() -> None:
    with pytest.raises(PolicyDoesNotFit) as error:
        make_plan(structure("flux"), ToCa(score="entropy", grid_cell=0), TimestepSchedule(10))
    assert str(error.value) == (
        "policy 'toca-3' ranks tokens by entropy, for which there is no cross-attention in the block\n"
        "  where: site 1, transformer_blocks.0.ff.net.0.proj (mlp)\n"
        "  why:   the block has joint-attention, mlp, joint-attention, mlp\n"
        "  fix:   choose another score, for example score='random'"
    )


def test_toca_does_not_fit_a_grid_that_is_not_divisible_into_cells() -> None:
    with pytest.raises(PolicyDoesNotFit) as error:
        make_plan(structure("dit"), ToCa(grid_cell=3), TimestepSchedule(10))
    assert str(error.value) == (
        "policy 'toca-3' gives a bonus per 3x3 cell of tokens\n"
        "  where: site 1, transformer_blocks.0.ff.net.0.proj (mlp)\n"
        "  why:   the token grid is 8x8\n"
        "  fix:   set grid_cell=0 to switch the bonus off"
    )


def test_the_grid_bonus_does_not_fit_text_tokens() -> None:
    with pytest.raises(PolicyDoesNotFit, match="the branch has 8 tokens, the token grid is 8x8"):
        make_plan(structure("sd3"), ToCa(score="random"), TimestepSchedule(10))


def test_sharing_tokens_does_not_fit_an_odd_batch() -> None:
    pixart = structure("pixart")
    odd = replace(pixart, sites=tuple(replace(site, shape=(3, *site.shape[1:])) for site in pixart.sites))
    with pytest.raises(PolicyDoesNotFit) as error:
        make_plan(odd, ToCaPixArt(), TimestepSchedule(10))
    assert str(error.value) == (
        "policy 'toca-pixart-3' shares tokens between guidance halves, but the batch is 3\n"
        "  where: site 1, transformer_blocks.0.attn2.to_q (cross-attention)\n"
        "  why:   the two halves of classifier-free guidance must be in one batch\n"
        "  fix:   set share_guidance=False"
    )


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("dit", ToCa()),
        ("plain_dit", ToCa(score="value-norm")),
        ("pixart", ToCaPixArt()),
        ("pixart", ToCa(grid_cell=4)),
        ("flux", ToCa(score="random", grid_cell=0)),
        ("sd3", FORA()),
        ("dit", DuCa()),
        ("plain_dit", DuCa(score="random", aggressive="update")),
        ("pixart", DuCaPixArt()),
        ("flux", ToCaFlux()),
        ("flux", ToCaFlux(score="key-norm")),
        ("sd3", ToCaFlux()),
        ("flux", DuCaFlux()),
        ("sd3", DuCaFlux(score="attention", aggressive="stream")),
        ("dit", TaylorSeer()),
        ("flux", TaylorSeer(order=1)),
        ("sd3", TaylorSeerLite()),
        ("pixart", TaylorSeerLite(what="stream")),
        ("flux", FORA()),
    ],
)
def test_published_policies_fit_the_models_they_were_made_for(name: str, policy: Policy) -> None:
    plan = make_plan(structure(name), policy, TimestepSchedule(20))
    assert plan.flop_speedup > 1.2
