"""Autocast in and around a forward: the captured graph holds its casts and computes bitwise what the model computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicompile.capture import (
    Arguments,
    Capture,
    Captured,
    capture_by_dynamo,
    normalised,
    values_of,
)
from dicompile.capture.trace import capture_by_running

WIDTH = 16
aten = torch.ops.aten
Compute = Callable[["Weights", Tensor], Tensor]


class Weights(nn.Module):
    """What the operators under test take beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.image = nn.Parameter(torch.randn(2, 8, 6, 6))
        self.kernel, self.mix = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)


def linear(m: Weights, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.b)


def conv(m: Weights, _: Tensor) -> Tensor:
    return F.conv2d(m.image, m.kernel, padding=1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attend(m: Weights, x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(heads(linear(m, x)), heads(linear(m, x)), heads(x), **options)


def write(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x)
    h[:, 0] = 1
    h.add_(x)
    h[..., ::2] *= 2
    return h


def there_and_back(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x)
    return F.linear(h.float(), m.w).type_as(h) + h.to(torch.float32).mean(-1, keepdim=True)


def rotate(m: Weights, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(linear(m, x).float().unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones(8, 8), torch.linspace(0, 6, 64).view(8, 8))
    return torch.view_as_real(pairs * turns).flatten(2)


def put(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x).clone()
    h[:, torch.tensor([0, 2])] = x[:, :2].to(h.dtype)
    return torch.index_put(x, (torch.tensor([0, 1]),), h.float())


def with_other_switches(m: Weights, x: Tensor) -> Tensor:
    with torch.enable_grad(), torch.inference_mode():
        y = (x * 1).view(-1, WIDTH)
        y.mul_(2)
    return without_gradients(m, y)


@torch.no_grad()
def without_gradients(m: Weights, x: Tensor) -> Tensor:
    return linear(m, x) * 2


# Listed by autocast, composites of what is listed, operators that read or promote what comes out of these.
OPERATORS: dict[str, Compute] = {
    "linear": linear,
    "matmul of 3 axes": lambda m, x: x @ m.w,
    "batched matmul": lambda _, x: x @ x.mT,
    "bmm": lambda _, x: torch.bmm(x, x.mT),
    "mm": lambda m, x: torch.mm(x[0], m.w),
    "mv": lambda m, _: torch.mv(m.w, m.b),
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.w),
    "baddbmm": lambda _, x: torch.baddbmm(x @ x.mT, x, x.mT),
    "einsum": lambda m, x: torch.einsum("bnd,ed->bne", x, m.w),
    "einsum of 3": lambda m, x: torch.einsum("bnd,de,bme->bnm", x, m.w, x),
    "einsum of heads": lambda _, x: torch.einsum("bhqd,bhkd->bhqk", heads(x), heads(x)),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, 1),
    "inner": lambda m, x: torch.inner(x, m.w),
    "multi_dot": lambda m, x: x @ torch.linalg.multi_dot([m.w, m.w, m.w]),
    "bilinear": lambda m, x: F.bilinear(x, x, m.mix),
    "conv2d": conv,
    "conv2d of the same size": lambda m, _: F.conv2d(m.image, m.kernel, padding="same"),
    "conv1d": lambda m, x: F.conv1d(x, m.kernel[..., 0]),
    "conv_transpose2d": lambda m, _: F.conv_transpose2d(m.image, m.kernel),
    "attention": attend,
    "attention with a mask": lambda m, x: attend(m, x, attn_mask=torch.ones(8, 8, dtype=torch.bool).tril()),
    "attention with a bias": lambda m, x: attend(m, x, attn_mask=torch.zeros(8, 8)),
    "multi-head attention": lambda m, x: m.attention(x, x, x)[0],
    "multi-head attention without weights": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
    "encoder layer": lambda m, x: m.layer(x),
    "layer_norm": lambda m, x: F.layer_norm(linear(m, x), (WIDTH,), m.b, m.b),
    "layer_norm without weights": lambda m, x: F.layer_norm(linear(m, x), (WIDTH,)),
    "group_norm": lambda m, x: F.group_norm(conv(m, x), 2, m.b[:8], m.b[:8]),
    "rms_norm": lambda m, x: F.rms_norm(linear(m, x), (WIDTH,)),
    "rms_norm with weights": lambda m, x: F.rms_norm(linear(m, x), (WIDTH,), m.b),
    "batch_norm": lambda m, x: F.batch_norm(conv(m, x), m.b[:8], m.b[:8].abs()),
    "normalize": lambda m, x: F.normalize(linear(m, x), dim=-1),
    "softmax": lambda m, x: linear(m, x).softmax(-1),
    "softmax in float32": lambda m, x: F.softmax(linear(m, x), -1, dtype=torch.float32),
    "sum": lambda m, x: linear(m, x).sum(-1),
    "prod": lambda m, x: linear(m, x).prod(-1),
    "cumsum": lambda m, x: linear(m, x).cumsum(-1),
    "pow": lambda m, x: linear(m, x) ** 2,
    "gelu": lambda m, x: F.gelu(linear(m, x), approximate="tanh"),
    "glu": lambda m, x: F.glu(linear(m, x)),
    "cat": lambda m, x: torch.cat([linear(m, x), x]),
    "stack": lambda m, x: torch.stack([linear(m, x), x]),
    "addcdiv": lambda m, x: torch.addcdiv(x, linear(m, x).float(), x),
    "where": lambda m, x: torch.where(x > 0, x, linear(m, x)),
    "index_put": put,
    "scatter_add": lambda m, x: x.scatter_add(1, torch.zeros(2, 8, WIDTH, dtype=torch.long), linear(m, x).float()),
    "prelu": lambda m, x: F.prelu(linear(m, x), m.b[:1]),
    "cosine_similarity": lambda m, x: F.cosine_similarity(linear(m, x), x, dim=-1),
    "cdist": lambda m, x: torch.cdist(linear(m, x), x),
    "mse_loss": lambda m, x: F.mse_loss(linear(m, x), x),
    "interpolate": lambda m, x: F.interpolate(conv(m, x), scale_factor=2, mode="bilinear"),
    "pad": lambda m, x: F.pad(conv(m, x), (1, 1, 1, 1), mode="reflect"),
    "embedding": lambda m, _: F.linear(F.embedding(torch.tensor([1, 2]), m.w), m.w),
    "float64": lambda m, x: F.linear(x.double(), m.w.double()),
    "rotation": rotate,
    "writes": write,
    "there and back": there_and_back,
    "a choice by dtype": lambda m, x: linear(m, x) * (2 if linear(m, x).dtype == torch.float32 else 3),
    "constants": lambda m, x: linear(m, x * torch.tensor([1.0, 2.0] * 8)) + torch.tensor(3.0),
    "other switches": with_other_switches,
}  # fmt: skip


class Everything(Weights):
    """All operators, in a region or as they are; `settings` are those of the region."""

    def __init__(self, names: list[str], **settings: Any) -> None:
        super().__init__()
        self.names, self.settings = names, settings

    def forward(self, x: Tensor, t: Tensor) -> list[Tensor]:
        x = x * torch.cos(t)[:, None, None]
        if not self.settings:
            return [OPERATORS[name](self, x) for name in self.names]
        with torch.autocast("cpu", **self.settings):
            found = [OPERATORS[name](self, x) for name in self.names]
        return [*found, linear(self, x)]


def given() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 8, WIDTH), "t": torch.rand(2)}


def captured_by(
    way: Callable[[nn.Module, Arguments], Captured], model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Capture, Sequence[Tensor]]:
    arguments = Arguments.of((), inputs)
    found = way(model, arguments)
    return normalised(model, found, arguments), values_of(model, found, arguments)


by_dynamo = functools.partial(captured_by, capture_by_dynamo)
by_running = functools.partial(captured_by, capture_by_running)


FRONT_ENDS = [by_dynamo, by_running]


def results(captured: tuple[Capture, Sequence[Tensor]]) -> list[Tensor]:
    capture, arguments = captured
    with torch.no_grad():
        return capture.graph_module(*arguments)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """Attention modules call one fused operator where nothing is compiled or traced, which rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(
    ("settings", "ambient"),
    [
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float16, "cache_enabled": False}, None),
        ({}, torch.bfloat16),
        ({"enabled": False}, torch.float16),
        ({"dtype": torch.float16, "cache_enabled": False}, torch.bfloat16),  # torch's cache mixes up the dtypes
    ],
    ids=["region", "region without cache", "around", "off inside", "another inside"],
)
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_every_operator_gives_bitwise_what_it_gives_under_autocast(
    front_end: Callable[..., Any], settings: dict[str, Any], ambient: torch.dtype | None
) -> None:
    model, inputs = Everything(list(OPERATORS), **settings).eval(), given()
    around = torch.autocast("cpu", dtype=ambient) if ambient else contextlib.nullcontext()
    with torch.no_grad(), around:
        expected = model(**inputs)
        captured = front_end(model, inputs)
    found = results(captured)
    names = [*OPERATORS, "after"][: len(expected)]
    wrong = [f"{n}: {a.dtype} for {b.dtype}" for n, a, b in zip(names, found, expected, strict=True) if not same(a, b)]
    assert not wrong
