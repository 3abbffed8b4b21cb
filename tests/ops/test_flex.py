"""Attention with a mask as one operator: torch's attention where it runs, ``flex_attention`` where it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.ops.flex import copied, flex_attention, fused_form

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 37, 21, 24
INFINITY = float("inf")


def seen(*shape: int) -> Tensor:
    """Boolean; the first query of the first head, and so maybe every one of the sample, sees nothing."""
    mask = torch.rand(shape) > 0.3
    mask[0, 0, 0] = False
    return mask


MASKS: dict[str, Callable[[], Tensor]] = {
    "keys": lambda: seen(BATCH, 1, 1, KEYS),
    "keys of every head": lambda: torch.randn(BATCH, HEADS, 1, KEYS),
    "pairs of any sample": lambda: torch.randn(QUERIES, KEYS),
    "queries": lambda: torch.randn(1, 1, QUERIES, 1),
    "everything": lambda: seen(BATCH, HEADS, QUERIES, KEYS),
    "everything, added": lambda: torch.zeros(BATCH, HEADS, QUERIES, KEYS).masked_fill(
        ~seen(BATCH, HEADS, QUERIES, KEYS), -INFINITY
    ),
    "one number": lambda: torch.randn(1, 1, 1, 1),
    "expanded": lambda: seen(BATCH, 1, 1, KEYS).expand(BATCH, HEADS, QUERIES, KEYS),
}


def operands(dtype: torch.dtype, of_keys: int = HEADS, width: int = WIDTH, of_values: int = WIDTH) -> list[Tensor]:
    """Query, key and value, of which the query lies in memory as a linear layer leaves it."""
    query = torch.randn(BATCH, QUERIES, HEADS, width, dtype=dtype).transpose(1, 2)
    sizes = width, of_values
    return [query, *(torch.randn(BATCH, of_keys, KEYS, size, dtype=dtype) for size in sizes)]


def as_given(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def log_sum_exp(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    logits = scale * query @ key.repeat_interleave(HEADS // key.shape[1], 1).transpose(2, 3)
    masked = logits.masked_fill(~mask, -INFINITY) if mask.dtype == torch.bool else logits + mask
    return masked.logsumexp(-1)


@pytest.mark.parametrize("of_keys", [HEADS, 2])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", [flex_attention, fused_form])
def test_both_forms_are_attention_and_its_logsumexp(form: Any, kind: str, of_keys: int) -> None:
    query, key, value = operands(torch.float64, of_keys, of_values=40)
    mask = as_given(MASKS[kind](), torch.float64)
    output, lse = form(query, key, value, mask, 0.3, True)
    torch.testing.assert_close(output, attended(query, key, value, mask, 0.3))
    torch.testing.assert_close(lse.double(), log_sum_exp(query, key, mask, 0.3), rtol=1e-5, atol=1e-5)
    assert output.transpose(1, 2).is_contiguous()


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    mask = MASKS["everything"]()
    output, lse = flex_attention(*operands(torch.float32), mask, None, True)
    nothing = ~mask.any(-1)
    assert nothing.any()
    assert not output[nothing].any()
    assert lse[nothing].eq(-INFINITY).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_where_nothing_is_compiled_it_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    query, key, value = operands(dtype)
    for kind, make in MASKS.items():
        mask = as_given(make(), dtype)
        output, lse = flex_attention(query, key, value, mask, None, False)
        assert torch.equal(output, attended(query, key, value, mask, None)), kind
        assert not lse.numel()


@pytest.mark.parametrize("has_lse", [True, False])
def test_what_it_says_of_its_results_is_true(has_lse: bool) -> None:
    arguments = (*operands(torch.float32, 2), MASKS["keys"](), None, has_lse)
    for operator, given in ((flex_attention, arguments), (copied, (arguments[0],))):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("kind", "shape"), [("keys", [2, 21]), ("expanded", [2, 21]), ("everything", [2, 4, 37, 21])])
def test_the_kernel_reads_the_mask_as_it_is(kind: str, shape: list[int]) -> None:
    traced = make_fx(lambda *given: fused_form(*given, None, False)[0])(*operands(torch.float32), MASKS[kind]())
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
    (read,) = node.args[7]
    assert list(read.meta["val"].shape) == shape


@pytest.fixture
def fresh() -> None:
    """Dynamo forgets what it has compiled, of which it keeps eight."""
    torch._dynamo.reset()


def run(rows: Tensor, weight: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention between a linear map and a sum, by a mask that lies nowhere in memory."""
    query = (rows @ weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    given = ~mask if mask.dtype == torch.bool else 2 * mask
    output: Tensor = torch.ops.dicompile.flex_attention(query, key, value, given, None, False)[0]
    return output.transpose(1, 2).flatten(2) + 1


def check_compiled(compiled: Callable[..., Tensor], rows: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    weight = torch.randn(WIDTH, HEADS * WIDTH, dtype=rows.dtype) / WIDTH**0.5
    with torch.no_grad():
        found = compiled(rows, weight, key, value, mask)
    query = (rows @ weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    exact = ~mask if mask.dtype == torch.bool else 2 * mask.double()
    expected = attended(query.double(), key.double(), value.double(), exact, None).transpose(1, 2).flatten(2) + 1
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[rows.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("kind", "dtype", "of_keys"),
    [
        ("everything, added", torch.float32, 2),
        pytest.param("keys", torch.bfloat16, HEADS, marks=pytest.mark.nightly),
        pytest.param("keys of every head", torch.float16, 2, marks=pytest.mark.nightly),
        pytest.param("pairs of any sample", torch.float32, HEADS, marks=pytest.mark.nightly),
        pytest.param("queries", torch.float32, 1, marks=pytest.mark.nightly),
        pytest.param("everything", torch.bfloat16, HEADS, marks=pytest.mark.nightly),
        pytest.param("one number", torch.float32, HEADS, marks=pytest.mark.nightly),
        pytest.param("expanded", torch.float32, HEADS, marks=pytest.mark.nightly),
    ],
)
def test_compiled_it_is_one_kernel_that_computes_attention(kind: str, dtype: torch.dtype, of_keys: int) -> None:
    before = counters["inductor"]["cpp_templated_kernel_counter"]
    _, key, value = operands(dtype, of_keys, of_values=40)
    rows, mask = torch.randn(BATCH, QUERIES, WIDTH, dtype=dtype), as_given(MASKS[kind](), dtype)
    check_compiled(torch.compile(run, fullgraph=True, dynamic=False), rows, key, value, mask)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == before + 1


@pytest.mark.nightly
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("which", ["queries", "keys", "samples"])
def test_one_kernel_serves_every_size(which: str) -> None:
    compiled, before = (
        torch.compile(run, fullgraph=True, dynamic=False),
        counters["inductor"]["cpp_templated_kernel_counter"],
    )
    for size in (33, 5, 150):
        batch, queries, keys = (size if which == name else 7 for name in ("samples", "queries", "keys"))
        rows = torch.randn(batch, queries, WIDTH)
        key, value = (torch.randn(batch, HEADS, keys, WIDTH) for _ in range(2))
        mask = seen(batch, 1, 1, keys)
        axes = {"samples": (0, 0, 0, 0), "queries": (1, None, None, None), "keys": (None, 2, 2, 3)}[which]
        for tensor, axis in zip((rows, key, value, mask), axes, strict=True):
            if axis is not None:
                torch._dynamo.mark_dynamic(tensor, axis)
        check_compiled(compiled, rows, key, value, mask)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == before + 1
