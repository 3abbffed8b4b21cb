"""Exchanges around an attention become a part of it where they are Ulysses, and stay where they are anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from dicompile.capture.functional import make_functional
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import mask_of, open_attention
from dicompile.ops.collectives import groups_of, is_collective, ranks_of
from dicompile.ops.cost import node_flops, score_work
from dicompile.ops.kinds import ATTENTION
from dicompile.ops.layout import Layout, Of
from dicompile.ops.tokens import MixesTokens
from dicompile.ops.ulysses import ULYSSES

RANKS, GROUP = 2, "0"
SHAPES = [(2, 3, 4, 8), (1, 3, 2, 8), (1, 1, 4, 8), (3, 2, 2, 2), (4, 4, 4, 4)]
"""[b, n, h, d] of one rank."""


def sent(flat: Tensor, sizes: list[int] | None = None) -> Tensor:
    sizes = sizes or [flat.numel() // RANKS] * RANKS
    return torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_to_all_single(flat, sizes, sizes, GROUP)
    )


def some_heads(own: Tensor, order: tuple[int, ...] = (2, 1, 0, 3, 4)) -> Tensor:
    """As diffusers has it; [b, ranks * n, h / ranks, d]."""
    batch, tokens, heads, width = own.shape
    parts = own.reshape(batch, tokens, RANKS, heads // RANKS, width).permute(order).contiguous()
    return sent(parts.flatten()).reshape(parts.shape).flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def own_tokens(some: Tensor, order: tuple[int, ...] = (1, 3, 0, 2, 4), turn: bool = False) -> Tensor:
    batch, tokens, heads, width = some.shape
    parts = some.reshape(batch, RANKS, tokens // RANKS, heads, width).permute(order).contiguous()
    parts = sent(parts.flatten()).reshape(parts.shape)
    if turn:  # the heads of the ranks the other way round
        parts = parts.transpose(0, 1).reshape(parts.shape)
    return parts.flatten(0, 1).permute(1, 2, 0, 3).contiguous()


def attended(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    query, key, value = (each.permute(0, 2, 1, 3) for each in (query, key, value))
    return scaled_dot_product_attention(query, key, value, **given).permute(0, 2, 1, 3)


def ulysses(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return own_tokens(attended(*map(some_heads, (query, key, value)), scale=0.5)).flatten(2, 3)


def functional(forward: Callable[..., Tensor], *shapes: tuple[int, ...]) -> fx.Graph:
    with torch.no_grad(), FakeTensorMode() as mode:
        operands = [torch.empty(shape) for shape in shapes]
        graph = make_functional(
            make_fx(lambda *own: (forward(*own),), pre_dispatch=True)(*operands), operands, mode
        ).graph_module.graph
    graph.lint()
    return graph


def calls(graph: fx.Graph, target: object) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is target]


@pytest.mark.parametrize("shape", SHAPES)
def test_ulysses_is_one_attention_of_the_tokens_of_a_rank(shape: tuple[int, ...]) -> None:
    batch, tokens, heads, width = shape
    keys = (batch, tokens + 2, heads, width)
    graph = functional(ulysses, shape, keys, keys)
    (attention,) = calls(graph, ULYSSES)
    assert [node for node in graph.nodes if is_collective(node)] == [attention]
    assert not calls(graph, ATTENTION)
    assert attention.kwargs == {"ranks": RANKS, "group": GROUP, "scale": 0.5}
    assert tensor_of(attention).shape == (batch, heads, tokens, width)
    assert groups_of(graph) == (GROUP,)
    operands = list(graph.find_nodes(op="placeholder"))
    assert [operand.args[0] for operand in attention.args] == operands  # each turned, heads first


def test_its_operations_are_those_that_a_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [SHAPES[0]] * 3
    (one,) = calls(functional(ulysses, *shapes), ULYSSES)
    monkeypatch.setattr("dicompile.capture.functional.fold_exchanges", lambda _: None)
    (plain,) = calls(functional(ulysses, *shapes), ATTENTION)
    assert (ranks_of(plain), ranks_of(one)) == (1, RANKS)
    assert node_flops(one) == node_flops(plain)
    assert score_work(one)[0] == score_work(plain)[0]


def masked(query: Tensor, key: Tensor, value: Tensor, rows: int = 1) -> Tensor:
    some = [some_heads(each) for each in (query, key, value)]
    mask = torch.ones(len(query), 1, rows, some[1].shape[1], dtype=torch.bool)
    return own_tokens(attended(*some, attn_mask=mask))


def test_a_mask_of_the_keys_of_all_ranks_stays_with_it() -> None:
    (attention,) = calls(functional(masked, *[SHAPES[0]] * 3), ULYSSES)
    assert mask_of(attention) is attention.args[3]


def test_chosen_queries_cannot_take_a_mask_of_keys_with_them() -> None:
    def opened(forward: Callable[..., Tensor]) -> Layout:
        (attention,) = calls(functional(forward, *[SHAPES[0]] * 3), ULYSSES)
        of_tokens = {
            node_argument(attention, i): Layout.of_stream(tensor_of(node_argument(attention, i)).shape, [2])
            for i in range(3)
        }  # fmt: skip
        return open_attention(attention, of_tokens).layout

    assert opened(ulysses).counts(2, Of.TOKENS)
    with pytest.raises(MixesTokens, match="a value for every key of other ranks"):
        opened(masked)


def with_other_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return own_tokens(attended(some_heads(query), some_heads(key) * 2, some_heads(value)))


NOT_ULYSSES: dict[str, Callable[..., Tensor]] = {
    "mask of every query": lambda *own: masked(*own, rows=own[0].shape[1] * RANKS),
    "causal": lambda *own: own_tokens(attended(*map(some_heads, own), is_causal=True)),
    "keys are changed on the way": with_other_keys,
    "output is used before": lambda *own: own_tokens(some := attended(*map(some_heads, own))) + some.sum(),
    "output stays away": lambda *own: attended(*map(some_heads, own)),
    "heads come back in another order": lambda *own: own_tokens(attended(*map(some_heads, own)), turn=True),
    "samples and tokens change places": lambda *own: own_tokens(
        attended(*(some_heads(each, (2, 0, 1, 3, 4)) for each in own))
    ),
    "heads and tokens change places": lambda *own: own_tokens(
        attended(*map(some_heads, own)), (1, 2, 0, 3, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ULYSSES)
def test_what_is_not_proved_to_be_ulysses_stays(name: str) -> None:
    shape = (4, 4, 4, 4)  # axes that no size tells from each other
    graph = functional(NOT_ULYSSES[name], shape, shape, shape)
    assert not calls(graph, ULYSSES)
    assert len(calls(graph, ATTENTION)) == 1
