"""What is made of other operators, or holds a graph of its own, becomes operators that everybody knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dicompile
from dicompile.capture import Role, capture_model
from dicompile.capture.parts import fill_diagonal
from dicompile.errors import CannotCapture
from tests.models import PlainBlock, PlainDiT, Sample, plain_dit, redraw, run, structure, timesteps

FORA = dicompile.FORA(interval=3)
T = timesteps(6)


class ByEinsum(PlainBlock):
    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul((c // self.heads) ** -0.5).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", weights, v).reshape(b, n, c)


def of_blocks(block: type[PlainBlock]) -> nn.Module:
    model = PlainDiT(2)
    model.blocks = nn.ModuleList(block(32, 2) for _ in range(2))
    return redraw(model)


def test_products_by_einsum_are_products() -> None:
    model, plain = of_blocks(ByEinsum), plain_dit(2)
    found, wanted = structure(Sample(model, plain.inputs)), structure(plain)
    assert [site.kind for site in found.sites] == [site.kind for site in wanted.sites]
    assert found.flops == wanted.flops
    cached = dicompile.optimize(model, "none", schedule=T, mode="eager")
    for a, b in zip(run(cached, plain.inputs, T), run(model, plain.inputs, T), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    return block(x, c)


class ByRegion(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.tokens(x), self.condition(t, y)
        for block in self.blocks:
            h = region(block, h, c)
        return self.picture(h, c, *x.shape[2:])


class ByCheckpoint(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.tokens(x), self.condition(t, y)
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=False)
        return self.picture(h, c, *x.shape[2:])


@pytest.mark.parametrize("cls", [ByRegion, ByCheckpoint])
@pytest.mark.parametrize("way", ["optimize", "bare"])
@pytest.mark.sampled
def test_regions_are_what_is_in_them(cls: type[PlainDiT], way: str) -> None:
    torch._dynamo.reset()
    model, inputs = redraw(cls(2)), plain_dit(2).inputs
    assert [s.kind for s in structure(Sample(model, inputs)).sites] == [s.kind for s in structure(plain_dit(2)).sites]
    wanted = run(dicompile.optimize(plain_dit(2).model, FORA, schedule=T, mode="eager"), inputs, T)
    if way == "optimize":
        cached: Any = dicompile.optimize(model, FORA, schedule=T, mode="eager")
    else:
        torch._dynamo.reset()
        cached = torch.compile(model, backend="dicache", options={"policy": FORA, "schedule": T, "mode": "eager"})
    for a, b in zip(run(cached, inputs, T), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Branches(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = torch.cond(t.sum() > 100, lambda z: z * 2, lambda z: z + 1, (x,))
        return super().forward(x, t, y)


def test_a_branch_on_values_is_refused_by_name() -> None:
    model = dicompile.optimize(redraw(Branches(1)), FORA, schedule=T, mode="eager")
    with pytest.raises(CannotCapture, match="cond"):
        run(model, plain_dit(1).inputs, T)


class Tables(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        table = torch.tensor([float(i) for i in range(1600)]) / 1600
        return super().forward(x * torch.tensor([0.5, 2.0])[1] + table[y][:, None, None, None], t, y)


@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_tables_of_numbers_are_inputs_and_small_ones_operators(mode: str) -> None:
    model, inputs = redraw(Tables(1)), plain_dit(1).inputs
    found = capture_model(model, inputs)
    assert len(found.graph.nodes) < 200
    assert [item.name for item in found.inputs if item.role is Role.CONSTANT] == ["constant_0"]
    assert [value.shape for value in found.constants] == [(1600,)]
    cached = dicompile.optimize(model, "none", schedule=T, mode=mode)
    for a, b in zip(run(cached, inputs, T), run(model, inputs, T), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Motion(nn.Module):
    """A time token before a sequence, through torch's own transformer layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, activation="gelu", batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.time, self.inp, self.out = nn.Linear(32, 32), nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None].float() * torch.arange(16)[None]
        token = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], -1)))
        return self.out(self.layers(torch.cat([token[:, None], self.inp(x)], 1))[:, 1:])


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_that_torch_fuses_have_their_branches(norm_first: bool) -> None:
    model, inputs = redraw(Motion(norm_first=norm_first)), {"x": torch.randn(2, 12, 4), "t": torch.full((2,), 500)}
    cached = dicompile.optimize(model, FORA, schedule=T, mode="eager")
    got = run(cached, inputs, T)
    assert [s.kind.value for s in dicompile.structure_of(cached).sites] == ["self-attention", "mlp"] * 2
    torch.testing.assert_close(got[0], run(model, inputs, T)[0], rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    assert len(cached.frames) == 1


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (9, 3), (3, 3, 3)])
def test_a_diagonal_is_filled_as_torch_fills_it(shape: tuple[int, ...], wrap: bool) -> None:
    given = torch.randn(shape)
    assert torch.equal(fill_diagonal(given.clone(), 2.0, wrap), given.clone().fill_diagonal_(2.0, wrap))


class SeesItself(PlainBlock):
    """Attention of which a half of the tokens sees itself only, as perturbed attention guidance has it."""

    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.zeros(n, n)
        mask[: n // 2, : n // 2] = float("-inf")
        mask[: n // 2, : n // 2].fill_diagonal_(0)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, c)


def test_a_diagonal_of_a_part_is_filled() -> None:
    model, plain = of_blocks(SeesItself), plain_dit(2)
    wanted = run(model, plain.inputs, T)
    got = run(dicompile.optimize(model, "none", mode="eager"), plain.inputs, T)
    assert all(map(torch.equal, got, wanted))
