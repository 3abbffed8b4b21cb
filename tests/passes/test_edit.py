"""Values of an edited graph: those that an edit may have changed are computed anew, and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from dicompile.passes import Segment
from dicompile.passes.edit import Editor
from dicompile.text import layout_text
from tests.passes.segments import FULL, TOKENS, WIDTH, chain, cut, mlp_block

aten = torch.ops.aten


def values(segment: Segment) -> dict[fx.Node, object]:
    return {node: node.meta["val"] for node in segment.graph.nodes if node.op == "call_function"}


def computed_anew(segment: Segment, before: dict[fx.Node, object]) -> list[str]:
    return [str(node.target) for node, value in values(segment).items() if before.get(node) is not value]


def check_layouts(segment: Segment) -> None:
    """Every value is laid out as running the whole graph lays it out."""
    with torch.no_grad(), segment.fake_mode, enable_python_dispatcher():
        found: dict[fx.Node, object] = {}
        for node in segment.graph.nodes:
            if node.op == "placeholder":
                found[node] = node.meta["val"]
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*args, **kwargs)
                assert layout_text(found[node]) == layout_text(node.meta["val"]), node


def test_where_nothing_was_edited_nothing_is_computed() -> None:
    segment = mlp_block().segment.copy([FULL])
    before = values(segment)
    Editor(segment).propagate()
    assert before
    assert computed_anew(segment, before) == []


def test_where_the_layout_stays_only_the_reader_is_computed_and_keeps_its_value() -> None:
    segment = mlp_block().segment.copy([FULL])
    editor, norm = Editor(segment), segment.graph.find_nodes(op="call_function", target=aten.layer_norm.default)[0]
    with editor.before(norm):
        negative = editor.call(aten.neg.default, norm.args[0])
    norm.replace_input_with(norm.args[0], negative)
    before = values(segment)
    editor.propagate()
    assert computed_anew(segment, before) == []
    check_layouts(segment)


class Flattened(nn.Module):
    """A branch that views all tokens as one row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(TOKENS * WIDTH, TOKENS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(x).view(x.shape[0], -1)).view(x.shape)


def test_where_the_layout_changes_all_that_it_reaches_is_computed_and_views_become_reshapes() -> None:
    segment = cut(chain(Flattened())).segment.copy([FULL])
    editor, gelu = Editor(segment), segment.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]
    source, (view,) = gelu.args[0], gelu.users
    assert view.target is aten.view.default
    with editor.before(gelu):
        turned = editor.with_strides(source, (TOKENS * WIDTH, 1, TOKENS))
    gelu.replace_input_with(source, turned)
    before = values(segment)
    editor.propagate()
    assert view.target is aten.reshape.default
    assert computed_anew(segment, before) == ["aten.gelu.default"]  # what a reshape returns lies as before
    check_layouts(segment)


def test_a_node_that_somebody_else_made_is_computed() -> None:
    segment = mlp_block().segment.copy([FULL])
    gelu = segment.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]
    with segment.graph.inserting_after(gelu):
        copy = segment.graph.node_copy(gelu)
    copy.meta["val"] = torch.empty(3)
    Editor(segment).propagate()
    assert layout_text(copy.meta["val"]) == layout_text(gelu.meta["val"])
