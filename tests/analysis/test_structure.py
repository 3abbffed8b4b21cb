"""What analysis finds in the five archetypes, exactly."""

from __future__ import annotations

import dataclasses

import pytest

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Role
from tests.capture.captured import captured, one_block, structure
from tests.models import MODELS, Sample, capture

SELF = "aten.scaled_dot_product_attention.default in {path} reads keys and values of all tokens"
JOIN = "queries only: aten.scaled_dot_product_attention.default in {path} reads keys and values of all tokens"

# Per site: kind, stream, token-wise, shape.
BLOCKS: dict[str, list[tuple[str, str, list[tuple[str, int, str, tuple[int, ...]]]]]] = {
    "dit": [
        (
            f"transformer_blocks.{b}",
            "ABB"[b],
            [
                (
                    "self-attention",
                    0,
                    "queries only: " + SELF.format(path=f"transformer_blocks.{b}.attn1"),
                    (4, 64, 32),
                ),
                ("mlp", 0, "yes", (4, 64, 32)),
            ],
        )
        for b in range(3)
    ],
    "pixart": [
        (
            f"transformer_blocks.{b}",
            "ABB"[b],
            [
                (
                    "self-attention",
                    0,
                    "queries only: " + SELF.format(path=f"transformer_blocks.{b}.attn1"),
                    (2, 64, 32),
                ),
                ("cross-attention", 0, "yes", (2, 64, 32)),
                ("mlp", 0, "yes", (2, 64, 32)),
            ],
        )
        for b in range(3)
    ],
    "sd3": [
        (
            f"transformer_blocks.{b}",
            "AAB"[b],
            [
                ("joint-attention", 0, JOIN.format(path=f"transformer_blocks.{b}.attn"), (2, 64, 32)),
                ("mlp", 0, "yes", (2, 64, 32)),
                ("joint-attention", 1, JOIN.format(path=f"transformer_blocks.{b}.attn"), (2, 8, 32)),
                ("mlp", 1, "yes", (2, 8, 32)),
            ][: 2 if b == 2 else 4],
        )
        for b in range(3)
    ],
    "flux": [
        *(
            (
                f"transformer_blocks.{b}",
                "A",
                [
                    ("joint-attention", 0, JOIN.format(path=f"transformer_blocks.{b}.attn"), (1, 16, 32)),
                    ("mlp", 0, "yes", (1, 16, 32)),
                    ("joint-attention", 1, JOIN.format(path=f"transformer_blocks.{b}.attn"), (1, 6, 32)),
                    ("mlp", 1, "yes", (1, 6, 32)),
                ],
            )
            for b in range(2)
        ),
        *(
            (
                f"single_transformer_blocks.{b}",
                "BC"[b],
                [
                    (
                        "parallel",
                        1,
                        "queries only: " + SELF.format(path=f"single_transformer_blocks.{b}.attn"),
                        (1, 22, 32),
                    )
                ],
            )
            for b in range(2)
        ),
    ],
    "plain_dit": [
        (
            f"blocks.{b}",
            "A",
            [
                ("self-attention", 0, "queries only: " + SELF.format(path=f"blocks.{b}"), (4, 64, 32)),
                ("mlp", 0, "yes", (4, 64, 32)),
            ],
        )
        for b in range(3)
    ],
}

# Per stream: what it starts from, and its sites.
STREAMS: dict[str, list[tuple[set[str], tuple[int, ...]]]] = {
    "dit": [({"latent"}, tuple(range(6)))],
    "pixart": [({"latent"}, tuple(range(9)))],
    "sd3": [({"latent"}, (0, 1, 4, 5, 8, 9)), ({"conditioning"}, (2, 3, 6, 7))],
    "flux": [({"latent"}, (0, 1, 4, 5)), ({"conditioning"}, (2, 3, 6, 7, 8, 9))],
    "plain_dit": [({"latent"}, tuple(range(6)))],
}


def described(found: ModelStructure) -> list[tuple[str, str, list[tuple[str, int, str, tuple[int, ...]]]]]:
    letters: dict[str, str] = {}
    return [
        (
            block.path,
            letters.setdefault(block.kind, "ABCDEFGH"[len(letters)]),
            [(s.kind.value, int(s.stream), str(s.tokens), s.shape) for s in found.sites_of(block)],
        )
        for block in found.blocks
    ]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_their_sites_are_exactly_these(name: str) -> None:
    assert described(structure(name)) == BLOCKS[name]


@pytest.mark.parametrize("name", MODELS)
def test_streams_are_exactly_these_and_all_reach_the_output(name: str) -> None:
    found = structure(name)
    assert [({role.value for role in s.roles}, s.sites) for s in found.streams] == STREAMS[name]
    assert [s.id for s in found.streams] == list(range(len(found.streams)))
    assert all(stream.reaches_output for stream in found.streams)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_numbered_in_execution_order_and_belong_to_the_block_that_lists_them(name: str) -> None:
    found = structure(name)
    assert [site.id for site in found.sites] == list(range(len(found.sites)))
    assert [i for block in found.blocks for i in block.sites] == list(range(len(found.sites)))
    assert all(site.block == block.id for block in found.blocks for site in found.sites_of(block))


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("dit", [(0, 3), (1, 3), (2, 3)]),
        ("flux", [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ("sd3", [(0, 3), (1, 3), (2, 3)]),
    ],
)
def test_depth_counts_within_the_list_that_a_block_stands_in(name: str, depth: list[tuple[int, int]]) -> None:
    assert [block.depth for block in structure(name).blocks] == depth


@pytest.mark.parametrize(("name", "grid"), [("dit", (8, 8)), ("sd3", (8, 8)), ("flux", None), ("plain_dit", (8, 8))])
def test_the_token_grid_is_that_of_a_picture_cut_into_square_patches(name: str, grid: tuple[int, int] | None) -> None:
    assert structure(name).grid == grid


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_is_in_one_part_and_needs_only_earlier_parts(name: str) -> None:
    found, graph = structure(name), captured(name).graph
    parts = [found.prologue, *(block.nodes for block in found.blocks), found.epilogue]
    number = {node: i for i, part in enumerate(parts) for node in part}
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert sorted(number) == sorted(node.name for node in calls)
    assert len(number) == sum(len(part) for part in parts)
    for node in calls:
        for parent in node.all_input_nodes:
            assert number.get(parent.name, 0) <= number[node.name], f"{node.name} needs {parent.name}"


@pytest.mark.parametrize("name", MODELS)
def test_a_site_lies_inside_its_block(name: str) -> None:
    found = structure(name)
    for block in found.blocks:
        for site in found.sites_of(block):
            assert {site.core, site.update, site.add, *site.attention} <= set(block.nodes)


def test_two_captures_of_one_model_give_equal_structures_and_equal_text() -> None:
    (model, inputs), first = one_block()
    second = capture(Sample(model, inputs))
    assert str(first) == str(second)
    assert analyse(first) == analyse(second)
    assert str(analyse(first)) == str(analyse(second))


def test_the_text_of_a_structure() -> None:
    found = structure("pixart")
    kinds = [block.kind[:8] for block in found.blocks]
    assert str(found).splitlines()[:6] == [
        "inputs   hidden_states: latent, timestep: timestep, encoder_hidden_states: conditioning",
        "streams  1   blocks 3 of 2 kinds   sites 9   0.016 GFLOP a call   token grid 8x8",
        f"block 0   transformer_blocks.0  [{kinds[0]}]",
        "  site 0   self-attention   stream 0  2x64x32      13.46%  token-wise: queries only: "
        "aten.scaled_dot_product_attention.default in transformer_blocks.0.attn1 reads keys and values of all tokens"
        "  # transformer_blocks.0.attn1",
        "  site 1   cross-attention  stream 0  2x64x32       5.44%  token-wise: yes  # transformer_blocks.0.attn2.to_q",
        "  site 2   mlp              stream 0  2x64x32      13.46%  token-wise: yes"
        "  # transformer_blocks.0.ff.net.0.proj",
    ]
    assert len(str(found).splitlines()) == 2 + 3 + 9


def test_structures_are_frozen() -> None:
    found = structure("plain_dit")
    for item, field in [
        (found, "sites"),
        (found.sites[0], "core"),
        (found.blocks[0], "nodes"),
        (found.streams[0], "id"),
    ]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field, None)


def test_a_score_takes_one_product_of_queries_and_keys() -> None:
    sites = structure("pixart").sites
    assert {(site.kind.value, site.score_flops, site.score_bytes) for site in sites} == {
        ("self-attention", 2 * 2 * 2 * 64 * 64 * 16, 4 * 2 * 2 * 16 * (64 + 64)),
        ("cross-attention", 2 * 2 * 2 * 64 * 12 * 16, 4 * 2 * 2 * 16 * (64 + 12)),
        ("mlp", 0, 0),
    }


def test_a_site_knows_its_label_and_its_size() -> None:
    site = structure("pixart").sites[4]
    assert site.label == "1.cross-attention"
    assert site.core_bytes == 2 * 64 * 32 * 4


# Dependence -----------------------------------------------------------------------------------------------------------


def dependences(name: str, ending: str) -> list[set[Role]]:
    """What the linear layers whose weight's name ends like this depend on, apart from parameters."""
    found, facts = captured(name), structure(name).dependence
    placeholders = [node for node in found.graph.nodes if node.op == "placeholder"]
    weights = {n for n, i in zip(placeholders, found.inputs, strict=True) if i.name.endswith(f"{ending}.weight")}
    assert weights, f"no parameter of {name} ends with {ending}"
    return [set(facts[user.name]) - {Role.PARAMETER} for weight in weights for user in weight.users]


@pytest.mark.parametrize("ending", ["attn2.to_k", "attn2.to_v", "caption_projection.linear_2"])
def test_text_keys_and_values_of_pixart_do_not_depend_on_latent_or_timestep(ending: str) -> None:
    assert all(roles == {Role.CONDITIONING} for roles in dependences("pixart", ending))


@pytest.mark.parametrize(
    ("name", "ending", "expected"),
    [
        ("dit", "norm1.linear", {Role.TIMESTEP, Role.CONDITIONING}),
        ("plain_dit", "modulation.1", {Role.TIMESTEP, Role.CONDITIONING}),
        ("pixart", "adaln_single.linear", {Role.TIMESTEP}),
        ("flux", "norm1.linear", {Role.TIMESTEP, Role.CONDITIONING}),
    ],
)
def test_modulation_does_not_depend_on_the_latent(name: str, ending: str, expected: set[Role]) -> None:
    assert all(roles == expected for roles in dependences(name, ending))


@pytest.mark.parametrize("name", MODELS)
def test_every_core_depends_on_the_latent(name: str) -> None:
    found = structure(name)
    assert all(Role.LATENT in found.dependence[site.core] for site in found.sites)


def test_text_queries_of_the_first_block_do_not_depend_on_the_latent_and_later_ones_do() -> None:
    first, second, *_ = dependences_in_order("sd3", "attn.add_q_proj")
    assert Role.LATENT not in first
    assert Role.LATENT in second


def dependences_in_order(name: str, ending: str) -> list[set[Role]]:
    return [dependences(name, f"transformer_blocks.{b}.{ending}")[0] for b in range(3)]
