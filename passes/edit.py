"""The only place that makes nodes: every new node gets its value by running the operator on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from dicompile.nodes import node_argument, results_of
from dicompile.ops.kinds import RESHAPES
from dicompile.passes.base import Computed, InputRef, OutputRef, Segment
from dicompile.text import layout_text

aten = torch.ops.aten

UNBOUNDED = 1024


class Editor:
    """Adds inputs, outputs and calls to the graph of one segment.

    Calls go before the node set by `before`, and carry its module path.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.graph = segment.graph
        self._anchor: fx.Node | None = None

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert new calls before `node`."""
        self._anchor = node
        with self.graph.inserting_before(node):
            yield
        self._anchor = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator on nodes and constants."""
        node = self.graph.call_function(target, args, kwargs)
        values, keywords = fx.node.map_arg((args, kwargs), lambda parent: parent.meta["val"])
        with torch.no_grad(), self.segment.fake_mode, enable_python_dispatcher():  # torch 2.11: symbols in linear
            node.meta["val"] = target(*values, **keywords)
        self.segment.computed[node] = Computed.of(node)
        if self._anchor is not None and "nn_module_stack" in self._anchor.meta:
            node.meta["nn_module_stack"] = self._anchor.meta["nn_module_stack"]
        return node

    def trace(self, function: Callable[..., torch.Tensor], *nodes: fx.Node | None) -> fx.Node:
        """Inline a tensor function of tensors as ATen calls; None arguments are passed through."""
        present = [node for node in nodes if node is not None]

        def positional(*tensors: torch.Tensor) -> torch.Tensor:
            given = iter(tensors)
            return function(*(None if node is None else next(given) for node in nodes))

        traced = self.traced(positional, *present)
        return self.inlined(traced, *present)[node_argument(traced.output_node(), 0)]

    def traced(self, function: Callable[..., torch.Tensor], *nodes: fx.Node, pre_dispatch: bool = True) -> fx.Graph:
        """A tensor function of tensors as a graph of ATen calls.

        Args:
            function: what to trace.
            nodes: whose values it is traced on.
            pre_dispatch: False for the operators that those of the model become when they are compiled.
        """
        lowered = contextlib.nullcontext() if pre_dispatch else enable_python_dispatcher()  # as in AOTAutograd
        with torch.no_grad(), self.segment.fake_mode, lowered:
            return make_fx(function, pre_dispatch=pre_dispatch)(*(node.meta["val"] for node in nodes)).graph

    def inlined(self, graph: fx.Graph, *nodes: fx.Node) -> dict[fx.Node, fx.Node]:
        """Copy a graph of calls, with `nodes` for its inputs; maps its nodes to the copies."""
        arguments = iter(nodes)
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(arguments)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
                copies[node] = self.call(node.target, *args, **kwargs)
        return copies

    def input(self, reference: InputRef, value: object) -> fx.Node:
        """The placeholder for `reference`, added if it is new; `value` is a fake tensor or symbolic int."""
        placeholders: list[fx.Node] = [node for node in self.graph.nodes if node.op == "placeholder"]
        if reference in self.segment.inputs:
            return placeholders[self.segment.inputs.index(reference)]
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"input_{len(placeholders)}")
        node.meta["val"] = value
        self.segment.inputs.append(reference)
        return node

    def int_input(self, reference: InputRef, below: int = UNBOUNDED) -> fx.Node:
        """Placeholder of a symbolic non-negative int, which is traced with an example that is less than `below`."""
        if reference in self.segment.inputs:
            return self.input(reference, None)
        context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        shaped = self.segment.fake_mode.from_tensor(
            torch.empty(self._unused_size(below), device="meta"), symbolic_context=context
        )
        return self.input(reference, shaped.shape[0])

    def _unused_size(self, below: int) -> int:
        """A size that no value of the graph has: one that had it would be taken for the symbol."""
        shapes = [getattr(node.meta.get("val"), "shape", ()) for node in self.graph.nodes]
        taken = {size.node.hint if isinstance(size, torch.SymInt) else size for shape in shapes for size in shape}
        free = [size for size in range(2, below) if size not in taken] or [max(2, below - 1)]
        return min(free, key=lambda size: abs(size - below // 4))

    def tensor_input(self, reference: InputRef, shape: tuple[int, ...], dtype: torch.dtype, like: fx.Node) -> fx.Node:
        """Placeholder of a contiguous tensor on the device of `like`."""
        with self.segment.fake_mode:
            value = torch.empty(shape, dtype=dtype, device=like.meta["val"].device)
        return self.input(reference, value)

    def in_layout_of(self, original: fx.Node, node: fx.Node) -> fx.Node:
        """The contiguous value `node`, its axes ordered in memory as those of `original`: what follows may view it."""
        if original.meta["val"].is_contiguous():
            return node
        return self.with_strides(node, original.meta["val"].stride())

    def with_strides(self, node: fx.Node, strides: Sequence[int]) -> fx.Node:
        """A copy of `node` with its axes ordered in memory by falling strides; dense."""
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        permuted = self.call(aten.permute.default, node, order) if order != sorted(order) else node
        copied = self.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        if permuted is node:
            return copied
        return self.call(aten.permute.default, copied, [order.index(axis) for axis in range(len(order))])

    def propagate(self) -> None:
        """Compute values anew where something upstream was edited, which may have changed their layouts.

        A view of a value that lies otherwise in memory now may be none any more, so it becomes a reshape.
        """
        before = {node: node.meta["val"] for node in self.graph.nodes if node.op != "output"}
        with torch.no_grad(), self.segment.fake_mode, enable_python_dispatcher():
            for node in self.graph.nodes:
                known = self.segment.computed.get(node)
                if node.op != "call_function" or (known is not None and known.holds(node)):
                    continue
                if node.target in RESHAPES and before[node.args[0]].stride() != node.args[0].meta["val"].stride():
                    node.target = aten.reshape.default
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda parent: parent.meta["val"])
                value = node.target(*args, **kwargs)
                if not isinstance(value, torch.Tensor) or layout_text(value) != layout_text(node.meta["val"]):
                    node.meta["val"] = value  # else what follows need not be computed anew

    def output(self, reference: OutputRef, node: fx.Node) -> None:
        """Let `node` leave the segment as `reference`."""
        self.graph.output_node().args = ([*results_of(self.graph), node],)
        self.segment.outputs.append(reference)
