from __future__ import annotations

import pytest
import torch

from dicompile.analysis import analyse, node_flops
from dicompile.capture import capture_model
from tests.capture.captured import captured, structure
from tests.models import PlainDiT

BATCH, TOKENS, WIDTH, LAYERS = 4, 64, 32, 3
ROWS = BATCH * TOKENS


def test_sites_of_plain_dit_cost_what_the_formulas_say() -> None:
    attention = 2 * ROWS * WIDTH * 3 * WIDTH + 4 * ROWS * TOKENS * WIDTH + 2 * ROWS * WIDTH * WIDTH
    mlp = 2 * (2 * ROWS * WIDTH * 4 * WIDTH)
    assert [site.flops for site in structure("plain_dit").sites] == [attention, mlp] * LAYERS


def test_a_call_of_plain_dit_costs_what_the_formulas_say() -> None:
    sites = sum(site.flops for site in structure("plain_dit").sites)
    embed = 2 * ROWS * WIDTH * (4 * 2 * 2)
    time = 2 * (2 * BATCH * WIDTH * WIDTH)
    modulation = LAYERS * 2 * BATCH * WIDTH * 6 * WIDTH + 2 * BATCH * WIDTH * 2 * WIDTH
    head = 2 * ROWS * WIDTH * (2 * 2 * 4)
    assert structure("plain_dit").flops == sites + embed + time + modulation + head


def test_all_work_of_a_token_wise_mlp_shrinks_with_its_tokens_and_all_but_keys_and_values_of_self_attention() -> None:
    sites = structure("plain_dit").sites
    attention, projection = 4 * ROWS * TOKENS * WIDTH, 2 * ROWS * WIDTH * WIDTH
    assert [site.token_flops for site in sites] == [attention + projection, sites[1].flops] * LAYERS
    fused = 3 * projection  # queries come from the same product as keys and values
    assert [site.key_flops for site in sites] == [fused, 0] * LAYERS
    assert [site.attention_flops for site in sites] == [fused + attention, 0] * LAYERS


def test_queries_shrink_where_they_have_a_layer_of_their_own() -> None:
    attention, projection = 4 * ROWS * TOKENS * WIDTH, 2 * ROWS * WIDTH * WIDTH
    sites = structure("dit").sites
    assert [site.key_flops for site in sites] == [2 * projection, 0] * LAYERS
    assert [site.token_flops for site in sites[::2]] == [attention + 2 * projection] * LAYERS
    assert [site.attention_flops for site in sites[::2]] == [attention + 3 * projection] * LAYERS


def test_joint_attention_is_split_between_the_streams_and_the_last_one_does_not_pay_for_the_text_before_it() -> None:
    batch, image, text, width = 2, 64, 8, 32
    keys_and_queries = 3 * 2 * batch * (image + text) * width * width
    attention = keys_and_queries + 4 * batch * (image + text) ** 2 * width
    found = structure("sd3")
    modulation = 2 * batch * width * 2 * width  # of text that the last block only reads
    both = [site.attention_flops for site in found.sites if site.kind.value == "joint-attention"]
    assert both == [attention // 2] * 4 + [attention + modulation]


def test_text_keys_do_not_shrink_with_the_tokens_and_the_shared_caption_projection_is_split_between_its_readers() -> (
    None
):
    batch, text, caption, width, tokens = 2, 12, 24, 32, 64
    queries = 2 * (2 * batch * tokens * width * width) + 4 * batch * tokens * text * width
    keys = 2 * (2 * batch * text * width * width)
    captions = 2 * batch * text * caption * width + 2 * batch * text * width * width
    crossing = [site for site in structure("pixart").sites if site.kind.value == "cross-attention"]
    assert [site.token_flops for site in crossing] == [queries] * 3
    assert [site.flops for site in crossing] == [queries + keys + captions // 3] * 3


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "plain_dit"])
def test_sites_never_cost_more_than_the_model(name: str) -> None:
    found = structure(name)
    assert found.flops == sum(node_flops(node) for node in captured(name).graph.nodes)
    assert 0 < sum(site.flops for site in found.sites) < found.flops
    assert 0 < sum(site.bytes for site in found.sites) < found.bytes
    assert all(0 <= site.token_flops <= site.flops for site in found.everything)
    assert all(0 <= site.attention_flops <= site.flops for site in found.everything)
    assert all(site.key_flops + site.token_flops <= site.flops for site in found.sites if site.tokens.stored)


def test_dit_xl_costs_what_the_papers_say() -> None:
    """23.74 TFLOPs for 50 steps with guidance, counting attention and MLPs; 2 of 28 equal layers are captured."""
    layers = 2
    torch._dynamo.reset()
    with torch.device("meta"):
        model = PlainDiT(layers, width=1152, heads=16, patch=2, size=32).eval()
        inputs = {"x": torch.randn(1, 4, 32, 32), "t": torch.ones(1), "y": torch.ones(1, dtype=torch.int64)}
        found = analyse(capture_model(model, inputs))
    assert len(found.sites) == 2 * layers
    call = sum(site.flops for site in found.sites) * 28 / layers
    assert call * 2 * 50 == pytest.approx(23.74e12, rel=0.01)
