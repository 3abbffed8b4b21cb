"""Operators of other libraries: unknown until somebody says what they are, and then like torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

import dicompile
from dicompile.analysis import TokenWise
from dicompile.errors import InvalidSetting
from dicompile.ops.registry import REGISTERED
from tests.models import PlainBlock, PlainDiT, Sample, optimized, plain_dit, redraw, run, structure, timesteps

STEPS = 6


@torch.library.custom_op("dicompile_tests::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2).contiguous()


@torch.library.custom_op("dicompile_tests::heads", mutates_args=())
def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("dicompile_tests::scaled", mutates_args=())
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


flash.register_fake(lambda q, k, v: torch.empty_like(q))
heads.register_fake(lambda q, k, v: torch.empty_like(q))
scaled.register_fake(lambda x, factor: torch.empty_like(x))


class Flash(PlainBlock):
    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).unbind(2)
        return torch.ops.dicompile_tests.flash(q, k, v).reshape(b, n, c)


class Heads(PlainBlock):
    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.ops.dicompile_tests.heads(q, k, v).transpose(1, 2).reshape(b, n, c)


class Scaled(PlainBlock):
    def attend(self, x: Tensor) -> Tensor:
        return super().attend(torch.ops.dicompile_tests.scaled(x, 0.5))


def sample(block: type[PlainBlock]) -> Sample:
    plain = plain_dit(2)
    model = PlainDiT(2)
    model.blocks = nn.ModuleList(block(32, 2) for _ in range(2))
    model.load_state_dict(plain.model.state_dict())
    return Sample(model.eval(), plain.inputs)


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    known = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(known)


@pytest.mark.parametrize("block", [Flash, Heads])
def test_what_nobody_knows_is_no_mlp_and_is_named(block: type[PlainBlock]) -> None:
    found = structure(sample(block))
    assert [site.kind.value for site in found.sites] == ["unknown", "mlp"] * 2
    assert "dicompile_tests" in found.sites[0].tokens.reason
    assert found.sites[0].tokens.wise is TokenWise.NO


def test_a_rule_for_attention_that_matches_nothing_says_so() -> None:
    rule = dicompile.Rule(sites=("self-attention",), do=dicompile.Reuse())
    policy = dicompile.Policy(name="own", cadence=dicompile.Cadence(interval=3), rules=(rule,))
    chosen = sample(Flash)
    model = optimized(chosen, policy, STEPS)
    run(model, chosen.inputs, timesteps(STEPS))
    assert dicompile.plan_of(model).notes() == ["a rule for self-attention sites: the model has none"]


@pytest.mark.parametrize(
    ("block", "operator", "layout"),
    [(Flash, flash, "bnhd"), (Heads, heads, "bhnd"), (Heads, torch.ops.dicompile_tests.heads.default, "bhnd")],
)
@pytest.mark.parametrize("policy", ["fora", "toca", "duca"])
@pytest.mark.sampled
def test_registered_attention_is_attention(block: type[PlainBlock], operator: object, layout: str, policy: str) -> None:
    dicompile.register_attention(operator, layout=layout)
    own, plain = sample(block), plain_dit(2)
    found, wanted = structure(own), structure(plain)
    assert [site.kind for site in found.sites] == [site.kind for site in wanted.sites]
    assert found.flops == wanted.flops
    times = timesteps(STEPS)
    got = run(optimized(own, policy, STEPS), own.inputs, times)
    torch.testing.assert_close(got, run(optimized(plain, policy, STEPS), plain.inputs, times), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", ["elementwise", "rows", "mixes"])
@pytest.mark.sampled
def test_an_operator_is_what_was_said_of_it(tokens: str) -> None:
    dicompile.register_operator(scaled, tokens=tokens, flops=lambda x, factor, out_shape: 7 * x[0])
    found = structure(sample(Scaled))
    assert [site.kind.value for site in found.sites] == ["self-attention", "mlp"] * 2
    wise = TokenWise.NO if tokens == "mixes" else TokenWise.QUERIES
    assert {site.tokens.wise for site in found.sites[::2]} == {wise}
    assert found.flops == structure(plain_dit(2)).flops + 2 * 7 * 4


def test_an_operator_that_torch_was_told_of_costs_what_torch_says() -> None:
    packet = torch.ops.dicompile_tests.scaled
    dicompile.register_operator(scaled, tokens="rows")
    try:
        register_flop_formula(packet)(lambda x, factor, *, out_shape: 5 * x[0])
        assert structure(sample(Scaled)).flops == structure(plain_dit(2)).flops + 2 * 5 * 4
    finally:
        flop_registry.pop(packet, None)


@pytest.mark.nightly
def test_compiled_code_calls_the_operator() -> None:
    dicompile.register_attention(flash, layout="bnhd")
    own, times = sample(Flash), timesteps(4)
    eager = run(optimized(own, "toca", 4), own.inputs, times)
    compiled = run(optimized(own, "toca", 4, mode="inductor"), own.inputs, times)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", [torch.ops.aten.mm, torch.relu, "flash", redraw])
def test_what_is_no_operator_of_another_library_is_refused(operator: object) -> None:
    with pytest.raises(InvalidSetting, match="no operator of another library"):
        dicompile.register_attention(operator)
    with pytest.raises(InvalidSetting, match="tokens='some' does not exist"):
        dicompile.register_operator(flash, tokens="some")
    with pytest.raises(InvalidSetting, match="layout 'nbhd' does not exist"):
        dicompile.register_attention(flash, layout="nbhd")
