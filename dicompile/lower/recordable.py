"""Whether the steps of a model can be recorded as CUDA graphs: nothing in them may need the host."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dicompile.capture import Capture
from dicompile.errors import InvalidSetting
from dicompile.lower.hoist import PLAIN_TENSORS
from dicompile.lower.inductor import GRAPHS_MODE
from dicompile.text import module_path, operator_text

_HOST_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_FIX = f"leave out compile_mode={GRAPHS_MODE!r}"


def check_can_record(capture: Capture, arguments: Sequence[Any], computed: Collection[str]) -> torch.device:
    """The device on which steps can be recorded.

    Args:
        capture: the model.
        arguments: values of its inputs but for its constants.
        computed: names of what the steps compute.

    Raises:
        InvalidSetting: they cannot: not everything lies on one CUDA device in tensors of torch's own, or an operator
            needs the host.
    """
    tensors = [
        (item.name, value)
        for item, value in zip(capture.inputs, arguments, strict=False)
        if isinstance(value, Tensor)
    ]  # fmt: skip
    devices = {value.device for _, value in tensors}
    for name, value in tensors:
        if value.device.type != "cuda":
            raise _refused(f"input {name} lies on {value.device}", "CUDA graphs need a CUDA device, and all on it")
        if len(devices) > 1:
            raise _refused(f"inputs lie on {', '.join(sorted(map(str, devices)))}", "a CUDA graph has one device")
        if type(value) not in PLAIN_TENSORS or value.layout is not torch.strided:
            raise _refused(f"input {name} is a {type(value).__name__}", "where its numbers lie cannot be told")
    for node in capture.graph.nodes:
        if node.op == "call_function" and node.name in computed and needs_host(node):
            where = module_path(node) or "the model"
            raise _refused(f"{operator_text(node.target)} in {where}", "it waits for the host, or copies from it")
    if not devices:
        raise _refused("the model takes no tensors", "CUDA graphs need a CUDA device")
    return devices.pop()


def needs_host(node: fx.Node) -> bool:
    """True for an operator whose result only the host can make room for, or that moves numbers to or from it."""
    if any(tag in getattr(node.target, "tags", ()) for tag in _HOST_TAGS):
        return True
    before = {value.device.type for value in _tensors([n.meta.get("val") for n in node.all_input_nodes])}
    after = {value.device.type for value in _tensors(node.meta.get("val"))}
    return bool(before) and not after <= before


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _refused(what: str, why: str) -> InvalidSetting:
    return InvalidSetting(f"steps cannot be recorded as CUDA graphs: {what}", where="compile_mode", why=why, fix=_FIX)
