"""Operators for chosen tokens: of every function of a stream, the chosen tokens come out as if all were computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dicompile.analysis.tokens import token_layouts
from dicompile.lower.inductor import Backend, compile_segment
from dicompile.ops.layout import Layout
from dicompile.passes import Segment, TokenCount, Value
from dicompile.passes.edit import Editor
from dicompile.passes.narrow import Narrow

BATCH, TOKENS, WIDTH, COUNT = 2, 6, 8, 4
aten = torch.ops.aten
Function = Callable[..., Tensor]


def for_chosen(function: Function, stream: Tensor, *others: Tensor, alone: bool = False) -> Segment:
    """``function(stream, *others)`` for the first tokens of an order, whose number and the order are further inputs."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        fakes = [mode.from_tensor(value, static_shapes=True) for value in (stream, *others)]
        module = make_fx(function, pre_dispatch=True)(*fakes)
    nodes = list(module.graph.nodes)
    first, last = nodes[0], nodes[-1].args[0]
    samples, tokens = (1, *stream.shape[:-1]) if stream.ndim == 2 else (stream.shape[0], stream[0, ..., 0].numel())
    segment = Segment(module, [Value(i) for i in range(1 + len(others))], [Value(0)], (), None, mode)
    editor = Editor(segment)
    count = editor.int_input(TokenCount(0), below=tokens)
    order = editor.tensor_input(Value(99), (samples, tokens), torch.int64, first)
    axes = [0] if stream.ndim == 2 else list(range(1, stream.ndim - 1))
    found = token_layouts(
        [node for node in nodes if node.op == "call_function"], first, Layout.of_stream(stream.shape, axes)
    )
    with editor.before(nodes[-1]):
        taken = editor.call(aten.slice.Tensor, order, 1, 0, count)
        narrow = Narrow(editor, taken, count, samples, tokens, alone=alone)
        copies = {first: narrow.gather(first, found[first].layout)}
        for node in [node for node in found if node is not first]:
            copies[node] = narrow.copied(node, found[node], copies)
    nodes[-1].args = ([copies[last]],)
    module.graph.eliminate_dead_code()
    module.recompile()
    return segment


def check(
    function: Function, *others: Tensor, stream: Tensor | None = None, mode: str = "eager", alone: bool = False
) -> fx.Graph:
    """Compare with the chosen tokens of the full result; other tokens of the stream hold no number."""
    stream = torch.randn(BATCH, TOKENS, WIDTH) if stream is None else stream
    chosen = torch.stack([torch.randperm(TOKENS) for _ in range(stream.shape[0] if stream.ndim > 2 else 1)])
    rows = chosen[:, :COUNT, None]
    whole = function(stream, *others)
    flat = stream.reshape(len(chosen), TOKENS, -1)
    poisoned = torch.full_like(flat, torch.nan).scatter(
        1, rows.expand(-1, -1, flat.shape[-1]), flat.gather(1, rows.expand(-1, -1, flat.shape[-1]))
    )
    segment = for_chosen(function, stream, *others, alone=alone)
    with torch.no_grad():
        (result,) = compile_segment(segment, Backend(mode))(poisoned.view(stream.shape), *others, COUNT, chosen)
    expected = whole.reshape(len(chosen), TOKENS, -1)
    expected = expected.gather(1, rows.expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(result.reshape(expected.shape), expected)
    return segment.graph


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, WIDTH // 2).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotated_into_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings as Wan writes them, made functional."""
    first, second = x.view(BATCH, TOKENS, 2, 2, 2).unbind(-1)
    out = aten.empty.memory_format([BATCH, TOKENS, 2, 4], dtype=torch.float32, device=torch.device("cpu"))
    out = aten.slice_scatter.default(out, first * cos - second * sin, 3, 0, 9223372036854775807, 2)
    out = aten.slice_scatter.default(out, first * sin + second * cos, 3, 1, 9223372036854775807, 2)
    return out.view(x.shape)


def rotated_as_complex(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads(x).transpose(1, 2).reshape(BATCH, TOKENS, 2, 2, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)).reshape(x.shape)


def through_joined(x: Tensor, text: Tensor, table: Tensor) -> Tensor:
    """Tokens behind those of the text for a while, as joint attention has them."""
    joined = torch.cat([text, x], 1) * table
    return joined[:, text.shape[1] :] + joined.split([text.shape[1], TOKENS], 1)[1]


def written_behind_text(x: Tensor, text: Tensor) -> Tensor:
    joined = torch.cat([text, x, text], 1)
    joined = aten.slice_scatter.default(joined, joined[:, 3:9] * 2, 1, 3, 9)
    joined = aten.slice_scatter.default(joined, joined[:, 9:] * 3, 1, 9, 12)
    return joined[:, 3:9]


def masked_pairs(x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(heads(x), keys, keys, mask))


TABLE, KEYS = torch.randn(TOKENS, WIDTH), torch.randn(BATCH, 2, 5, 4)
TEXT = torch.randn(BATCH, 3, WIDTH)


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (rms, (torch.randn(WIDTH),)),
        (lambda x: x * x.square().sum(-1, keepdim=True).reciprocal().abs().clamp_min(0.1), ()),
        (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), ()),
        (lambda x: x - x.amax(-1, keepdim=True) + x.mean(2)[..., None], ()),
        (lambda x: x.softmax(-1).cumsum(-1), ()),
        (lambda x: F.softplus(F.leaky_relu(x)).masked_fill(x > 0.5, 2.0), ()),
        (lambda x, m: torch.where(m, x, -x), (torch.rand(BATCH, TOKENS, 1) > 0.5,)),
        (lambda x, m: x.masked_fill(m, 0.0), (torch.rand(TOKENS, WIDTH) > 0.5,)),
        (lambda x: x[..., None].expand(-1, -1, -1, 3).squeeze(0).reshape(BATCH, TOKENS, -1), ()),
        (lambda x: x.unsqueeze(2).squeeze(2).repeat(1, 1, 2), ()),
        (lambda x: x.repeat_interleave(3, -1), ()),
        (lambda x: x.flip(-1), ()),
        (lambda x: F.pad(x, (1, 2)), ()),
        (lambda x, i: x.index_select(2, i), (torch.tensor([1, 0, 5]),)),
        (lambda x, y: torch.cat([x, y], -1), (torch.randn(BATCH, TOKENS, 3),)),
        (lambda x, y: torch.stack([x, y.expand(BATCH, TOKENS, WIDTH)], -1), (TABLE,)),
        (lambda x: aten.select_scatter.default(x, x[..., 0] * 2, 2, 3), ()),
        (lambda x, y: aten.slice_scatter.default(y, x[..., :4], 2, 2, 6), (torch.randn(BATCH, TOKENS, WIDTH),)),
        (lambda x, w: x @ w, (torch.randn(WIDTH, 3),)),
        (lambda x, w: heads(x).transpose(1, 2) @ w, (torch.randn(TOKENS, 4, 3),)),
        (lambda x: heads(x).transpose(1, 2) @ heads(x).permute(0, 2, 3, 1), ()),
        (lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b).transpose(1, 2), (torch.randn(5, WIDTH, 1), torch.randn(5))),
        (lambda x, w: F.conv2d(x.transpose(1, 2).view(BATCH, WIDTH, 2, 3), w).view(BATCH, 5, TOKENS).transpose(1, 2),
         (torch.randn(5, WIDTH, 1, 1),)),
        (lambda x, w: F.linear(x.view(-1, WIDTH), w).view(BATCH, TOKENS, 3), (torch.randn(3, WIDTH),)),
        (lambda x, y: (x.view(-1, WIDTH) * y).view(x.shape), (torch.randn(BATCH * TOKENS, 1),)),
        (lambda x, y: (x.view(BATCH, 2, 3, WIDTH) * y).view(x.shape), (torch.randn(2, 1, WIDTH),)),
        (lambda x, y: (x.view(BATCH, 2, 3, WIDTH) * y).view(x.shape), (torch.randn(3, WIDTH),)),
        (lambda x, y: (x.view(BATCH, 2, 3, WIDTH) + y).view(x.shape), (torch.randn(1, 1, 3, 1),)),
        (lambda x, y: (x.view(BATCH, 2, 3, WIDTH).permute(2, 0, 3, 1) * y).permute(1, 3, 0, 2).reshape(x.shape),
         (torch.randn(3, 1, WIDTH, 2),)),
        (lambda x, y: (x.transpose(0, 1) * y).transpose(0, 1), (torch.randn(TOKENS, 1, WIDTH),)),
        (lambda x, y: (heads(x).reshape(-1, TOKENS, 4) * y).view(BATCH, 2, TOKENS, 4).transpose(1, 2),
         (torch.randn(TOKENS, 4),)),
        (rotated_into_slices, (torch.randn(1, TOKENS, 1, 2), torch.randn(1, TOKENS, 1, 2))),
        (rotated_as_complex, (torch.randn(TOKENS, 2),)),
        (through_joined, (TEXT, torch.randn(3 + TOKENS, WIDTH))),
        (written_behind_text, (TEXT,)),
        (lambda x, k: merged(F.scaled_dot_product_attention(heads(x), k, k)), (KEYS,)),
        (masked_pairs, (KEYS, torch.randn(BATCH, 1, 1, 5))),
        (masked_pairs, (KEYS, torch.randn(BATCH, 1, TOKENS, 5))),
        (masked_pairs, (KEYS, torch.rand(TOKENS, 5) > 0.3)),
    ],
)  # fmt: skip
@pytest.mark.sampled
def test_chosen_tokens_come_out_as_if_all_were_computed(function: Function, others: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    check(function, *others)


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (through_joined, (TEXT, torch.randn(3 + TOKENS, WIDTH))),
        (written_behind_text, (TEXT,)),
        (lambda x, t: aten.slice_scatter.default(torch.cat([t, x], 1), x * 2, 1, 3)[:, 3:], (TEXT,)),
        (lambda x, t, w: F.linear(torch.cat([x, t], 1), w).split([TOKENS, 3], 1)[0], (TEXT, torch.randn(3, WIDTH))),
    ],
)
def test_rows_that_were_joined_with_the_tokens_may_be_left_out(function: Function, others: tuple[Tensor, ...]) -> None:
    graph = check(function, *others, alone=True)
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    sizes = {str(value.shape[1]) for value in values if value.ndim == 3 and isinstance(value.shape[1], torch.SymInt)}
    assert len(sizes) == 1, "of the tokens alone"


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (rms, (torch.randn(WIDTH),)),
        (lambda x, y: torch.cat([x.squeeze(0) + y, y], -1).unsqueeze(0), (TABLE,)),
        (lambda x, w: F.linear(x.view(-1, WIDTH), w).view(1, TOKENS, 3), (torch.randn(3, WIDTH),)),
        (lambda x, t: torch.cat([t, x], 1)[:, 3:] * 2, (TEXT[:1],)),
        (lambda x, k, m: merged(F.scaled_dot_product_attention(heads(x), k, k, m)), (KEYS[:1], torch.randn(TOKENS, 5))),
    ],
)
def test_a_single_sample_may_lose_its_axis(function: Function, others: tuple[Tensor, ...]) -> None:
    check(function, *others, stream=torch.randn(1, TOKENS, WIDTH))


@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (BATCH, 2, 3, WIDTH)])
def test_streams_of_other_ranks(shape: tuple[int, ...]) -> None:
    check(lambda x, w, y: F.gelu(F.linear(F.layer_norm(x, [WIDTH]), w) * y), torch.randn(WIDTH, WIDTH),
          torch.randn(*shape[-2:]), stream=torch.randn(shape))  # fmt: skip


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (through_joined, (TEXT, torch.randn(3 + TOKENS, WIDTH))),
        (rotated_into_slices, (torch.randn(1, TOKENS, 1, 2), torch.randn(1, TOKENS, 1, 2))),
        (lambda x, w: F.linear(x.view(-1, WIDTH), w).view(BATCH, TOKENS, 3), (torch.randn(3, WIDTH),)),
    ],
)
@pytest.mark.sampled
def test_inductor_takes_sizes_that_are_sums_and_products(function: Function, others: tuple[Tensor, ...]) -> None:
    check(function, *others, mode="inductor")


def test_an_empty_buffer_is_made_for_the_chosen_tokens() -> None:
    graph = check(rotated_into_slices, torch.randn(1, TOKENS, 1, 2), torch.randn(1, TOKENS, 1, 2))
    (buffer,) = graph.find_nodes(op="call_function", target=aten.empty.memory_format)
    assert isinstance(buffer.args[0][1], fx.Node)


def test_the_number_of_tokens_is_no_constant_of_the_graph() -> None:
    graph: Any = check(through_joined, TEXT, torch.randn(3 + TOKENS, WIDTH))
    values = [node.meta["val"] for node in graph.nodes if node.op == "call_function"]
    assert any("+ 3" in str(size) for value in values if isinstance(value, Tensor) for size in value.shape)
