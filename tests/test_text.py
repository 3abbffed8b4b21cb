from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.text import (
    clean_path,
    graph_text,
    module_path,
    operations_text,
    operator_text,
    ranges_text,
    size_text,
    tensor_text,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("spelled", "clean"),
    [
        ("L['self'].__dict__['_modules']['blocks']._modules['3'].attn", "blocks.3.attn"),
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self']._buffers['position']", "position"),
        ("L['self']", ""),
        ("L['x']", "x"),
        ("L['kwargs']['hidden_states']", "hidden_states"),
        ("L['added']['resolution']", "added.resolution"),
        ("L['self']._orig_mod.blocks[2].mlp", "blocks.2.mlp"),
        ("G['model'].head", "model.head"),
        ('L["self"].blocks["first"].attn', "blocks.first.attn"),
    ],
)
def test_dynamos_spelling_becomes_a_dotted_path(spelled: str, clean: str) -> None:
    assert clean_path(spelled) == clean


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 16, 96), "f32[2,16,96]"),
        (torch.zeros(2, dtype=torch.bfloat16), "bf16[2]"),
        (torch.zeros((), dtype=torch.int64), "i64[]"),
        (torch.zeros(3, dtype=torch.bool), "b8[3]"),
        (torch.zeros(3, dtype=torch.complex64), "c64[3]"),
        ((torch.zeros(1), [torch.zeros(2)]), "(f32[1], (f32[2]))"),
        (7, "int"),
        (None, "NoneType"),
        (1.5, "float"),
    ],
)
def test_values_print_as_dtype_and_shape(value: object, text: str) -> None:
    assert tensor_text(value) == text


def test_operators_print_as_their_overload_or_their_name() -> None:
    assert operator_text(aten.linear.default) == "aten.linear.default"
    assert operator_text(operator.getitem) == "getitem"


def example(prefix: str) -> fx.Graph:
    """``x * w``, split in two, with a module path on the product and whatever node names `prefix` gives."""
    graph = fx.Graph()
    with FakeTensorMode():
        x, w, half = torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 4)
    inputs = [graph.placeholder(f"{prefix}_{i}") for i in range(2)]
    for node, value in zip(inputs, (x, w), strict=True):
        node.meta["val"] = value
    product = graph.create_node("call_function", aten.mul.Tensor, tuple(inputs), name=f"{prefix}_product")
    product.meta.update(val=x, nn_module_stack={"a": ("L['self']", object), "b": ("L['self'].blocks[0].gate", object)})
    parts = graph.call_function(aten.split.Tensor, (product, 4, 1))
    parts.meta["val"] = (half, half)
    first = graph.call_function(operator.getitem, (parts, 0))
    joined = graph.call_function(aten.cat.default, ([first, first],), {"dim": -1})
    first.meta["val"], joined.meta["val"] = half, x
    graph.output((joined, None, product))
    return graph


EXPECTED = """\
x: f32[2,8] = input
@w: f32[8] = input
%2: f32[2,8] = aten.mul.Tensor(x, @w)  # blocks.0.gate
%3: (f32[2,4], f32[2,4]) = aten.split.Tensor(%2, 4, 1)
%4: f32[2,4] = getitem(%3, 0)
%5: f32[2,8] = aten.cat.default([%4, %4], dim=-1)"""


def test_a_graph_prints_one_line_per_node() -> None:
    assert graph_text(example("n"), ["x", "@w"]) == f"{EXPECTED}\nreturn %5\nreturn None\nreturn %2"


def test_outputs_print_under_the_names_they_are_given() -> None:
    text = graph_text(example("n"), ["x", "@w"], ["value[0]", "nothing", "%2'"])
    assert text.splitlines()[-3:] == ["return value[0] = %5", "return nothing = None", "return %2' = %2"]


def test_the_text_does_not_depend_on_the_names_of_nodes() -> None:
    assert graph_text(example("first"), ["x", "@w"]) == graph_text(example("second"), ["x", "@w"])


def test_inputs_without_a_given_name_print_under_their_own() -> None:
    assert graph_text(example("n")).splitlines()[:2] == ["n_0: f32[2,8] = input", "n_1: f32[8] = input"]


def test_the_module_path_is_that_of_the_innermost_module() -> None:
    product = next(node for node in example("n").nodes if node.target is aten.mul.Tensor)
    assert module_path(product) == "blocks.0.gate"
    assert module_path(next(iter(example("n").nodes))) == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (5 * 2**30, "5.00 GiB")],
)
def test_sizes_have_a_fitting_unit(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(1.5e6, "1.50 MFLOP"), (0, "0.00 MFLOP"), (2e9, "2.00 GFLOP"), (7.438e13, "74.38 TFLOP"), (3e15, "3.00 PFLOP")],
)
def test_operations_have_a_fitting_unit(count: float, text: str) -> None:
    assert operations_text(count) == text


def test_runs_of_numbers_are_folded() -> None:
    assert ranges_text([7, 2, 0, 1, 1]) == "0-2 7"
    assert ranges_text([]) == ""
