"""Each rule of the token axis: what passes it along, to which axis, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.analysis.tokens import token_layouts
from dicompile.ops.layout import Layout, Of
from dicompile.ops.tokens import Carried, MixesTokens

BATCH, TOKENS, WIDTH = 2, 6, 8
Function = Callable[..., Any]


PRODUCT = "multiplies values of different tokens with each other"


def traced(function: Function, *others: Tensor, stream: Tensor | None = None) -> tuple[fx.Node, list[fx.Node]]:
    """The stream and the operators of ``function(stream, *others)``."""
    stream = torch.randn(BATCH, TOKENS, WIDTH) if stream is None else stream
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(stream, *others).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return placeholders[0], [node for node in graph.nodes if node.op == "call_function"]


STREAM = Layout.of_stream((BATCH, TOKENS, WIDTH), [1])


def carried(function: Function, *others: Tensor) -> Carried:
    """What the last operator does to tokens."""
    stream, region = traced(function, *others)
    return token_layouts(region, stream, STREAM)[region[-1]]


def axis_after(function: Function, *others: Tensor) -> int:
    layout = carried(function, *others).layout
    (axis,) = (axis for axis in range(len(layout.axes)) if layout.counts(axis, Of.TOKENS))
    assert layout.size(axis) == TOKENS
    return axis


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
        (lambda x: F.layer_norm(x, [TOKENS, WIDTH]), (), "aten.layer_norm.default normalises over tokens"),
        (
            lambda x: x.view(BATCH, 4, 12),
            (),
            "aten.view.default folds tokens into another axis ([2, 6, 8] to [2, 4, 12])",
        ),
        (lambda x: x[:1], (), "aten.slice.Tensor takes a range of samples"),
        (lambda x: x[0], (), "aten.select.int picks one sample"),
        (lambda x: x.mean(0), (), "aten.mean.dim combines all samples"),
        (lambda x: F.group_norm(x.transpose(1, 2), 2), (), "aten.group_norm.default normalises over tokens"),
        (lambda x: x.flip(1), (), "aten.flip.default reverses tokens"),
        (lambda x: F.pad(x, (0, 0, 1, 0)), (), "aten.pad.default pads tokens"),
        (lambda x: x.repeat(1, 2, 1), (), "aten.repeat.default repeats tokens"),
        (lambda x: x.repeat_interleave(2, 1), (), "aten.repeat_interleave.self_int repeats tokens"),
        (lambda x, i: x.index_select(1, i), (torch.arange(3),), "aten.index_select.default picks tokens"),
        (lambda x: x @ x.transpose(1, 2), (), f"aten.matmul.default {PRODUCT}"),
        (lambda x: x.transpose(1, 2) @ x, (), f"aten.matmul.default {PRODUCT}"),
        (lambda x: torch.einsum("bnd,bmd->bnm", x, x), (), f"aten.einsum.default {PRODUCT}"),
        (
            lambda x, y: torch.ops.aten.slice_scatter.default(y, x, 1, 2, 2 + TOKENS),
            (torch.randn(BATCH, 9, WIDTH),),
            "aten.slice_scatter.default writes to some of the tokens",
        ),
        (
            lambda x, y: torch.cat([y, x], 1)[:, 1:4],
            (torch.randn(BATCH, 3, WIDTH),),
            "aten.slice.Tensor takes rows beside the tokens, or a range of them",
        ),
        (
            lambda x, y: torch.cat([y, x], 1).view(BATCH, 3, 3, WIDTH),
            (torch.randn(BATCH, 3, WIDTH),),
            "aten.view.default folds tokens into another axis ([2, 9, 8] to [2, 3, 3, 8])",
        ),
        (
            lambda x, w: x.view(BATCH, 2, 3, WIDTH) @ w,
            (torch.randn(2, WIDTH, 5),),
            "aten.matmul.default has an operand with values for groups of tokens",
        ),
        (lambda x: x.chunk(2, 1)[0], (), "aten.chunk.default splits the token axis"),
        (lambda x: x.split(3, 1)[0], (), "aten.split.Tensor splits the token axis"),
        (lambda x: x.split([2, 4], 1)[0], (), "aten.split_with_sizes.default splits the token axis"),
        (lambda x: x[:, 2:], (), "aten.slice.Tensor takes a range of tokens"),
        (lambda x: x[:, 0], (), "aten.select.int picks one token"),
        (lambda x: x.unbind(1)[0], (), "aten.unbind.int takes tokens apart"),
        (lambda x: torch.cat([x, x], 1), (), "aten.cat.default joins tokens with others"),
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
            lambda x, k: F.scaled_dot_product_attention(heads(x), k, k, is_causal=True),
            (KEYS,),
            "aten.scaled_dot_product_attention.default lets every token see those before it",
        ),
        (
            lambda x, k: F.scaled_dot_product_attention(k, k[:, :, :TOKENS], k[:, :, :TOKENS], x[:, None, None, :, 0]),
            (torch.randn(BATCH, 2, 7, 4),),
            "aten.scaled_dot_product_attention.default reads keys and values of all tokens",
        ),
        (lambda x: x.mean(1), (), "aten.mean.dim combines all tokens"),
        (lambda x: x.sum(), (), "aten.sum.default combines all tokens"),
        (lambda x: x.cumsum(1), (), "aten.cumsum.default adds up tokens"),
        (lambda x: x.softmax(1), (), "aten.softmax.int normalises over tokens"),
        (lambda x: x.sort(1), (), "aten.sort.default is not known to keep tokens apart"),
        (
            lambda x, w: F.conv1d(x.transpose(1, 2), w),
            (torch.randn(WIDTH, WIDTH, 3),),
            "aten.conv1d.default mixes neighbouring tokens",
        ),
        (
            F.conv1d,
            (torch.randn(WIDTH, TOKENS, 1),),
            "aten.conv1d.default contracts the token axis",
        ),
    ],
)
def test_mixing_of_tokens_is_refused_with_the_operator_and_why(
    function: Function, others: tuple[Tensor, ...], why: str
) -> None:
    with pytest.raises(MixesTokens) as error:
        axis_after(function, *others)
    assert str(error.value) == why


@pytest.mark.parametrize("place", [0, 1, 2], ids=["input", "weight", "bias"])
def test_tokens_that_serve_as_weights_are_refused(place: int) -> None:
    def function(x: Tensor, *others: Tensor) -> Tensor:
        given = list(others)
        given[place] = x.view(TOKENS) if place == 2 else x.view(TOKENS, WIDTH) if place else x.transpose(1, 2)
        return F.linear(*given)

    width = 1 if place == 2 else WIDTH
    others = torch.randn(3, WIDTH), torch.randn(TOKENS, TOKENS if place == 0 else WIDTH), torch.randn(TOKENS)
    stream, region = traced(function, *others, stream=torch.randn(1, TOKENS, width))
    with pytest.raises(MixesTokens):
        token_layouts(region, stream, Layout.of_stream((1, TOKENS, width), [1]))


def test_what_does_not_come_from_the_stream_has_no_token_axis() -> None:
    stream, region = traced(lambda x, y: x + (y * 2).exp(), TABLE)
    assert [node in token_layouts(region, stream, STREAM) for node in region] == [False, False, True]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (torch.randn(TOKENS, WIDTH), "[2s, 6t, 8]"),
        (torch.randn(1, TOKENS, 1), "[2s, 6t, 1]"),
        (torch.randn(BATCH, TOKENS, WIDTH), "[2s, 6t, 8]"),
        (torch.randn(1, WIDTH), None),
        (torch.randn(WIDTH), None),
        (torch.randn(BATCH, 1, 1), None),
    ],
)
def test_operands_with_one_value_per_token_are_named_with_their_layout(table: Tensor, expected: str | None) -> None:
    assert [str(layout) for layout in carried(lambda x, y: x * y, table).operands.values()] == [expected][
        : bool(expected)
    ]


@pytest.mark.parametrize(
    ("function", "others", "layout"),
    [
        (lambda x: x.view(BATCH * TOKENS, WIDTH), (), "[2s 6t, 8]"),
        (lambda x: x.view(BATCH, 2, 3, WIDTH), (), "[2s, 2t, 3t, 8]"),
        (lambda x: x.view(BATCH, 2, 3, WIDTH).permute(0, 3, 2, 1), (), "[2s, 8, 3t, 2t]"),
        (lambda x: x.view(BATCH, 2, 3, WIDTH).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH), (), "[2s, 3t 2t, 8]"),
        (lambda x: x.view(BATCH, 2, 3, WIDTH).view(BATCH, -1, WIDTH), (), "[2s, 6t, 8]"),
        (lambda x: heads(x).reshape(-1, TOKENS, 4), (), "[2s 2, 6t, 4]"),
        (lambda x, y: torch.cat([y, x, y], 1), (torch.randn(BATCH, 3, WIDTH),), "[2s, 3+6t+3, 8]"),
        (lambda x, y: torch.cat([y, x], 1)[:, 2:], (torch.randn(BATCH, 3, WIDTH),), "[2s, 1+6t, 8]"),
        (lambda x, y: torch.cat([x, y], 1)[:, :TOKENS], (torch.randn(BATCH, 3, WIDTH),), "[2s, 6t, 8]"),
        (lambda x, y: torch.cat([y, x], 1).split([3, TOKENS], 1)[1], (torch.randn(BATCH, 3, WIDTH),), "[2s, 6t, 8]"),
    ],
)
def test_parts_of_axes_are_followed(function: Function, others: tuple[Tensor, ...], layout: str) -> None:
    assert str(carried(function, *others).layout) == layout


@pytest.mark.parametrize("seed", range(3))
def test_a_carried_axis_means_that_tokens_can_be_permuted_before_or_after(seed: int) -> None:
    """What the axis stands for: permuting the stream's tokens permutes the result along it, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    order = torch.randperm(TOKENS, generator=generator)
    cases: list[tuple[Function, tuple[Tensor, ...]]] = [
        (lambda x, w: F.layer_norm(heads(F.linear(x, w)).permute(0, 3, 2, 1), [2]), (WEIGHT,)),
        (lambda x, k: F.scaled_dot_product_attention(heads(x), k, k).transpose(1, 2).reshape(2, TOKENS, 8), (KEYS,)),
        (lambda x: torch.cat([x.chunk(2, -1)[1], x[..., :1] * 2], -1).unsqueeze(0), ()),
    ]
    for function, others in cases:
        axis = axis_after(function, *others)
        result = function(x[:, order], *others)
        torch.testing.assert_close(result, function(x, *others).index_select(axis, order))
