"""Loop invariants as functions of their own: values that a step takes from a table instead of computing them.

They run as they are, operator by operator: once per generation, or once for many steps, there is nothing that compiled
code would save. For many steps at once the function is mapped over rows (`torch.vmap`), so that every weight is read
once for all of them.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dicompile.analysis import ModelStructure, Pace
from dicompile.analysis.blocks import structure_key
from dicompile.capture import Capture, Role
from dicompile.compat import lazy_graph_module
from dicompile.errors import InvalidSetting
from dicompile.nodes import walk
from dicompile.passes import boundary

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors whose version and place in memory tell whether they have changed."""

CHUNK = 16
"""Steps that are computed at once. It is always this many, so that rounding does not depend on the schedule."""


class Hoist(enum.Enum):
    """What is computed outside of the steps."""

    NOTHING = "off"
    CONDITIONING = "conditioning"
    """What depends on the conditioning alone: the very bits that a step would compute."""

    ALL = "all"
    """What depends on the timestep, too, for many steps at once: a product of more rows may round in another way."""

    @classmethod
    def of(cls, name: str | None) -> Hoist | None:
        """By the name that users say; None where nobody said anything.

        Raises:
            InvalidSetting: there is no such name.
        """
        known = {item.value: item for item in cls}
        if name is not None and name not in known:
            raise InvalidSetting(f"hoist={name!r} does not exist", where="hoist", fix=f"use one of: {', '.join(known)}")
        return None if name is None else known[name]

    @property
    def paces(self) -> tuple[Pace, ...]:
        """Paces of the values that are taken out."""
        return {Hoist.NOTHING: (), Hoist.CONDITIONING: (Pace.GENERATION,), Hoist.ALL: tuple(Pace)}[self]


@dataclass(frozen=True)
class Invariant:
    """A value that does not depend on the latent.

    Attributes:
        function: takes the values of `inputs`.
        mapped: the same for `CHUNK` values of the timestep; takes and returns a first axis of that many wherever a
            value depends on it. None where it does not.
        inputs: numbers of inputs of the model, and names of other invariants.
        strides: in which the model's own value lies in memory.
        shape: of that value.
    """

    function: Callable[..., Tensor] = field(repr=False)
    mapped: Callable[..., Tensor] | None = field(repr=False)
    inputs: tuple[int | str, ...]
    strides: tuple[int, ...]
    shape: tuple[int, ...]


class Invariants:
    """Everything of one captured model that is computed outside of the steps.

    Args:
        capture: the model.
        structure: its structure.
        hoist: what is wanted.
    """

    def __init__(self, capture: Capture, structure: ModelStructure, hoist: Hoist) -> None:
        self._capture, graph = capture, capture.graph
        self.paces = {name: pace for name, pace in structure.invariants.items() if pace in hoist.paces}
        self._nodes = {node.name: node for node in graph.nodes}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        self._made: dict[object, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {}

    def left(self, roots: Collection[fx.Node]) -> set[str]:
        """Names of the nodes that steps still compute, given what they have to deliver."""
        reached = walk(roots, lambda node: () if node.name in self.paces else node.all_input_nodes)
        return {node.name for node in reached}.difference(self.paces)

    @functools.cached_property
    def functions(self) -> Mapping[str, Invariant]:
        """All of them, by name."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return {name: self._make(self._nodes[name]) for name in self.paces}

    def _make(self, node: fx.Node) -> Invariant:
        def before(found: fx.Node) -> Sequence[fx.Node]:
            return () if found is not node and found.name in self.paces else found.all_input_nodes

        reached = sorted(walk([node], before), key=self._order.__getitem__)
        members = [n for n in reached if n is node or not (n in self._inputs or n.name in self.paces)]
        inputs = [self._nodes[name] for name in boundary(members)[0]]  # in the order that the key numbers them in
        timed = tuple(self._is_timed(n) for n in inputs)
        key = structure_key(members), timed
        if key not in self._made:
            module = self._module(inputs, members)
            self._made[key] = module.forward, self._mapped(module, inputs, timed) if any(timed) else None
        function, mapped = self._made[key]
        places = tuple(self._inputs.get(n, n.name) for n in inputs)
        return Invariant(function, mapped, places, node.meta["val"].stride(), tuple(node.meta["val"].shape))

    def _is_timed(self, node: fx.Node) -> bool:
        number = self._inputs.get(node)
        if number is None:
            return self.paces[node.name] is Pace.STEP
        return self._capture.inputs[number].role is Role.TIMESTEP

    def _module(self, inputs: Sequence[fx.Node], members: Sequence[fx.Node]) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for i, node in enumerate(inputs):
            copies[node] = graph.placeholder(f"value_{i}")
        for node in members:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[members[-1]])
        return lazy_graph_module(self._capture.graph_module, graph)

    def _mapped(
        self, module: fx.GraphModule, inputs: Sequence[fx.Node], timed: Sequence[bool]
    ) -> Callable[..., Tensor]:
        each = torch.vmap(module.forward, in_dims=tuple(0 if is_timed else None for is_timed in timed))

        def rows(*given: Tensor) -> Any:  # make_fx asks how many arguments there are
            return each(*given)

        with self._capture.fake_mode:
            values = [
                value.new_empty((CHUNK, *value.shape)) if is_timed else value
                for value, is_timed in zip((node.meta["val"] for node in inputs), timed, strict=True)
            ]
            traced: Callable[..., Tensor] = make_fx(rows)(*values).forward
        return traced
