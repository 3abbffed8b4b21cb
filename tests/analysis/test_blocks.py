"""Grouping into blocks, with module paths and without, and when two pieces of graph count as alike."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.analysis import analyse
from dicompile.analysis.blocks import _repeats, structure_key
from tests.capture.captured import captured, structure, tiny
from tests.models import MODELS, PlainDiT, redraw

aten = torch.ops.aten


@pytest.mark.parametrize("name", MODELS)
def test_without_module_paths_isomorphism_finds_the_same_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = structure(name)
    monkeypatch.setattr("dicompile.analysis.blocks.module_path", lambda node: "")
    found = analyse(captured(name))
    assert [block.path for block in found.blocks] == [""] * len(expected.blocks)
    assert [(b.sites, b.nodes, b.kind) for b in found.blocks] == [(b.sites, b.nodes, b.kind) for b in expected.blocks]


class Obfuscated(PlainDiT):
    """The same network without a module list and without a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self.blocks
        del self.blocks

    @property
    def blocks(self) -> Iterator[nn.Module]:
        return iter((self.a, self.b, self.c))


def test_a_model_of_plain_attributes_has_the_blocks_of_the_model_with_a_module_list() -> None:
    torch.manual_seed(0)
    model = redraw(Obfuscated())
    assert not any("blocks" in name for name, _ in model.named_parameters())
    found = analyse(tiny(model, x=torch.randn(4, 4, 16, 16), t=torch.full((4,), 500), y=torch.tensor([1, 2, 10, 10])))
    expected = structure("plain_dit")
    assert [block.path for block in found.blocks] == ["a", "b", "c"]
    assert [(b.sites, b.nodes, b.kind) for b in found.blocks] == [(b.sites, b.nodes, b.kind) for b in expected.blocks]
    assert [(s.kind, s.shape, s.flops) for s in found.sites] == [(s.kind, s.shape, s.flops) for s in expected.sites]
    assert [block.depth for block in found.blocks] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("fingerprints", "expected"),
    [
        ("", []),
        ("a", [[0]]),
        ("ab", [[0, 1]]),
        ("aaa", [[0], [1], [2]]),
        ("ababab", [[0, 1], [2, 3], [4, 5]]),
        ("abcabc", [[0, 1, 2], [3, 4, 5]]),
        ("aabaab", [[0], [1], [2, 3, 4, 5]]),  # greedy: the shortest repeat wins, even where a longer one covers more
        ("ababcc", [[0, 1], [2, 3], [4], [5]]),
        ("ababab" + "xyz", [[0, 1], [2, 3], [4, 5], [6, 7, 8]]),
    ],
)
def test_a_sequence_is_cut_at_its_shortest_repeats(fingerprints: str, expected: list[list[int]]) -> None:
    assert _repeats(fingerprints) == expected


@settings(deadline=None)
@given(st.text("abc", max_size=12))
def test_cutting_keeps_every_branch_once_and_in_order(fingerprints: str) -> None:
    groups = _repeats(fingerprints)
    assert [i for group in groups for i in group] == list(range(len(fingerprints)))
    assert all(groups)


# Keys -----------------------------------------------------------------------------------------------------------------


def piece(
    size: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    strides: tuple[int, ...] = (3, 1),
    function: object = aten.add.Tensor,
    constant: float = 2.0,
    prefix: str = "x",
) -> str:
    """Key of ``function(a, b) * constant`` for inputs as described."""
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty_strided(size, strides, dtype=dtype) for _ in range(2)]
    inputs = [graph.placeholder(f"{prefix}{i}") for i in range(2)]
    for node, value in zip(inputs, values, strict=True):
        node.meta["val"] = value
    graph.call_function(aten.mul.Tensor, (graph.call_function(function, tuple(inputs)), constant))
    return structure_key(node for node in graph.nodes if node.op == "call_function")


def test_the_key_of_a_piece_does_not_depend_on_names() -> None:
    assert piece() == piece(prefix="completely_different")


@pytest.mark.parametrize(
    "change",
    [
        {"size": (2, 4), "strides": (4, 1)},
        {"dtype": torch.bfloat16},
        {"strides": (1, 2)},
        {"function": aten.sub.Tensor},
        {"constant": 3.0},
    ],
)
def test_the_key_of_a_piece_changes_with_operators_constants_and_layout(change: dict[str, object]) -> None:
    assert piece() != piece(**change)  # type: ignore[arg-type]


def wired(second_uses: int) -> str:
    graph = fx.Graph()
    with FakeTensorMode():
        value = torch.zeros(2)
    inputs = [graph.placeholder("x"), graph.placeholder("y")]
    for node in inputs:
        node.meta["val"] = value
    total = graph.call_function(operator.add, tuple(inputs))
    graph.call_function(operator.mul, (total, inputs[second_uses]))
    return structure_key(node for node in graph.nodes if node.op == "call_function")


def test_the_key_of_a_piece_changes_with_its_wiring() -> None:
    assert wired(0) == wired(0)
    assert wired(0) != wired(1)


def test_blocks_that_read_another_layout_are_of_another_kind() -> None:
    """The first block of the diffusers DiT reads a transposed stream, the others a contiguous one."""
    kinds = [block.kind for block in structure("dit").blocks]
    assert kinds[0] != kinds[1]
    assert kinds[1] == kinds[2]
