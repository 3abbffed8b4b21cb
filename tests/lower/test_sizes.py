"""Code with symbols: which numbers become symbols, for which sizes it holds, and how often anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import dicompile
from dicompile.lower import inductor
from dicompile.lower.sizes import Form, Pattern, Sizes, Term
from tests.models import dit, flux, pixart, plain_dit, run, timesteps

T = timesteps(6)


def graph_of(function: Callable[..., Any], *shapes: Sequence[int]) -> tuple[fx.GraphModule, FakeTensorMode]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        made = make_fx(lambda *values: [function(*values)])(*map(torch.empty, shapes))
    return made, mode


def joined(text: Tensor, image: Tensor) -> Tensor:
    b, _, c = image.shape
    both = torch.cat([text.expand(b, -1, c), image], 1).view(b, -1, 2, c // 2)
    return both.transpose(1, 2)[:, :, text.shape[1] :].sum(1, keepdim=True).expand(-1, 3, -1, -1) * 2


def as_it_is(graph_module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Any:
    """Compile nothing."""
    return graph_module.forward


class Counted:
    """Compiles by interpreting, and counts."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Any:
        symbols = sum(isinstance(value, torch.SymInt) for value in inputs)
        self.calls.append(symbols)
        with mode:
            graph_module(*inputs)  # what is taken for granted becomes guards
        return graph_module.forward


def test_graphs_that_differ_in_sizes_are_one_form() -> None:
    first, second = (
        Form.of(graph_of(joined, text, image)[0].graph)
        for text, image in (((2, 3, 8), (2, 16, 8)), ((4, 5, 8), (4, 9, 8)))
    )
    assert first.key == second.key
    assert first.numbers != second.numbers
    assert len(first.numbers) == len(second.numbers)
    other = Form.of(graph_of(lambda text, image: joined(text, image) * 3, (2, 3, 8), (2, 16, 8))[0].graph)
    assert first.key != other.key  # another constant


@pytest.mark.parametrize(
    ("samples", "terms"),
    [
        ([(16, 3, 8), (36, 3, 8)], [Term(product=(0,)), Term(3), Term(8)]),
        ([(16, 32, 128), (36, 72, 288)], [Term(product=(0,)), Term(2, (0,)), Term(8, (0,))]),
        ([(6, 16, 22), (9, 36, 45)], [Term(product=(0,)), Term(product=(1,)), Term(product=(0,), plus=1)]),
        ([(6, 16, 192), (9, 36, 648)], [Term(product=(0,)), Term(product=(1,)), Term(2, (0, 1))]),
        ([(16, 20), (36, 40)], [Term(product=(0,)), Term(product=(0,), offset=4)]),
        ([(5, 17), (11, 29)], [Term(product=(0,)), Term(product=(1,))]),
    ],
    ids=["constants", "multiples", "sum", "product", "offset", "unrelated"],
)
def test_what_varies_follows_from_few_symbols(samples: list[tuple[int, ...]], terms: list[Term]) -> None:
    pattern = Pattern.of(samples, range(2))
    assert list(pattern.terms) == terms
    assert all(pattern.symbols(numbers) is not None for numbers in samples)


def test_code_with_symbols_gives_what_code_for_the_sizes_gives() -> None:
    sizes, counted = Sizes(), Counted()
    for text, image in (
        ((2, 3, 8), (2, 16, 8)),
        ((2, 5, 8), (2, 9, 8)),
        ((2, 7, 8), (2, 4, 8)),
        ((3, 2, 8), (3, 5, 8)),
    ):
        graph, mode = graph_of(joined, text, image)
        code = sizes.code(graph, mode, "how", counted)
        given = torch.randn(text), torch.randn(image)
        assert torch.equal(code(*given)[0], joined(*given))
    assert len(counted.calls) == 3  # the first, any number of tokens, and any batch
    assert counted.calls[0] == 0 < counted.calls[1] < counted.calls[2]


def test_what_was_taken_for_granted_is_held_against_other_sizes() -> None:
    def compile_(graph_module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Any:
        is_even = bool(inputs[0].shape[0] % 2 == 0)
        return lambda x, *_: [x * 2 if is_even else x * 3]

    sizes = Sizes()
    for size, expected in ((4, 2), (6, 2), (8, 2), (9, 3), (11, 3), (10, 2)):
        graph, mode = graph_of(lambda x: x * 2, (size,))
        code = sizes.code(graph, mode, "how", compile_)
        assert torch.equal(code(torch.ones(size))[0], torch.full((size,), float(expected)))


def test_sizes_of_parameters_are_those_of_the_model() -> None:
    sizes, counted = Sizes(), Counted()
    for width, tokens in ((8, 4), (16, 4), (16, 6), (16, 7), (24, 7)):
        graph, mode = graph_of(torch.nn.functional.linear, (tokens, width), (3, width))
        own = graph.graph.find_nodes(op="placeholder")[1:]
        sizes.code(graph, mode, "how", counted, own)
    assert counted.calls == [0, 0, 1, 0]  # a model of another width gets code of its own


def test_sizes_of_one_are_no_values_of_symbols() -> None:
    sizes, counted = Sizes(), Counted()
    for batch in (1, 4, 1, 2):
        graph, mode = graph_of(lambda x: x * 2, (batch, 8))
        sizes.code(graph, mode, "how", counted)
    assert counted.calls == [0, 0, 1]


def test_what_torch_cannot_compile_with_symbols_is_compiled_for_its_sizes() -> None:
    def compile_(graph_module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Any:
        if any(isinstance(value, torch.SymInt) for value in inputs):
            raise RuntimeError("no symbols")
        return graph_module.forward

    sizes = Sizes()
    for size in (4, 6, 8):
        graph, mode = graph_of(lambda x: x * 2, (size,))
        assert torch.equal(sizes.code(graph, mode, "how", compile_)(torch.ones(size))[0], torch.full((size,), 2.0))


def given(text: int, side: int, batch: int) -> dict[str, Any]:
    """Inputs of a FLUX-like model."""
    inputs, n = dict(flux().inputs), side * side
    shapes = {
        "hidden_states": (batch, n, 4), "encoder_hidden_states": (batch, text, 24), "pooled_projections": (batch, 40),
        "txt_ids": (text, 3), "img_ids": (n, 3), "timestep": (batch,), "guidance": (batch,),
    }  # fmt: skip
    return {**inputs, **{name: torch.rand(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize("policy", ["fora", pytest.param("toca", marks=pytest.mark.nightly)])
def test_prompts_pictures_and_batches_of_any_size_are_compiled_a_few_times(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    monkeypatch.setattr(inductor, "_compiled", counted)
    model, schedule = flux(1).model, timesteps(4)
    compiled = dicompile.optimize(model, policy, schedule=schedule)
    seen = []
    for sizes in ((20, 8, 2), (24, 10, 2), (33, 12, 3), (256, 14, 4)):
        counted.calls.clear()
        inputs = given(*sizes)
        plain = dicompile.optimize(model, policy, schedule=schedule, mode="eager")
        for a, b in zip(run(compiled, inputs, schedule), run(plain, inputs, schedule), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        seen.append(len(counted.calls))
    assert seen[0] > 0
    assert seen[3] == 0


@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.nightly
def test_dynamic_sizes_are_symbols_at_once(prepares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(inductor, "_compiled", counted)
    model = flux(1).model
    compiled = dicompile.optimize(model, "fora", schedule=T, dynamic=True)
    for sizes in ((20, 8, 2), (33, 12, 3), (256, 14, 4)):
        inputs = given(*sizes)
        if prepares and not counted.calls:
            with torch.no_grad():
                compiled(**{**inputs, "timestep": torch.full((sizes[2],), float(T[0]))})
            dicompile.free(compiled)
            with torch._inductor.config.patch(compile_threads=1):
                dicompile.prepare(compiled)
        plain = dicompile.optimize(model, "fora", schedule=T, mode="eager")
        for a, b in zip(run(compiled, inputs, T), run(plain, inputs, T), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if sizes[0] == 20:
            assert min(counted.calls) > 0
            counted.calls.clear()
    assert counted.calls == []


def test_marked_sizes_are_symbols_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(inductor, "_compiled", counted)
    sample = pixart(1)
    compiled = dicompile.optimize(sample.model, "none", schedule=T)
    for text in (20, 33):
        inputs = {**sample.inputs, "encoder_hidden_states": torch.rand(2, text, 24)}
        torch._dynamo.mark_dynamic(inputs["encoder_hidden_states"], 1)
        run(compiled, inputs, T[:1])
        assert bool(counted.calls) == (text == 20)
        counted.calls.clear()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.nightly
def test_symbols_of_dynamo_are_symbols_at_once(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(inductor, "_compiled", counted)
    sample, options = dit(2), {"policy": "fora", "steps": len(T), **({} if at_once else {"dynamic": False})}
    compiled = torch.compile(sample.model, backend="dicache", dynamic=True, options=options)
    for batch in (2, 4):
        inputs = {name: value[:1].repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
                  for name, value in sample.inputs.items()}  # fmt: skip
        run(compiled, inputs, T)
        assert bool(counted.calls) == (batch == 2 or not at_once)
        counted.calls.clear()


class Attending(nn.Module):
    """Attention and little around it, so that there is little to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.relu(x)
        return x + self.proj(F.scaled_dot_product_attention(h, h, h)) * t[:, None, None, None]


def test_a_compiled_model_takes_other_sizes_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    original = inductor._compiled
    monkeypatch.setattr(inductor, "_compiled", lambda *a: compiled.append(1) or original(*a))
    model = Attending().eval()
    optimized = dicompile.optimize(model, "none")
    for batch in (2, 3, 5):
        compiled.clear()
        x, t = torch.randn(batch, 2, 16, 8), torch.rand(batch)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x, t), model(x, t), rtol=1e-4, atol=1e-4)
        assert bool(compiled) == (batch <= 3)


def test_static_code_is_for_one_size_even_where_code_for_many_is_there() -> None:
    sizes, counted = Sizes(), Counted()

    def code(tokens: int, *, is_static: bool) -> Any:
        graph_module, mode = graph_of(joined, (2, 3, 8), (2, tokens, 8))
        return sizes.code(graph_module, mode, "how", counted, is_static=is_static)

    for tokens in (16, 36, 49):
        code(tokens, is_static=False)
    assert counted.calls == [0, 1]
    first = code(36, is_static=True)
    code(49, is_static=True)
    assert counted.calls == [0, 1, 0, 0]
    assert code(36, is_static=True) is first


def test_which_sizes_are_static_is_said_with_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(inductor, "_compiled", counted)
    sample = plain_dit(1)
    for dynamic, most in ((None, 1), (False, 0)):
        model = dicompile.optimize(sample.model, "none", dynamic=dynamic)
        for batch in (4, 6):
            inputs = {
                name: value[:1].expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value
                for name, value in sample.inputs.items()
            }
            with torch.no_grad():
                model(**inputs)
        assert max(counted.calls) == most
        counted.calls.clear()
        dicompile.reset()
