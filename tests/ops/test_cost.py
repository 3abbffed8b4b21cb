from __future__ import annotations

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.ops.cost import node_bytes, node_flops
from dicompile.ops.kinds import is_heavy

AROUND = (operator.getitem, torch.ops.aten.t.default)


def only_node(function: object, *arguments: torch.Tensor) -> torch.fx.Node:
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*arguments).graph
    (node,) = [node for node in graph.nodes if node.op == "call_function" and node.target not in AROUND]
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
        (
            lambda query, key: torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True),
            (torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 10, 8)),
            2 * (2 * (2 * 4 * 6 * 10 * 8)),
        ),
        (torch.nn.functional.scaled_dot_product_attention, (X, X, X), 2 * (2 * (2 * 6 * 6 * 8))),
        (torch.nn.functional.conv2d, (torch.zeros(4, 6, 6), torch.zeros(5, 4, 3, 3)), 2 * (5 * 4 * 4) * 4 * 9),
        (torch.matmul, (torch.zeros(3, 1, 6, 8), torch.zeros(2, 8, 5)), 2 * (3 * 2 * 6 * 5) * 8),
        (
            lambda x, w: torch.nn.functional.conv2d(x, w, padding="same"),
            (torch.zeros(2, 4, 6, 6), torch.zeros(5, 4, 3, 3)),
            2 * (2 * 5 * 6 * 6) * 4 * 9,
        ),
        (
            torch.nn.functional.conv_transpose2d,
            (torch.zeros(2, 4, 6, 6), torch.zeros(4, 5, 3, 3)),
            2 * (2 * 4 * 6 * 6) * 5 * 9,
        ),
        (
            lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            (torch.zeros(2, 4, 6, 6), torch.zeros(5, 4, 3, 3)),
            2 * (2 * 5 * 4 * 4) * 4 * 9,
        ),
        (
            lambda a, b, one: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16),
            (torch.zeros(32, 16).to(torch.float8_e4m3fn), torch.zeros(48, 16).to(torch.float8_e4m3fn), torch.ones(())),
            2 * 32 * 16 * 48,
        ),
        (
            torch.ops.aten._scaled_dot_product_flash_attention,
            (torch.zeros(2, 3, 6, 8, device="meta"), *(torch.zeros(2, 3, 10, 8, device="meta"),) * 2),
            2 * (2 * (2 * 3 * 6 * 10 * 8)),
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
