"""Store values in fewer bits, and widen them where they are read.

Before::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)
    %4: f32[2,64,32] = aten.add.Tensor(stream, %3)
    return value[0] = %3

After (bfloat16)::

    %3: f32[2,64,32] = aten.linear.default(%2, @proj.weight)
    %4: bf16[2,64,32] = aten._to_copy.default(%3, dtype=torch.bfloat16)
    %5: f32[2,64,32] = aten.add.Tensor(stream, %3)
    return value[0] = %4

The step itself goes on with what it computed: only later steps read rounded numbers. A dtype with less range than
float32 would overflow, so a value comes with a scale for every row of its last axis, as a slot of its own::

    %4: f32[2,64,1] = ... the largest magnitude of the row over the largest number of the dtype
    %5: f8e4m3fn[2,64,32] = aten._to_copy.default(%3 / %4, dtype=torch.float8_e4m3fn)
    return value[0] = %5
    return value-scale[0] = %4

Refreshed tokens are rounded by themselves and put into what is stored: the rows of the other tokens stay as they
are, bit by bit, however often their neighbours are refreshed. Scores, stamps and values that are no wider than the
dtype are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dicompile.nodes import node_argument, tensor_of
from dicompile.passes.base import PassReport, Segment, SlotRef
from dicompile.passes.edit import Editor
from dicompile.passes.rows import is_put, put_alike, rows_of
from dicompile.plan import needs_scale

aten = torch.ops.aten


@dataclass(frozen=True)
class NarrowSlots:
    """Cast what is written to slots of values, and cast back what is read from them."""

    name: ClassVar[str] = "narrow-slots"
    exact: ClassVar[bool] = False

    def run(self, segment: Segment) -> PassReport:
        """Narrow the slots of sites whose step names a dtype."""
        changed, skipped = [], []
        stored: dict[fx.Node, _Stored] = {}
        placeholders = segment.graph.find_nodes(op="placeholder")
        for entering, node in zip([*segment.inputs], placeholders, strict=True):
            dtype = _dtype_of(segment, entering)
            if isinstance(entering, SlotRef) and dtype is not None and _is_wider(node, dtype):
                wide = _read(segment, entering, node, dtype)
                stored[wide] = _Stored(node, entering)
                changed.append(f"{entering}: {tensor_of(wide).dtype} from {dtype}")
        for number, (leaving, node) in enumerate(zip([*segment.outputs], segment.results, strict=True)):
            dtype = _dtype_of(segment, leaving)
            if dtype is not None and _is_wider(node, dtype):
                _write(segment, number, dtype, stored)
                changed.append(f"{leaving}: {tensor_of(node).dtype} to {dtype}")
            elif dtype is not None:
                skipped.append(f"{leaving}: {tensor_of(node).dtype} is no wider than {dtype}")
        return PassReport(tuple(changed), tuple(skipped))


@dataclass(frozen=True)
class _Stored:
    """A slot as it is stored."""

    node: fx.Node
    reference: SlotRef


def _dtype_of(segment: Segment, reference: object) -> torch.dtype | None:
    """What a slot of values is to be stored in; None for anything else, and where values stay as they are."""
    if not isinstance(reference, SlotRef) or reference.kind.scale is None:
        return None
    return segment.steps[reference.position].dtype


def _is_wider(node: fx.Node, dtype: torch.dtype) -> bool:
    return tensor_of(node).dtype.itemsize > dtype.itemsize


def _scale_of(reference: SlotRef) -> SlotRef:
    assert reference.kind.scale is not None
    return SlotRef(reference.position, reference.kind.scale, reference.age)


def _read(segment: Segment, reference: SlotRef, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Let a placeholder be of `dtype`, and its readers read it widened."""
    editor, value, users = Editor(segment), tensor_of(node), list(node.users)
    with segment.fake_mode:
        node.meta["val"] = torch.empty(value.shape, dtype=dtype, device=value.device)
    scale = None
    if needs_scale(dtype):
        scale = editor.tensor_input(_scale_of(reference), (*value.shape[:-1], 1), torch.float32, node)
    with editor.before(next(node for node in segment.graph.nodes if node.op != "placeholder")):
        wide = _cast(editor, node, value.dtype if scale is None else torch.float32)
        if scale is not None:
            wide = _cast(editor, editor.call(aten.mul.Tensor, wide, scale), value.dtype)
    for user in users:
        user.replace_input_with(node, wide)
    return wide


def _write(segment: Segment, number: int, dtype: torch.dtype, stored: dict[fx.Node, _Stored]) -> None:
    """Let an output leave in `dtype`, and its scales beside it."""
    editor, node, reference = Editor(segment), segment.results[number], segment.outputs[number]
    assert isinstance(reference, SlotRef)
    end = segment.graph.output_node()
    with editor.before(end):
        if is_put(node, stored):
            narrow, scale = _put(editor, node, dtype, stored[node_argument(node, 2)])
        else:
            narrow, scale = _narrowed(editor, node, dtype)
    results = segment.results
    results[number] = narrow
    end.args = (results,)
    if scale is not None:
        editor.output(_scale_of(reference), scale)


def _narrowed(editor: Editor, node: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node | None]:
    """A value in `dtype`, and its scales: of every row, so that its largest magnitude is the largest of the dtype."""
    if not needs_scale(dtype):
        return _cast(editor, node, dtype), None
    wide = _cast(editor, node, torch.float32)
    largest = editor.call(aten.amax.default, editor.call(aten.abs.default, wide), [-1], True)
    scale = editor.call(aten.div.Tensor, largest, torch.finfo(dtype).max)
    scale = editor.call(aten.clamp_min.default, scale, torch.finfo(torch.float32).tiny)  # a row of zeros
    return _cast(editor, editor.call(aten.div.Tensor, wide, scale), dtype), scale


def _put(editor: Editor, node: fx.Node, dtype: torch.dtype, stored: _Stored) -> tuple[fx.Node, fx.Node | None]:
    """The stored value with narrowed rows in the places of some tokens, and its scales."""
    rows, scale = _narrowed(editor, rows_of(node), dtype)
    narrow = _put_bits(editor, node, rows, stored.node)
    if scale is None:
        return narrow, None
    old = editor.tensor_input(
        _scale_of(stored.reference), (*tensor_of(stored.node).shape[:-1], 1), torch.float32, stored.node
    )
    return narrow, put_alike(editor, node, scale, old)


def _put_bits(editor: Editor, node: fx.Node, rows: fx.Node, value: fx.Node) -> fx.Node:
    """Numbers in their places, whatever they mean: torch 2.13 gathers no 8-bit floats."""
    dtype = tensor_of(value).dtype
    if dtype.itemsize > 1:
        return put_alike(editor, node, rows, value)
    bits, new = (editor.call(aten.view.dtype, part, torch.uint8) for part in (value, rows))
    return editor.call(aten.view.dtype, put_alike(editor, node, new, bits), dtype)


def _cast(editor: Editor, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if tensor_of(node).dtype == dtype else editor.call(aten._to_copy.default, node, dtype=dtype)
