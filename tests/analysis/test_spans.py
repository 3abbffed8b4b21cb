"""Spans of the archetypes, whose keys are whose in joint attention, and what a stored attention makes possible."""

from __future__ import annotations

import pytest
import torch

from dicompile.analysis import WHOLE, Analysis, ModelStructure, Probe, SiteKind, TokenWise, Trunk, analyse
from tests.capture.captured import captured, node_of, structure
from tests.models import sd3
from tests.models import structure as structure_of

# Runs of sites per block, and of the stack; the last run of each kind that the output reads.
BLOCKS = {
    "dit": [(0, 1), (2, 3), (4, 5)],
    "plain_dit": [(0, 1), (2, 3), (4, 5)],
    "pixart": [(0, 1, 2), (3, 4, 5), (6, 7, 8)],
    "sd3": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)],
    "flux": [(0, 1), (2, 3), (4, 5), (6, 7), (8,), (9,)],
}
STACKS = {
    "dit": [tuple(range(6))],
    "plain_dit": [tuple(range(6))],
    "pixart": [tuple(range(9))],
    "sd3": [(2, 3, 6, 7), (0, 1, 4, 5, 8, 9)],
    "flux": [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9)],
}
LAST = {"dit": (4, 5), "plain_dit": (4, 5), "pixart": (6, 7, 8), "sd3": (8, 9), "flux": (9,)}


def runs(found: ModelStructure, kind: SiteKind) -> list[tuple[int, ...]]:
    return [span.inside for span in found.spans if span.kind is kind]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.sampled
def test_spans_are_runs_of_sites_on_one_stream(name: str) -> None:
    found = structure(name)
    assert runs(found, SiteKind.BLOCK) == BLOCKS[name]
    assert runs(found, SiteKind.STACK) == STACKS[name]
    for span in found.spans:
        members = [found.sites[i] for i in span.inside]
        assert {site.stream for site in members} == {span.stream}
        assert (span.source, span.add) == (members[0].source, members[-1].add)
        assert span.shape == members[-1].shape


@pytest.mark.parametrize("name", BLOCKS)
def test_spans_are_numbered_after_the_sites(name: str) -> None:
    found = structure(name)
    assert [site.id for site in found.everything] == list(range(len(found.sites) + len(found.spans)))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_output_reads_the_last_block_and_the_last_stack_alone(name: str) -> None:
    last = [span for span in structure(name).spans if span.is_last]
    assert [(span.kind.value, span.inside) for span in last] == [("block", LAST[name]), ("stack", STACKS[name][-1])]


@pytest.mark.parametrize("name", BLOCKS)
def test_stacks_cost_what_their_sites_cost_and_a_little_for_modulation(name: str) -> None:
    found = structure(name)
    inside = sum(site.flops for site in found.sites)
    stacks = sum(span.flops for span in found.spans if span.kind is SiteKind.STACK)
    assert inside <= stacks <= found.flops
    assert stacks <= 1.05 * inside


@pytest.mark.parametrize("name", ["dit", "plain_dit", "pixart", "flux"])
def test_a_block_costs_what_its_sites_cost_and_a_little_for_modulation(name: str) -> None:
    found = structure(name)
    for span in found.spans:
        inside = sum(found.sites[i].flops for i in span.inside)
        if span.kind is SiteKind.BLOCK:
            assert inside <= span.flops <= 1.08 * inside


def test_joint_attention_knows_the_keys_of_its_own_tokens() -> None:
    """Text comes first in FLUX, the image in SD3."""
    joint = {
        name: [site.keys for site in structure(name).sites if site.kind is SiteKind.JOINT_ATTENTION]
        for name in ("flux", "sd3")
    }
    assert joint["flux"] == [(6, 16), (0, 6)] * 2
    assert joint["sd3"] == [(0, 64), (64, 8)] * 2 + [(0, 64)]


def test_text_that_is_no_stream_still_has_its_place_among_the_keys() -> None:
    attention = structure_of(sd3(1)).sites[0]
    assert (attention.kind, attention.keys) == (SiteKind.SELF_ATTENTION, (0, 64))


@pytest.mark.parametrize("name", BLOCKS)
def test_only_attention_over_its_own_tokens_has_keys(name: str) -> None:
    found = structure(name)
    for site in found.sites:
        if site.kind in (SiteKind.SELF_ATTENTION, SiteKind.PARALLEL):
            assert site.keys == (0, site.tokens.count)
        elif site.kind in (SiteKind.MLP, SiteKind.CROSS_ATTENTION):
            assert site.keys == (0, 0)


def test_attention_of_joint_and_parallel_branches_keeps_tokens_apart_by_query_or_when_stored() -> None:
    for site in structure("flux").sites:
        assert site.tokens.stored == site.kind.is_attention
        assert (site.tokens.wise is TokenWise.QUERIES) == site.kind.is_attention


def test_a_stack_is_never_token_wise() -> None:
    for name in BLOCKS:
        for span in structure(name).spans:
            if span.kind is SiteKind.STACK:
                assert span.tokens.wise is TokenWise.NO
                assert span.tokens.reason == "tokens of later blocks attend to all tokens of earlier ones"
            else:
                joint = any(structure(name).sites[i].kind is SiteKind.JOINT_ATTENTION for i in span.inside)
                assert span.tokens.wise is (TokenWise.NO if joint else TokenWise.QUERIES)
                assert not joint or span.tokens.reason == "another stream needs the same attention over all tokens"


@pytest.mark.parametrize("count", [1, 2])
def test_the_probe_is_what_the_first_blocks_add_to_the_stream_of_the_latent(count: int) -> None:
    capture = captured("flux")
    found = analyse(capture, Trunk(before=count, probe=Probe.RESIDUAL))
    probe, blocks = found.probe, [s for s in found.spans if s.kind is SiteKind.BLOCK]
    assert probe is not None
    image = [span for span in blocks if span.stream == probe.stream]
    assert (probe.source, probe.add) == (image[0].source, image[count - 1].add)
    assert probe.inside == tuple(i for span in image[:count] for i in span.inside)
    stack = [span for span in found.spans if span.kind is SiteKind.STACK]
    assert {found.sites[i].block for span in stack for i in span.inside} == set(range(count, 4))


def test_the_modulated_probe_is_what_enters_the_first_product() -> None:
    capture = captured("plain_dit")
    probe = analyse(capture, Trunk(probe=Probe.MODULATED)).probe
    assert probe is not None
    node = node_of(capture, probe.core)
    assert [user.target for user in node.users] == [torch.ops.aten.linear.default]
    assert node.target is torch.ops.aten.add.Tensor  # x * (1 + scale) + shift


@pytest.mark.parametrize(
    ("name", "width", "modulations"), [("plain_dit", 32, 6), ("pixart", 32, 6), ("flux", 32, 6), ("dit", 32, 6)]
)
def test_what_the_timestep_becomes_is_watched_before_the_modulation_and_after(
    name: str, width: int, modulations: int
) -> None:
    capture = captured(name)
    product, embedding = (
        analyse(capture, Trunk(probe=probe)).probe for probe in (Probe.MODULATION, Probe.EMBEDDING)
    )  # fmt: skip
    assert product is not None
    assert embedding is not None
    assert node_of(capture, product.core).target is torch.ops.aten.linear.default
    assert product.shape[-1] == modulations * width
    assert embedding.shape[-1] == width
    activation = node_of(capture, product.core).all_input_nodes[0]
    assert activation.target is torch.ops.aten.silu.default
    assert node_of(capture, embedding.core) in activation.all_input_nodes


def test_the_latent_is_watched_where_it_comes_in() -> None:
    capture = captured("flux")
    probe = analyse(capture, Trunk(probe=Probe.LATENT)).probe
    assert probe is not None
    assert probe.is_given
    assert node_of(capture, probe.core).op == "placeholder"
    assert probe.shape == (1, 16, 4)


@pytest.mark.parametrize(("name", "there"), [("flux", True), ("plain_dit", True), ("pixart", False), ("dit", False)])
def test_the_model_is_a_span_where_its_output_can_be_added_to_its_latent(name: str, there: bool) -> None:
    found = analyse(captured(name), Trunk(model=True))
    assert (found.whole is not None) == there
    if found.whole is not None:
        assert found.whole.inside == tuple(site.id for site in found.sites)
        assert found.whole.flops == found.flops
        assert found.probe is None
    assert analyse(captured(name)).whole is None


def test_where_no_stream_goes_through_all_first_blocks_there_is_no_probe() -> None:
    found = analyse(
        captured("flux"), Trunk(before=3, probe=Probe.RESIDUAL)
    )  # text and image are joined before the third
    assert found.probe is None


def test_one_analysis_serves_every_trunk() -> None:
    capture, trunks = captured("flux"), (WHOLE, Trunk(before=1, after=1), Trunk(before=1, probe=Probe.RESIDUAL))
    analysis = Analysis(capture)
    assert [analysis.structure(trunk) for trunk in trunks] == [analyse(capture, trunk) for trunk in trunks]
    assert analysis.structure(Trunk(before=1)) is analysis.structure(Trunk(before=1))
