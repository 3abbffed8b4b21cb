from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.analysis import analyse, node_flops
from dicompile.analysis.cost import is_heavy, node_bytes
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


# Single operators -----------------------------------------------------------------------------------------------------


def only_node(function: object, *arguments: torch.Tensor) -> torch.fx.Node:
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*arguments).graph
    (node,) = [node for node in graph.nodes if node.op == "call_function"]
    return node


X = torch.zeros(2, 6, 8)
QUERY, KEY, VALUE = torch.zeros(2, 3, 6, 4), torch.zeros(2, 3, 10, 4), torch.zeros(2, 3, 10, 5)


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (torch.nn.functional.linear, (X, torch.zeros(5, 8)), 2 * 2 * 6 * 8 * 5),
        (torch.nn.functional.linear, (X, torch.zeros(5, 8), torch.zeros(5)), 2 * 2 * 6 * 8 * 5),
        (torch.matmul, (X, torch.zeros(8, 5)), 2 * 2 * 6 * 8 * 5),
        (torch.bmm, (X, torch.zeros(2, 8, 5)), 2 * 2 * 6 * 8 * 5),
        (torch.addmm, (torch.zeros(5), torch.zeros(6, 8), torch.zeros(8, 5)), 2 * 6 * 8 * 5),
        (torch.baddbmm, (torch.zeros(2, 6, 5), X, torch.zeros(2, 8, 5)), 2 * 2 * 6 * 8 * 5),
        (torch.nn.functional.conv2d, (torch.zeros(2, 4, 6, 6), torch.zeros(5, 4, 3, 3)), 2 * (2 * 5 * 4 * 4) * 4 * 9),
        (lambda x, w: torch.conv1d(x, w, groups=6), (X, torch.zeros(6, 1, 3)), 2 * (2 * 6 * 6) * 3),
        (
            torch.nn.functional.scaled_dot_product_attention,
            (QUERY, KEY, VALUE),
            2 * (2 * 3 * 6 * 10 * 4) + 2 * (2 * 3 * 6 * 10 * 5),
        ),
        (torch.mul, (X, X), 0),
        (torch.softmax, (X, -1), 0),
    ],
)
def test_matrix_products_count_two_operations_per_multiplication_and_the_rest_none(
    function: object, arguments: tuple[torch.Tensor, ...], flops: int
) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    rest = arguments[len(tensors) :]
    node = only_node(lambda *given: function(*given, *rest), *tensors)  # type: ignore[operator]
    assert node_flops(node) == flops
    assert is_heavy(node) == bool(flops)


def test_bytes_are_what_is_read_and_written_and_views_are_free() -> None:
    x, scale = torch.zeros(2, 6, 8), torch.zeros(8, dtype=torch.bfloat16)
    assert node_bytes(only_node(torch.mul, x, scale)) == 4 * 96 + 2 * 8 + 4 * 96
    assert node_bytes(only_node(lambda x: x.transpose(1, 2), x)) == 0
