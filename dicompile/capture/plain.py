"""Functional graphs as plain data that JSON knows, and back."""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dicompile.compat import lazy_graph_module
from dicompile.nodes import results_of
from dicompile.ops.registry import is_of_torch_or_ours
from dicompile.store import Unwritable
from dicompile.text import module_path

_NAMED = (torch.dtype, torch.memory_format, torch.layout)
_SAME = (bool, int, float, str, type(None))


def to_plain(value: Any, number: Mapping[fx.Node, int] | None = None) -> Any:
    """A value as plain data.

    Args:
        value: numbers, names, containers of them, and nodes.
        number: of the nodes.

    Raises:
        Unwritable: it is something else.
    """
    if isinstance(value, list) or type(value) is torch.Size:
        return [to_plain(item, number) for item in value]
    if type(value) in _SAME:
        return value
    kind, plain = _tagged(value, number or {})
    return {kind: plain}


def _tagged(value: Any, number: Mapping[fx.Node, int]) -> tuple[str, Any]:
    if isinstance(value, fx.Node):
        return "%", number[value]
    if type(value) is tuple:
        return "tuple", [to_plain(item, number) for item in value]
    if isinstance(value, enum.Enum) and "<locals>" not in type(value).__qualname__:
        return "enum", [type(value).__module__, type(value).__qualname__, value.name]
    if isinstance(value, _NAMED):
        return "torch", str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "device", str(value)
    raise Unwritable(f"a {type(value).__name__}")


def from_plain(item: Any, nodes: Sequence[fx.Node] = ()) -> Any:
    """The reverse of `to_plain`.

    Args:
        item: what that made.
        nodes: by number.
    """
    if isinstance(item, list):
        return [from_plain(part, nodes) for part in item]
    if not isinstance(item, dict):
        return item
    ((kind, value),) = item.items()
    if kind == "%":
        return nodes[value]
    return tuple(from_plain(part, nodes) for part in value) if kind == "tuple" else _OF[kind](value)


def _member(item: Sequence[str]) -> enum.Enum:
    home, path, name = item
    found: Any = operator.attrgetter(path)(sys.modules[home])
    member: enum.Enum = found[name]
    return member


_OF: dict[str, Callable[[Any], Any]] = {
    "enum": _member,
    "torch": lambda name: getattr(torch, name),
    "device": torch.device,
}


def graph_to_plain(graph: fx.Graph) -> list[Any]:
    """A graph as plain data: one line per node, at the end what it returns.

    Raises:
        Unwritable: it has an operator that is not torch's, or a value of another kind.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines: list[Any] = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(to_plain(results_of(graph), number))
            continue
        if node.op != "placeholder" and not is_of_torch_or_ours(node.target):
            raise Unwritable(f"{node.target}")
        args = to_plain(list(node.args), number)
        kwargs = [[name, to_plain(part, number)] for name, part in node.kwargs.items()]
        target = None if node.op == "placeholder" else _target_to_plain(node.target)
        lines.append([node.name, target, args, kwargs, _value_to_plain(node.meta.get("val")), module_path(node)])
    return lines


def graph_from_plain(lines: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """The reverse of `graph_to_plain`.

    Args:
        lines: what that made.
        mode: makes the values of the graph.
    """
    graph, nodes = fx.Graph(), list[fx.Node]()
    with torch.inference_mode(mode=False), torch.no_grad(), mode:
        for name, target, args, kwargs, value, path in lines[:-1]:
            node = graph.create_node(
                "placeholder" if target is None else "call_function",
                name if target is None else _target_from_plain(target),
                tuple(from_plain(args, nodes)),
                {key: from_plain(part, nodes) for key, part in kwargs},
                name=name,
            )
            node.meta["val"] = _value_from_plain(value)
            if path:
                node.meta["nn_module_stack"] = {path: (path, nn.Module)}
            nodes.append(node)
    graph.output(from_plain(lines[-1], nodes))
    return lazy_graph_module(nn.Module(), graph)


def _target_to_plain(target: Any) -> str:
    return str(target) if isinstance(target, OpOverload) else f"operator.{target.__name__}"


def _target_from_plain(text: str) -> Any:
    library, path = text.split(".", maxsplit=1)
    return operator.attrgetter(path)(operator if library == "operator" else torch.ops.aten)


def _value_to_plain(value: Any) -> Any:
    """A fake tensor, with the memory that it is a part of."""
    if not isinstance(value, Tensor):
        is_list = isinstance(value, (tuple, list))
        return [_value_to_plain(item) for item in value] if is_list else {"": to_plain(value)}
    is_plain = (
        type(value) is FakeTensor and value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    )
    if not is_plain or not all(type(size) is int for size in (*value.shape, *value.stride())):
        raise Unwritable("a value of a kind of its own")
    memory = value.untyped_storage().nbytes() // value.element_size()
    made = [to_plain(value.dtype), list(value.shape), list(value.stride()), str(value.device)]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return {"tensor": made if memory == extent or not value.numel() else [*made, memory, value.storage_offset()]}


def _value_from_plain(item: Any) -> Any:
    if isinstance(item, list):
        return [_value_from_plain(part) for part in item]
    if "tensor" not in item:
        return from_plain(item[""])
    dtype, shape, stride, device, *part = item["tensor"]
    kind: Any = {"dtype": from_plain(dtype), "device": device}
    if part:
        return torch.empty(part[0], **kind).as_strided(shape, stride, part[1])
    return torch.empty_strided(shape, stride, **kind)
