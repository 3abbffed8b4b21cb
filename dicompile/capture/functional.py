"""A graph becomes functional ATen, and of its repeated pieces each kind is traced once.

The blocks of a transformer differ in nothing but their parameters, which are inputs. So the graph is cut where a module
of a list begins or ends, pieces of one kind are made functional once, and what came out is copied for each of them.
A deeper model then has more to copy, but no more to trace.

A piece is a function of the values that enter it. That is all that it is as long as no piece writes to one of them; a
model that does (``hidden_states += ...`` on what another block made) is traced as a whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from dicompile.capture.canonical import make_canonical
from dicompile.capture.constants import spell_out_constants
from dicompile.capture.exchanged import fold_exchanges
from dicompile.capture.parts import write_out_composites
from dicompile.compat import functional_trace, lazy_graph_module
from dicompile.nodes import results_of
from dicompile.text import layout_text, module_path

_INDEXED = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_FEW = 8
"""Operators of a piece that is not worth a trace of its own."""
_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format,
          torch.layout)  # fmt: skip


@dataclass(frozen=True)
class Functional:
    """A functional graph.

    Attributes:
        graph_module: canonical ATen; placeholders and outputs are those of the graph that it was made of.
        mutated: positions of the inputs to which that one writes.
    """

    graph_module: fx.GraphModule
    mutated: tuple[int, ...] = ()


class _Entangled(Exception):
    """A piece is no function of the values that enter it."""


def make_functional(graph_module: fx.GraphModule, inputs: Sequence[object], mode: FakeTensorMode) -> Functional:
    """Make a graph functional and canonical (see `dicompile.capture.canonical`).

    Args:
        graph_module: torch-level or ATen graph; not changed.
        inputs: one value per placeholder; tensors are of `mode`, which is active.
        mode: makes the values of the graph.

    Raises:
        RuntimeError, AssertionError: torch cannot make it functional.
    """
    pieces = cut(graph_module.graph)
    if len(pieces) > 1:
        try:
            return Functional(_Joined(graph_module, inputs, mode).of(pieces))
        except (_Entangled, RuntimeError, AssertionError):
            pass  # the whole graph says what cannot be done, and where
    return _traced(graph_module, inputs, mode)


def _traced(graph_module: fx.GraphModule, inputs: Sequence[object], mode: FakeTensorMode) -> Functional:
    with torch.no_grad(), torch._C._DisableAutocast():
        made, mutated = functional_trace(graph_module, inputs)
        spell_out_constants(made)
        for node in made.graph.find_nodes(op="get_attr"):
            value = getattr(made, node.target)
            if isinstance(value, Tensor):
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        write_out_composites(made)
        make_canonical(made.graph)
        fold_exchanges(made.graph)
    return Functional(made, mutated)


def laid_out_like(value: object) -> Tensor | None:
    """A new tensor, of the mode that is active, in the layout of a fake one; None for what is more than its layout."""
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.is_conj() or value.is_neg():
        return None
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def cut(graph: fx.Graph) -> list[list[fx.Node]]:
    """Cut the calls of a graph where a member of a module list begins or ends, if that makes equal pieces.

    What is there only once, or is small, stays together with its like beside it.
    """
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    paths = {node: _list_paths(module_path(node)) for node in calls}
    parts = list(_by_member(calls, paths, 0))
    keys = list(map(_shape_of, parts))
    counts = Counter(keys)
    pieces: list[list[fx.Node]] = []
    was_alone = False
    for part, key in zip(parts, keys, strict=True):
        is_alone = counts[key] == 1 or len(part) < _FEW
        if is_alone and was_alone:
            pieces[-1] += part
        else:
            pieces.append(part)
        was_alone = is_alone
    return pieces


def _list_paths(path: str) -> tuple[str, ...]:
    """Paths of the list members that a module is in, outermost first: ``stages.0``, ``stages.0.blocks.3``."""
    return tuple(path[: match.end()] for match in _INDEXED.finditer(path))


def _by_member(
    nodes: Sequence[fx.Node], paths: Mapping[fx.Node, tuple[str, ...]], depth: int
) -> Iterator[list[fx.Node]]:
    """Runs of nodes in one list member; one that nothing is like is taken apart further."""
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        member = paths[node][depth] if len(paths[node]) > depth else ""
        if not runs or runs[-1][0] != member:
            runs.append((member, []))
        runs[-1][1].append(node)
    counts = Counter(_shape_of(run) for _, run in runs)
    for member, run in runs:
        if member and counts[_shape_of(run)] == 1:
            yield from _by_member(run, paths, depth + 1)
        else:
            yield run


def _shape_of(nodes: Sequence[fx.Node]) -> tuple[object, ...]:
    """What pieces of one kind have in common before anything is traced: their operators."""
    return tuple((node.op, node.target) for node in nodes)


class _Joined:
    """A graph that is put together of traced pieces.

    Args:
        source: the graph that is made functional.
        inputs: one value per placeholder.
        mode: makes the values.
    """

    def __init__(self, source: fx.GraphModule, inputs: Sequence[object], mode: FakeTensorMode) -> None:
        self.source, self.mode = source, mode
        self.graph, self.holder = fx.Graph(), nn.Module()
        self._made: dict[fx.Node, fx.Node] = {}
        self._values: dict[fx.Node, object] = {}
        self._traced: dict[tuple[object, ...], tuple[Sequence[fx.Node], Functional]] = {}
        self._held: dict[int, str] = {}
        for node, value in zip(source.graph.find_nodes(op="placeholder"), inputs, strict=True):
            self._made[node], self._values[node] = self.graph.placeholder(node.target), value
            self._made[node].meta["val"] = value

    def of(self, pieces: Sequence[Sequence[fx.Node]]) -> fx.GraphModule:
        """The whole graph.

        Raises:
            _Entangled: its pieces are no functions of what enters them.
        """
        for piece in pieces:
            self._add(piece)
        results = pytree.tree_leaves(results_of(self.source.graph))
        if any(isinstance(result, fx.Node) and result not in self._made for result in results):
            raise _Entangled
        self.graph.output(tuple(self._made[r] if isinstance(r, fx.Node) else r for r in results))
        return lazy_graph_module(self.holder, self.graph)

    def _add(self, piece: Sequence[fx.Node]) -> None:
        inside = set(piece)
        entering = list(dict.fromkeys(
            p for node in piece for p in node.all_input_nodes if p not in inside and p.op != "get_attr"
        ))  # fmt: skip
        leaving = [node for node in piece if any(user not in inside for user in node.users)]
        if any(not isinstance(_example(node), Tensor) for node in leaving):
            raise _Entangled
        key = self._key(piece, entering, leaving)
        if key not in self._traced:
            self._traced[key] = piece, self._trace(piece, entering, leaving)
        first, functional = self._traced[key]
        results = self._copy(functional.graph_module, [self._made[node] for node in entering], _stacks(first, piece))
        for node, result in zip(leaving, results, strict=True):
            self._made[node], self._values[node] = result, result.meta["val"]

    def _trace(self, piece: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node]) -> Functional:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in entering:
            copies[node] = graph.placeholder(node.name)
        for node in piece:
            for held in node.all_input_nodes:
                if held.op == "get_attr" and held not in copies:
                    copies[held] = graph.node_copy(held)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in leaving))
        values = [self._value(node) for node in entering]
        functional = _traced(lazy_graph_module(self.source, graph), values, self.mode)
        if functional.mutated:
            raise _Entangled
        return functional

    def _value(self, node: fx.Node) -> object:
        """A value as a piece receives it: of the same layout, and nobody else's memory."""
        value = self._values[node]
        if node.op == "placeholder" or not isinstance(value, Tensor):
            return value
        made = laid_out_like(value)
        if made is None:
            raise _Entangled
        return made

    def _key(
        self, piece: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node]
    ) -> tuple[object, ...]:
        """Equal for pieces that become the same: operators, wiring, constants, and what comes in and leaves."""
        number = {node: i for i, node in enumerate((*entering, *piece))}
        stacks: dict[object, int] = {}

        def name(node: fx.Node) -> str:
            if node.op == "get_attr":
                return f"@{id(getattr(self.source, node.target, None))}"  # type: ignore[arg-type]
            return f"%{number[node]}"

        lines: list[object] = [self._layout(node) for node in entering]
        for node in piece:
            stack = stacks.setdefault(_stack(node), len(stacks))
            arguments = fx.node.map_aggregate((node.args, node.kwargs), lambda part: _spelled(part, name))
            lines.append((node.op, node.target, str(arguments), stack))
        return (*lines, tuple(number[node] for node in leaving))

    def _layout(self, node: fx.Node) -> object:
        value = self._values[node]
        if not isinstance(value, Tensor):
            return type(value).__name__, value
        is_read = node.op == "placeholder" and getattr(value, "constant", None) is not None
        return layout_text(value), node if is_read else None

    def _copy(
        self, part: fx.GraphModule, entering: Sequence[fx.Node], stacks: Mapping[object, Any]
    ) -> Sequence[fx.Node]:
        """Copy a traced piece into the whole; returns what leaves it."""
        known = dict(zip(part.graph.find_nodes(op="placeholder"), entering, strict=True))
        for node in part.graph.nodes:
            if node.op == "get_attr":
                known[node] = self.graph.get_attr(self._hold(getattr(part, node.target)))
            elif node.op not in ("placeholder", "output"):
                known[node] = self.graph.node_copy(node, known.__getitem__)
                stack = stacks.get(_stack(node))
                if stack is not None:
                    known[node].meta["nn_module_stack"] = stack
        results = results_of(part.graph)
        if not all(isinstance(result, fx.Node) and isinstance(_example(result), Tensor) for result in results):
            raise _Entangled
        return [known[result] for result in results]

    def _hold(self, value: object) -> str:
        if not isinstance(value, Tensor):
            raise _Entangled
        if id(value) not in self._held:
            self._held[id(value)] = f"_tensor_constant{len(self._held)}"
            self.holder.register_buffer(self._held[id(value)], value)
        return self._held[id(value)]


def _example(node: fx.Node) -> object:
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def _stack(node: fx.Node) -> tuple[object, ...]:
    return tuple(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def _stacks(first: Sequence[fx.Node], piece: Sequence[fx.Node]) -> dict[object, Any]:
    """Modules of a piece by those of the one that was traced for it."""
    if first is piece:
        return {}
    return {
        _stack(model): node.meta["nn_module_stack"]
        for model, node in zip(first, piece, strict=True) if "nn_module_stack" in node.meta
    }  # fmt: skip


def _spelled(part: Any, name: Callable[[fx.Node], str]) -> str:
    if isinstance(part, fx.Node):
        return name(part)
    if isinstance(part, _PLAIN):
        return f"{type(part).__name__} {part!r}"
    return f"{type(part).__name__} at {id(part)}"
