"""Stable text of graphs: the same graph prints the same wherever it came from.

One line per node::

    %17: f32[2,16,96] = aten.linear.default(%16, @blocks.0.qkv.weight)  # blocks.0.attn

Numbers count nodes in order, inputs print under the name they were given, the comment is the module path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console, RenderableType
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs

_SYMBOL = re.compile(r"\bs\d+\b")  # torch numbers the symbols of sizes differently in every process
_BLOCK_PATH = re.compile(r"^(.*\.|)\d+(?=\.|$)")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


def tensor_text(value: object) -> str:
    """Dtype and shape of a tensor, ``f32[2,16,96]``; type name of anything else."""
    if isinstance(value, torch.Tensor):
        dtype = dtype_abbrs.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{','.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(tensor_text(item) for item in value)})"
    return "int" if isinstance(value, (int, torch.SymInt)) else type(value).__name__


def layout_text(value: object) -> str:
    """Dtype, shape, stride and device of a tensor."""
    if not isinstance(value, torch.Tensor):
        return tensor_text(value)
    return f"{tensor_text(value)} stride {list(value.stride())} on {value.device}"


def size_text(size: float) -> str:
    """Bytes with a fitting binary unit, ``1.50 MiB``."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= u), (1, "bytes"))
    return f"{size / unit:.2f} {name}" if unit > 1 else f"{size:.0f} {name}"


def operations_text(count: float) -> str:
    """Floating-point operations with a fitting unit, ``74.38 TFLOP``."""
    units = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
    unit, name = next(((u, n) for u, n in units if count >= u), (1e6, "MFLOP"))
    return f"{count / unit:.2f} {name}"


def plain_name(name: str) -> str:
    """A name as ours are written: in lower case, with hyphens."""
    return name.lower().replace("_", "-").replace(" ", "-")


def near_names(name: str, known: Iterable[str]) -> str:
    """Up to three known names that somebody may have meant, ``fora or toca``, the nearest first; empty for none."""
    return " or ".join(difflib.get_close_matches(plain_name(name), list(known), 3))


def first_line(error: BaseException) -> str:
    """First line of what an error says; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def plain_text(shown: RenderableType, width: int | None = None) -> str:
    """What rich prints, without colours; as wide as the terminal if no width is given."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip("\n")


def ranges_text(numbers: Iterable[int]) -> str:
    """Numbers with runs folded, ``0-3 7``."""
    found = sorted(set(numbers))
    starts = [n for n in found if n - 1 not in found]
    ends = [n for n in found if n + 1 not in found]
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def clean_path(path: str) -> str:
    """Dynamo's spelling of a module path or attribute as dotted text.

    >>> clean_path("L['self'].__dict__['_modules']['blocks']._modules['3'].attn")
    'blocks.3.attn'
    """
    for wrapper in (".__dict__['_modules']", "._modules", "._parameters", "._buffers"):
        path = path.replace(wrapper, "")
    path = _ITEM.sub(r".\1", path)
    return re.sub(r"^[LG]\.(self\.?|kwargs\.)?(_orig_mod\.?)?", "", path).strip(".")


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that ran `node`, or an empty string."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def block_path(path: str) -> str:
    """Path of the block that a module belongs to: up to the last index into a module list, ``blocks.3``; or empty."""
    match = _BLOCK_PATH.match(path)
    return match.group(0) if match else ""


def operator_text(target: Any) -> str:
    """``aten.linear.default`` for an operator overload, the function's name for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def graph_text(graph: fx.Graph, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> str:
    """Text of a whole graph.

    Args:
        graph: the graph; values are described from ``meta["val"]``.
        inputs: names of the placeholders, in order; parameters by convention start with ``@``.
        outputs: names of the outputs, in order.
    """
    names: dict[fx.Node, str] = {}
    symbols: dict[str, str] = {}
    lines = []
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = next(given, node.name)
            if isinstance(node.meta.get("val"), torch.SymInt):
                symbols[str(node.meta["val"])] = names[node]
            lines.append(f"{names[node]}: {tensor_text(node.meta.get('val'))} = input")
        elif node.op == "output":
            results = [_argument_text(item, names) for item in node.args[0]]
            labels = [f"{name} = " for name in outputs] or [""] * len(results)
            lines += [f"return {label}{result}" for label, result in zip(labels, results, strict=True)]
        else:
            names[node] = f"%{len(names)}"
            arguments = [_argument_text(item, names) for item in node.args]
            arguments += [f"{key}={_argument_text(item, names)}" for key, item in node.kwargs.items()]
            path = module_path(node)
            lines.append(
                f"{names[node]}: {tensor_text(node.meta.get('val'))} = {operator_text(node.target)}"
                f"({', '.join(arguments)})" + (f"  # {path}" if path else "")
            )
    return _SYMBOL.sub(lambda symbol: symbols.get(symbol[0], symbol[0]), "\n".join(lines))


def _argument_text(item: object, names: Mapping[fx.Node, str]) -> str:
    if isinstance(item, fx.Node):
        return names[item]
    if isinstance(item, (list, tuple)):
        return f"[{', '.join(_argument_text(part, names) for part in item)}]"
    return str(item)
