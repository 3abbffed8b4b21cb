"""Each rule of the token axis: what passes it along, to which axis, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.analysis.tokens import MixesTokens, per_token_operands, token_axes

BATCH, TOKENS, WIDTH = 2, 6, 8
Function = Callable[..., Any]


def traced(function: Function, *others: Tensor) -> tuple[fx.Node, list[fx.Node]]:
    """The stream and the operators of ``function(stream, *others)``."""
    stream = torch.randn(BATCH, TOKENS, WIDTH)
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(stream, *others).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return placeholders[0], [node for node in graph.nodes if node.op == "call_function"]


def axis_after(function: Function, *others: Tensor) -> int:
    stream, region = traced(function, *others)
    return token_axes(region, stream, 1)[region[-1]]


WEIGHT, SQUARE = torch.randn(WIDTH, WIDTH), torch.randn(TOKENS, TOKENS)
ROW, COLUMN, TABLE = torch.randn(WIDTH), torch.randn(BATCH, 1, WIDTH), torch.randn(TOKENS, WIDTH)
KEYS = torch.randn(BATCH, 2, 5, 4)


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, TOKENS, 2, 4).transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "others", "axis"),
    [
        (lambda x: x + 1, (), 1),
        (lambda x, row: x * row, (ROW,), 1),
        (lambda x, column: x * (1 + column), (COLUMN,), 1),
        (lambda x, table: x + table, (TABLE,), 1),
        (lambda x: F.gelu(x) * x.sigmoid(), (), 1),
        (lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.bfloat16), (), 1),
        (lambda x: x[:, :, None] * x[:, :, :, None], (), 1),
        (F.linear, (WEIGHT,), 1),
        (F.linear, (WEIGHT, ROW), 1),
        (lambda x: F.layer_norm(x, [WIDTH]), (), 1),
        (lambda x, w: F.rms_norm(x, [WIDTH], w), (ROW,), 1),
        (lambda x: x.view(BATCH, TOKENS, 2, 4), (), 1),
        (lambda x: x.reshape(BATCH, TOKENS, 4, 2).reshape(BATCH, TOKENS, WIDTH), (), 1),
        (lambda x: x.view(1, BATCH, TOKENS, WIDTH), (), 2),
        (lambda x: x.transpose(1, 2), (), 2),
        (lambda x: x.transpose(-1, -2), (), 2),
        (lambda x: x.transpose(0, 1), (), 0),
        (lambda x: x.transpose(0, 2), (), 1),
        (lambda x: x.permute(2, 0, 1), (), 2),
        (lambda x: x.permute(-2, -3, -1), (), 0),
        (lambda x: x.unsqueeze(0), (), 2),
        (lambda x: x.unsqueeze(1), (), 2),
        (lambda x: x.unsqueeze(2), (), 1),
        (lambda x: x.unsqueeze(-1), (), 1),
        (lambda x: x[..., 2:5], (), 1),
        (lambda x: x[:1], (), 1),
        (lambda x: x[0], (), 0),
        (lambda x: x[..., 0], (), 1),
        (lambda x: x.chunk(2, -1)[1], (), 1),
        (lambda x: x.split([3, 5], 2)[0], (), 1),
        (lambda x: x.unbind(2)[3], (), 1),
        (lambda x: x.view(BATCH, TOKENS, 2, 4).permute(2, 0, 1, 3).unbind(0)[1], (), 1),
        (lambda x: torch.cat([x, x.exp()], -1), (), 1),
        (lambda x, k: F.scaled_dot_product_attention(heads(x), k, k), (KEYS,), 2),
        (lambda x, k, m: F.scaled_dot_product_attention(heads(x), k, k, m), (KEYS, torch.zeros(BATCH, 1, 1, 5)), 2),
    ],
)
def test_the_token_axis_is_carried_to(function: Function, others: tuple[Tensor, ...], axis: int) -> None:
    assert axis_after(function, *others) == axis


@pytest.mark.parametrize(
    ("function", "others", "why"),
    [
        (lambda x: x[:, None] - x[:, :, None], (), "aten.sub.Tensor combines tokens along different axes"),
        (lambda x, w: F.linear(x.transpose(1, 2), w), (SQUARE,), "aten.linear.default contracts the token axis"),
        (lambda x, w: F.linear(w, x[0]), (WEIGHT,), "aten.linear.default contracts the token axis"),
        (lambda x: F.linear(x, x[0]), (), "aten.linear.default contracts the token axis"),
        (lambda x: F.layer_norm(x, [TOKENS, WIDTH]), (), "aten.layer_norm.default normalises over tokens"),
        (
            lambda x: x.view(BATCH * TOKENS, WIDTH),
            (),
            "aten.view.default folds tokens into another axis ([2, 6, 8] to [12, 8])",
        ),
        (
            lambda x: x.view(BATCH, 2, 3, WIDTH),
            (),
            "aten.view.default folds tokens into another axis ([2, 6, 8] to [2, 2, 3, 8])",
        ),
        (lambda x: x.chunk(2, 1)[0], (), "aten.chunk.default splits the token axis"),
        (lambda x: x.split(3, 1)[0], (), "aten.split.Tensor splits the token axis"),
        (lambda x: x.split([2, 4], 1)[0], (), "aten.split_with_sizes.default splits the token axis"),
        (lambda x: x[:, 2:], (), "aten.slice.Tensor takes a range of tokens"),
        (lambda x: x[:, 0], (), "aten.select.int picks one token"),
        (lambda x: x.unbind(1)[0], (), "aten.unbind.int takes tokens apart"),
        (lambda x: torch.cat([x, x], 1), (), "aten.cat.default joins tokens with others"),
        (
            lambda x, y: torch.cat([x, y], -1),
            (torch.randn(BATCH, TOKENS, 1),),
            "aten.cat.default joins tokens with others",
        ),
        (
            lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
            (),
            "aten.scaled_dot_product_attention.default reads keys and values of all tokens",
        ),
        (
            lambda x, k: F.scaled_dot_product_attention(k, heads(x), heads(x)),
            (KEYS,),
            "aten.scaled_dot_product_attention.default reads keys and values of all tokens",
        ),
        (
            lambda x, k, m: F.scaled_dot_product_attention(heads(x), k, k, m),
            (KEYS, torch.zeros(BATCH, 1, TOKENS, 5)),
            "aten.scaled_dot_product_attention.default has a mask of its own for every token",
        ),
        (
            lambda x, k: F.scaled_dot_product_attention(heads(x), k, k, is_causal=True),
            (KEYS,),
            "aten.scaled_dot_product_attention.default has a mask of its own for every token",
        ),
        (
            lambda x, k: F.scaled_dot_product_attention(k, k, k, x[:, None, None, :, 0]),
            (torch.randn(BATCH, 2, TOKENS, 4),),
            "aten.scaled_dot_product_attention.default has a mask of its own for every token",
        ),
        (lambda x: F.layer_norm(x, [WIDTH], x[0, 0]), (), "aten.select.int picks one token"),
        (
            lambda x, k: F.scaled_dot_product_attention(x.view(BATCH, TOKENS, 2, 4), k, k),
            (torch.randn(BATCH, TOKENS, 5, 4),),
            "aten.scaled_dot_product_attention.default attends along another axis than tokens",
        ),
        (lambda x: x.mean(1), (), "aten.mean.dim is not known to keep tokens apart"),
        (lambda x: x.cumsum(1), (), "aten.cumsum.default is not known to keep tokens apart"),
        (lambda x: x.softmax(1), (), "aten.softmax.int is not known to keep tokens apart"),
        (
            lambda x, w: F.conv1d(x.transpose(1, 2), w),
            (torch.randn(WIDTH, WIDTH, 3),),
            "aten.conv1d.default is not known to keep tokens apart",
        ),
    ],
)
def test_mixing_of_tokens_is_refused_with_the_operator_and_why(
    function: Function, others: tuple[Tensor, ...], why: str
) -> None:
    with pytest.raises(MixesTokens) as error:
        axis_after(function, *others)
    assert str(error.value) == why


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (lambda x, y: F.linear(y, x[0]), WEIGHT),
        (lambda x, y: F.linear(x[0], y, x[0, :, 0]), torch.randn(TOKENS, WIDTH)),
        (lambda x, y: F.layer_norm(F.linear(x, y), [TOKENS], x[0, :, 0]), torch.randn(TOKENS, WIDTH)),
    ],
    ids=["weight", "bias", "norm"],
)
def test_tokens_that_serve_as_weights_are_refused(function: Function, other: Tensor) -> None:
    with pytest.raises(MixesTokens):
        axis_after(function, other)


def test_what_does_not_come_from_the_stream_has_no_token_axis() -> None:
    stream, region = traced(lambda x, y: x + (y * 2).exp(), TABLE)
    assert [node in token_axes(region, stream, 1) for node in region] == [False, False, True]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (torch.randn(TOKENS, WIDTH), 0),
        (torch.randn(1, TOKENS, 1), 1),
        (torch.randn(BATCH, TOKENS, WIDTH), 1),
        (torch.randn(1, WIDTH), None),
        (torch.randn(WIDTH), None),
        (torch.randn(BATCH, 1, 1), None),
    ],
)
def test_operands_with_one_value_per_token_are_named_with_their_axis(table: Tensor, expected: int | None) -> None:
    stream, region = traced(lambda x, y: x * y, table)
    found = per_token_operands(region[-1], token_axes(region, stream, 1))
    assert [axis for _, axis in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("seed", range(3))
def test_a_carried_axis_means_that_tokens_can_be_permuted_before_or_after(seed: int) -> None:
    """What the axis stands for: permuting the stream's tokens permutes the result along it, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    order = torch.randperm(TOKENS, generator=generator)
    cases: list[tuple[Function, tuple[Tensor, ...]]] = [
        (lambda x, w: F.layer_norm(heads(F.linear(x, w)).permute(1, 3, 2, 0), [BATCH]), (WEIGHT,)),
        (lambda x, k: F.scaled_dot_product_attention(heads(x), k, k).transpose(1, 2).reshape(2, TOKENS, 8), (KEYS,)),
        (lambda x: torch.cat([x.chunk(2, -1)[1], x[..., :1] * 2], -1).unsqueeze(0), ()),
    ]
    for function, others in cases:
        axis = axis_after(function, *others)
        result = function(x[:, order], *others)
        torch.testing.assert_close(result, function(x, *others).index_select(axis, order))
